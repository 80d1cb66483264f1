"""Products with the transfers of sequence parallelism cut into pieces, which travel while other pieces are multiplied.

Without this, a product waits for the whole sequence to be gathered, and the whole reduce-scatter waits for the product.
Cut along the sequence, piece i + 1 is gathered while piece i is multiplied, and piece i is scattered while piece i + 1 is
multiplied (Wang et al., 2023, "Overlap Communication with Dependent Computation via Decomposition", ASPLOS). The pieces
are gathered and scattered, as by TransformerEngine's user buffers with the method "pipeline", and do not travel round a
ring: so each of them has its place in the sequence on every device alike, and none is copied there.

The backward pass is not cut. Its transfers have whole products beside them: the gradient of x is scattered while the
gradients of the weights are multiplied, and what those need is gathered while the gradient of x is multiplied.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.config import TP_OVERLAP_PIECES
from jaxpar.parallel.collectives import gather_sequence, rank_and_size, reduce_output, sum_over, vary

Arrays = tuple[jax.Array, ...]
BESIDE_WEIGHT_GRADS = "beside_weight_grads"  # scope of barriers that mean nothing where weight gradients come later


def gather_then_multiply(equation: str, x: jax.Array, *weights: jax.Array, overlap: bool = False) -> list[Arrays]:
    """Column-parallel products, `einsum(equation, gather_sequence(x), weight)` with each weight.

    Args:
      x: [batch, seq, embed].
      weights: [embed, ...] each.
      overlap: cut the gather into pieces. No effect unless a manual axis splits the sequence.

    Returns:
      For each piece of the sequence, the products with all weights. `join` makes pieces a whole.
    """
    if overlap and rank_and_size("sp")[1] > 1:
        return _gather_in_pieces(equation, vary(x, ("tp",)), *weights)
    x = gather_sequence(x)
    return [tuple(jnp.einsum(equation, x, weight) for weight in weights)]


def multiply_then_scatter(equation: str, pieces: list[jax.Array], weight: jax.Array) -> jax.Array:
    """A row-parallel product, `reduce_output(einsum(equation, x, weight))`, of shape [batch, seq, embed].

    Args:
      pieces: x in pieces as from `gather_then_multiply` or `cut`. If there is one, nothing overlaps.
    """
    if len(pieces) == 1:
        return reduce_output(jnp.einsum(equation, pieces[0], weight))
    return sum_over(_scatter_in_pieces(equation, pieces, weight), ("tp",))


def cut(x: jax.Array, num_pieces: int) -> list[jax.Array]:
    """[batch, full_seq, ...] → pieces of the sequence. Each has an equal part of every sp rank's tokens."""
    if num_pieces == 1:
        return [x]
    batch, seq, *rest = x.shape
    by_rank = x.reshape(batch, rank_and_size("sp")[1], -1, *rest)
    return [piece.reshape(batch, seq // num_pieces, *rest) for piece in jnp.split(by_rank, num_pieces, axis=2)]


def join(pieces: Sequence[jax.Array]) -> jax.Array:
    """The inverse of `cut`."""
    if len(pieces) == 1:
        return pieces[0]
    batch, tokens, *rest = pieces[0].shape
    by_rank = [piece.reshape(batch, rank_and_size("sp")[1], -1, *rest) for piece in pieces]
    return jnp.concatenate(by_rank, axis=2).reshape(batch, len(pieces) * tokens, *rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_in_pieces(equation: str, x: jax.Array, *weights: jax.Array) -> list[Arrays]:
    # One product with all weights, because a product with one of them may be too short to hide a transfer.
    wide = jnp.concatenate([weight.reshape(weight.shape[0], -1) for weight in weights], axis=1)
    ends = np.cumsum([weight[0].size for weight in weights])[:-1]

    def by_weight(product: jax.Array) -> Arrays:
        parts = zip(jnp.split(product, ends, axis=2), weights, strict=True)
        return tuple(part.reshape(*part.shape[:2], *weight.shape[1:]) for part, weight in parts)

    pieces = jnp.split(x, TP_OVERLAP_PIECES, axis=1)
    return [by_weight(product) for product in _side_by_side(_gather, lambda piece: piece @ wide, pieces)]


def _gather_in_pieces_backward(equation: str, args: Arrays, piece_grads: list[Arrays]) -> Arrays:
    x, *weights = args
    x, *grads = _together(x, *map(join, zip(*piece_grads, strict=True)))  # so that the gather has products beside it
    _, backward = jax.vjp(lambda x, *ws: [jnp.einsum(equation, x, w) for w in ws], _gather(x), *weights)
    x_grad, *weight_grads = backward(grads)
    return _together(_scatter(x_grad), *weight_grads)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scatter_in_pieces(equation: str, pieces: list[jax.Array], weight: jax.Array) -> jax.Array:
    scattered = _side_by_side(lambda piece: jnp.einsum(equation, piece, weight), _scatter, pieces)
    return jnp.concatenate(scattered, axis=1)


def _scatter_in_pieces_backward(
    equation: str, args: tuple[list[jax.Array], jax.Array], grad: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    (first, *others), weight = args
    # If the forward pass is computed again, XLA would combine this gather with the first one there, which nothing hides.
    grad, first = _together(grad, first)
    _, backward = jax.vjp(partial(jnp.einsum, equation), join([first, *others]), weight)
    x_grad, weight_grad = backward(_gather(grad))
    return cut(x_grad, 1 + len(others)), weight_grad


_gather_in_pieces.defvjp(lambda equation, *args: (_gather_in_pieces(equation, *args), args), _gather_in_pieces_backward)
_scatter_in_pieces.defvjp(
    lambda equation, *args: (_scatter_in_pieces(equation, *args), args), _scatter_in_pieces_backward
)


def _side_by_side(first: Callable[[Any], Any], second: Callable[[Any], Any], xs: Sequence[jax.Array]) -> list[Any]:
    """[second(first(x)) for x in xs], where first(xs[i + 1]) and second(first(xs[i])) start together.

    Both wait for the two before them. Otherwise XLA would combine all transfers into one, and all products.
    """
    between, results = first(xs[0]), list[Any]()
    for x in xs[1:]:
        x, between, results[-1:] = lax.optimization_barrier((x, between, results[-1:]))
        results.append(second(between))
        between = first(x)
    between, results[-1] = lax.optimization_barrier((between, results[-1]))
    return [*results, second(between)]


def _together(*xs: jax.Array) -> Arrays:
    """`xs`, none of which is used before all of them are there."""
    with jax.named_scope(BESIDE_WEIGHT_GRADS):
        return lax.optimization_barrier(xs)


def _gather(x: jax.Array) -> jax.Array:
    return lax.all_gather(x, "sp", axis=1, tiled=True)


def _scatter(x: jax.Array) -> jax.Array:
    return lax.psum_scatter(x, "sp", scatter_dimension=1, tiled=True)
