"""What the kinds of attention hand to each other.

Dimensions: b batch, q query tokens, s key tokens, k kv heads, g query heads a kv head, d head_dim. Tokens are always
dimension 1.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.parallel.collectives import MASKED, vary, varying_axes

Offset = jax.Array | int | None
"""Place in the sequence of a block's first query minus that of its first key: an int where all ranks agree on it, an
array where they do not. None: whatever the places are, nothing is masked but other documents."""


@dataclass(frozen=True)
class Kind:
    """Who may attend to whom, and what computes it."""

    causal: bool
    window: int | None
    scale: float
    backend: Literal["xla", "pallas"]


class Queries(NamedTuple):
    query: jax.Array  # [b, q, k, g, d]
    segments: jax.Array | None  # [b, q]


class Keys(NamedTuple):
    """What travels."""

    key: jax.Array  # [b, s, k, d]
    value: jax.Array  # [b, s, k, d]
    segments: jax.Array | None  # [b, s]


class Partial(NamedTuple):
    """Attention over some of the keys: normalized output and log-sum-exp of the scores."""

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


def nothing(query: jax.Array) -> Partial:
    """Attention over no keys at all."""
    axes = varying_axes(query)
    lse = jnp.full(query.shape[:-1], MASKED, jnp.float32)
    return Partial(vary(jnp.zeros(query.shape, jnp.float32), axes), vary(lse, axes))


def no_grads(queries: Queries, keys: Keys) -> Grads:
    return Grads(*(vary(jnp.zeros(x.shape, jnp.float32), varying_axes(x)) for x in (queries.query, *keys[:2])))


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both."""
    lse = jnp.logaddexp(a.lse, b.lse)
    output = a.output * jnp.exp(a.lse - lse)[..., None] + b.output * jnp.exp(b.lse - lse)[..., None]
    return Partial(output, lse)


def tie(tree: Any, data: jax.Array) -> Any:
    """`tree`, as if it depended on `data`.

    JAX hoists what depends on no activation out of the scan over layers, for all turns of the loops inside at once: of
    masks that would be a matrix of sequence x sequence.
    """
    return lax.optimization_barrier((tree, data))[0]


def take(tree: Any, start: jax.Array, size: int, axis: int = 1) -> Any:
    """Tokens [start, start + size) of each array."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis), tree)


def put(tree: Any, part: Any, start: jax.Array, axis: int = 1) -> Any:
    return jax.tree.map(lambda x, part: lax.dynamic_update_slice_in_dim(x, part, start, axis), tree, part)


def add_at(total: jax.Array, more: jax.Array, start: jax.Array, axis: int = 1) -> jax.Array:
    return put(total, take(total, start, more.shape[axis], axis) + more, start, axis)
