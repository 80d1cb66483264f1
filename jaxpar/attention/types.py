"""Types and small helpers that the implementations of attention share.

Dimensions: b batch, q query tokens, s key tokens, k kv heads, g query heads per kv head, d head_dim of query and key, v
size of a value (mostly the same). Tokens are dimension 1, but the last one of the statistics of a query (`lse` and `delta`), as kernels have them.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.attention.settings import Backend
from jaxpar.parallel.collectives import MASKED, vary, varying_axes

Offset = jax.Array | int | None
"""Sequence index of a block's first query minus that of its first key: an int if it is the same on all ranks, an array
if it is not. None: the indices do not matter, and only tokens of other documents are masked."""


@dataclass(frozen=True)
class AttentionSpec:
    """Which keys a query may attend to, how scores are made, and the backend that computes them.

    Attributes:
      scale: of the products of query and key.
      soft_cap: scaled scores become soft_cap * tanh(scores / soft_cap), before they are masked. None: they stay.
    """

    causal: bool
    window: int | None
    scale: float
    backend: Backend
    soft_cap: float | None = None


@dataclass(frozen=True)
class BlockNeeds:
    """What a block asks of a kernel.

    Attributes:
      dtype: of query, key and value.
      head_dim: of query and key.
      documents: whether tokens attend only to their own document.
      mask: None; "causal" and "window" (causal too): of a block whose first query is its first key; "shifted": any other
        causal order or window, or one that differs between ranks.
      soft_cap: whether scores are capped.
      value_dim: the size of a value, if it differs from `head_dim`. None: it does not.
    """

    dtype: str
    head_dim: int
    documents: bool
    mask: Literal["causal", "window", "shifted"] | None
    soft_cap: bool = False
    value_dim: int | None = None

    def __str__(self) -> str:
        masked = {None: "unmasked", "window": "causal", "shifted": "shifted"}.get(self.mask, self.mask)
        possible = {
            "documents": self.documents,
            "a window": self.mask == "window",
            "a soft cap": self.soft_cap,
            f"values of size {self.value_dim}": self.value_dim is not None,
        }
        *extras, last = [text for text, there in possible.items() if there] or [""]
        listed = f"{', '.join(extras)}{' and ' * bool(extras)}{last}"
        return f"{masked} blocks{' with ' * bool(listed)}{listed} in {self.dtype}"


class Queries(NamedTuple):
    query: jax.Array  # [b, q, k, g, d]
    segments: jax.Array | None  # [b, q]


class Keys(NamedTuple):
    """Keys with their values: what the cp ranks send each other."""

    key: jax.Array  # [b, s, k, d]
    value: jax.Array  # [b, s, k, v]
    segments: jax.Array | None  # [b, s]


class Partial(NamedTuple):
    """Attention over some of the keys: the normalized output and the log-sum-exp of the scores."""

    output: jax.Array  # [b, q, k, g, v], float32; of a single block in the query's dtype, if a kernel made it
    lse: jax.Array  # float32 [b, k, g, q]


class OutputGrads(NamedTuple):
    """What the backward pass of every block of these queries needs. Kernels make `delta` themselves, from `output`."""

    grad: jax.Array  # of the output [b, q, k, g, v]
    output: jax.Array  # over all keys [b, q, k, g, v]
    lse: jax.Array  # over all keys, float32 [b, k, g, q]
    delta: jax.Array  # row sums of grad · output, float32 [b, k, g, q]


class Grads(NamedTuple):
    """Float32, but for a single block, whose gradients have the dtype of the arrays if a kernel made them."""

    query: jax.Array  # [b, q, k, g, d]
    key: jax.Array  # [b, s, k, d]
    value: jax.Array  # [b, s, k, v]


def empty_partial(query: jax.Array, value: jax.Array, token_axis: int = 1) -> Partial:
    """Attention over no keys at all: the neutral element of `merge_partials`. `token_axis`: of the query."""
    axes, shape = varying_axes(query), list(query.shape[:-1])
    shape.append(shape.pop(token_axis))
    lse = jnp.full(shape, MASKED, jnp.float32)
    output = jnp.zeros((*query.shape[:-1], value.shape[-1]), jnp.float32)
    return Partial(vary(output, axes), vary(lse, axes))


def zero_grads(queries: Queries, keys: Keys) -> Grads:
    return Grads(*(vary(jnp.zeros(x.shape, jnp.float32), varying_axes(x)) for x in (queries.query, *keys[:2])))


def merge_partials(a: Partial, b: Partial, token_axis: int = 1) -> Partial:
    """Attention over the keys of both, float32. `token_axis`: of the outputs."""
    lse = jnp.logaddexp(a.lse, b.lse)

    def weighted(x: Partial) -> jax.Array:
        return x.output * jnp.moveaxis(jnp.exp(x.lse - lse), -1, token_axis)[..., None]

    return Partial(weighted(a) + weighted(b), lse)


def in_float32(tree: Any) -> Any:
    """What a kernel made in a smaller dtype, as sums over several blocks are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def tie_to_data(tree: Any, data: jax.Array) -> Any:
    """Returns `tree` as if it depended on `data`.

    JAX hoists whatever does not depend on an activation out of the scan over layers, for all iterations of the loops
    inside at once. For masks that would be a matrix of sequence x sequence.
    """
    return lax.optimization_barrier((tree, data))[0]


def slice_tokens(tree: Any, start: jax.Array, size: int, axis: int = 1) -> Any:
    """Tokens [start, start + size) of each array."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis), tree)


def write_tokens(x: jax.Array, part: jax.Array, start: jax.Array, axis: int = 1) -> jax.Array:
    """`x` with its tokens from `start` on replaced by those of `part`."""
    return lax.dynamic_update_slice_in_dim(x, part, start, axis)


def add_to_tokens(total: jax.Array, more: jax.Array, start: jax.Array, axis: int = 1) -> jax.Array:
    """`total` with `more` added to its tokens from `start` on."""
    return write_tokens(total, slice_tokens(total, start, more.shape[axis], axis) + more, start, axis)


Rows = TypeVar("Rows", Queries, Partial, OutputGrads)


def slice_rows(rows: Rows, start: jax.Array, size: int) -> Rows:
    """Query tokens [start, start + size) of each array."""
    parts = {name: slice_tokens(x, start, size, _token_axis(name)) for name, x in rows._asdict().items()}
    return rows._replace(**parts)


def write_rows(rows: Rows, part: Rows, start: jax.Array) -> Rows:
    """`rows` with its query tokens from `start` on replaced by those of `part`."""
    parts = {name: write_tokens(x, getattr(part, name), start, _token_axis(name)) for name, x in rows._asdict().items()}
    return rows._replace(**parts)


def _token_axis(field: str) -> int:
    return -1 if field in ("lse", "delta") else 1
