"""Products with the transfers of sequence parallelism cut into pieces, which travel while other pieces are multiplied.

Without this, a product waits for the whole sequence to be gathered, and the whole reduce-scatter waits for the product.
Cut along the sequence, piece i + 1 is gathered while piece i is multiplied, and piece i is scattered while piece i + 1 is
multiplied (Wang et al., 2023, "Overlap Communication with Dependent Computation via Decomposition", ASPLOS). Each piece
has tokens of every rank and is gathered or scattered by one collective, as by TransformerEngine's user buffers with the
method "pipeline". In a ring of permutes, a piece would have another place in the sequence on each device, and putting it
there would take a copy.

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
BESIDE_WEIGHT_GRADS = "beside_weight_grads"  # scope of barriers that only make transfers run beside weight gradients


def gather_then_multiply(equation: str, x: jax.Array, *weights: jax.Array, overlap: bool = False) -> list[jax.Array]:
    """Column-parallel products, `einsum(equation, gather_sequence(x), weight)` with each weight.

    Args:
      x: [batch, seq, embed].
      weights: [embed, ...] each.
      overlap: cut the gather into pieces. No effect unless a manual axis splits the sequence.
    """
    if overlap and rank_and_size("sp")[1] > 1:
        return _gather_in_pieces(equation, vary(x, ("tp",)), *weights)
    return _multiply(equation, gather_sequence(x), *weights)


def multiply_then_scatter(
    equation: str, function: Callable[..., jax.Array], *inputs: jax.Array, weight: jax.Array, overlap: bool = False
) -> jax.Array:
    """A row-parallel product, `reduce_output(einsum(equation, function(*inputs), weight))`, [batch, seq, embed].

    Args:
      function: of each token by itself.
      inputs: [batch, full_seq, ...] each.
      overlap: cut the reduce-scatter into pieces. No effect unless a manual axis splits the sequence.
    """
    if overlap and rank_and_size("sp")[1] > 1:
        return sum_over(_scatter_in_pieces(equation, function, weight, *inputs), ("tp",))
    return reduce_output(jnp.einsum(equation, function(*inputs), weight))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_in_pieces(equation: str, x: jax.Array, *weights: jax.Array) -> list[jax.Array]:
    # One product with all weights, because a product with one of them may be too short to hide a transfer.
    wide = jnp.concatenate([weight.reshape(weight.shape[0], -1) for weight in weights], axis=1)
    pieces = jnp.split(x, TP_OVERLAP_PIECES, axis=1)
    product = _join(_side_by_side(_gather, lambda piece: piece @ wide, pieces))
    parts = jnp.split(product, np.cumsum([weight[0].size for weight in weights])[:-1], axis=2)
    return [part.reshape(*part.shape[:2], *weight.shape[1:]) for part, weight in zip(parts, weights, strict=True)]


def _gather_backward(equation: str, args: Arrays, grads: list[jax.Array]) -> Arrays:
    x, *grads = _together(args[0], *grads)  # so that the gather has products beside it
    x_grad, *weight_grads = jax.vjp(partial(_multiply, equation), _gather(x), *args[1:])[1](grads)
    return _together(_scatter(x_grad), *weight_grads)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scatter_in_pieces(
    equation: str, function: Callable[..., jax.Array], weight: jax.Array, *inputs: jax.Array
) -> jax.Array:
    def multiply(inputs: Arrays) -> jax.Array:
        return jnp.einsum(equation, function(*inputs), weight)

    return jnp.concatenate(_side_by_side(multiply, _scatter, list(zip(*map(_cut, inputs), strict=True))), axis=1)


def _scatter_backward(equation: str, function: Callable[..., jax.Array], args: Arrays, grad: jax.Array) -> Arrays:
    def product(weight: jax.Array, *inputs: jax.Array) -> jax.Array:
        return jnp.einsum(equation, function(*inputs), weight)

    return jax.vjp(product, *args)[1](_gather(grad))


_gather_in_pieces.defvjp(lambda equation, *args: (_gather_in_pieces(equation, *args), args), _gather_backward)
_scatter_in_pieces.defvjp(
    lambda equation, function, *args: (_scatter_in_pieces(equation, function, *args), args), _scatter_backward
)


def _multiply(equation: str, x: jax.Array, *weights: jax.Array) -> list[jax.Array]:
    return [jnp.einsum(equation, x, weight) for weight in weights]


def _cut(x: jax.Array) -> list[jax.Array]:
    """[batch, full_seq, ...] → pieces of the sequence. Each has an equal part of every sp rank's tokens."""
    batch, seq, *rest = x.shape
    by_rank = x.reshape(batch, rank_and_size("sp")[1], -1, *rest)
    pieces = jnp.split(by_rank, TP_OVERLAP_PIECES, axis=2)
    return [piece.reshape(batch, seq // TP_OVERLAP_PIECES, *rest) for piece in pieces]


def _join(pieces: Sequence[jax.Array]) -> jax.Array:
    """The inverse of `_cut`."""
    batch, tokens, *rest = pieces[0].shape
    by_rank = [piece.reshape(batch, rank_and_size("sp")[1], -1, *rest) for piece in pieces]
    return jnp.concatenate(by_rank, axis=2).reshape(batch, len(pieces) * tokens, *rest)


def _side_by_side(first: Callable[[Any], Any], second: Callable[[Any], Any], xs: Sequence[Any]) -> list[Any]:
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
