"""Types and small helpers that the implementations of attention share.

Dimensions: b batch, q query tokens, s key tokens, k kv heads, g query heads per kv head, d head_dim. Tokens are always
dimension 1.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.parallel.collectives import MASKED, vary, varying_axes

Offset = jax.Array | int | None
"""Sequence index of a block's first query minus that of its first key: an int if it is the same on all ranks, an array
if it is not. None: the indices do not matter, and only tokens of other documents are masked."""


@dataclass(frozen=True)
class AttentionSpec:
    """Which keys a query may attend to, the scale of the scores, and the backend that computes them."""

    causal: bool
    window: int | None
    scale: float
    backend: Literal["xla", "pallas"]


class Queries(NamedTuple):
    query: jax.Array  # [b, q, k, g, d]
    segments: jax.Array | None  # [b, q]


class Keys(NamedTuple):
    """Keys with their values: what the cp ranks send each other."""

    key: jax.Array  # [b, s, k, d]
    value: jax.Array  # [b, s, k, d]
    segments: jax.Array | None  # [b, s]


class Partial(NamedTuple):
    """Attention over some of the keys: the normalized output and the log-sum-exp of the scores."""

    output: jax.Array  # float32 [b, q, k, g, d]
    lse: jax.Array  # float32 [b, q, k, g]


class OutputGrads(NamedTuple):
    """What the backward pass of every block of these queries needs."""

    grad: jax.Array  # of the output [b, q, k, g, d]
    lse: jax.Array  # over all keys, float32 [b, q, k, g]
    delta: jax.Array  # row sums of grad · output, float32 [b, q, k, g]


class Grads(NamedTuple):
    query: jax.Array  # float32 [b, q, k, g, d]
    key: jax.Array  # float32 [b, s, k, d]
    value: jax.Array  # float32 [b, s, k, d]


def empty_partial(query: jax.Array) -> Partial:
    """Attention over no keys at all: the neutral element of `merge_partials`."""
    axes = varying_axes(query)
    lse = jnp.full(query.shape[:-1], MASKED, jnp.float32)
    return Partial(vary(jnp.zeros(query.shape, jnp.float32), axes), vary(lse, axes))


def zero_grads(queries: Queries, keys: Keys) -> Grads:
    return Grads(*(vary(jnp.zeros(x.shape, jnp.float32), varying_axes(x)) for x in (queries.query, *keys[:2])))


def merge_partials(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both."""
    lse = jnp.logaddexp(a.lse, b.lse)
    output = a.output * jnp.exp(a.lse - lse)[..., None] + b.output * jnp.exp(b.lse - lse)[..., None]
    return Partial(output, lse)


def tie_to_data(tree: Any, data: jax.Array) -> Any:
    """Returns `tree` as if it depended on `data`.

    JAX hoists whatever does not depend on an activation out of the scan over layers, for all iterations of the loops
    inside at once. For masks that would be a matrix of sequence x sequence.
    """
    return lax.optimization_barrier((tree, data))[0]


def slice_tokens(tree: Any, start: jax.Array, size: int, axis: int = 1) -> Any:
    """Tokens [start, start + size) of each array."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis), tree)


def write_tokens(tree: Any, part: Any, start: jax.Array, axis: int = 1) -> Any:
    """Each array of `tree` with its tokens from `start` on replaced by those of `part`."""
    return jax.tree.map(lambda x, part: lax.dynamic_update_slice_in_dim(x, part, start, axis), tree, part)


def add_to_tokens(total: jax.Array, more: jax.Array, start: jax.Array, axis: int = 1) -> jax.Array:
    """`total` with `more` added to its tokens from `start` on."""
    return write_tokens(total, slice_tokens(total, start, more.shape[axis], axis) + more, start, axis)
