"""The tensor-parallel collectives of Megatron-LM, as functions that a model calls by name.

Each asks which mesh axes are manual where it is called (`shard_map` says so) and does nothing for the others. So the
same model runs on one device, under XLA's automatic partitioning, and with Megatron's minimum of collectives.

Sources: Shoeybi et al., 2019 (arXiv:1909.08053) for the tensor split; Korthikanti et al., 2022 (arXiv:2205.05198)
for sequence parallelism.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
MASKED = -1e30  # a logit that counts for nothing; finite, so that no NaN can come of it


def manual(*axes: str) -> tuple[str, ...]:
    """Those of `axes` that are manual here: () outside of `shard_map`."""
    return tuple(axis for axis in axes if axis in get_abstract_mesh().manual_axes)


def vocabulary_axes() -> tuple[str, ...]:
    """The axes that split the vocabulary where the tensor group is manual; otherwise XLA splits it."""
    return manual("pp", "tp", "sp") if manual("tp") else ()


_part: ContextVar[tuple[Any, int]] = ContextVar("part of the vocabulary", default=(0, 1))


@contextmanager
def vocabulary_part(index: Any, count: int) -> Iterator[None]:
    """Inside, tables and logits are part `index` of `count` of what this device has of the vocabulary."""
    token = _part.set((index, count))
    try:
        yield
    finally:
        _part.reset(token)


def vocabulary_columns(size: int, axes: tuple[str, ...]) -> jax.Array:
    """Token ids of this device's `size` rows or columns, int32 [size], where the manual `axes` split the vocabulary."""
    part, parts = _part.get()
    rank = lax.axis_index(axes) if axes else 0
    return (rank * parts + part) * size + jnp.arange(size)


def sum_over(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`lax.psum` over those of `axes` that are manual here."""
    return lax.psum(x, manual(*axes)) if manual(*axes) else x


def rank_and_size(axis: str) -> tuple[jax.Array | int, int]:
    """This device's place on a manual axis and the number of places; (0, 1) where the axis is not manual."""
    return (lax.axis_index(axis), lax.axis_size(axis)) if manual(axis) else (0, 1)


def varying_axes(x: Any) -> tuple[str, ...]:
    """The manual axes on which the value of `x` (an array or its shape) differs between devices, in the mesh's order: that
    of a set of names differs between processes, and so would their programs."""
    kind = jax.typeof(x).manual_axis_type if isinstance(x, jax.Array) else getattr(x, "manual_axis_type", None)
    return tuple(axis for axis in get_abstract_mesh().axis_names if axis in kind.varying) if kind else ()


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Mark `x` as differing between the devices of the manual ones of `axes`. Transposes to a sum over those on which
    it did not differ before."""
    missing = tuple(axis for axis in manual(*axes) if axis not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def zeros(like: Any, *leading: int, dtype: Any = None, space: Any = DEVICE) -> jax.Array:
    """Zeros [*leading, *like.shape] that differ between devices where `like` (an array or its shape) does.

    Args:
      space: the memory that they are made in.
    """
    zero = vary(jnp.zeros((), dtype or like.dtype), varying_axes(like))
    # Made there, not on the device and then sent. XLA warns that it will compute on the host; its program only allocates.
    return lax.broadcast(put_in(space, zero), (*leading, *like.shape))


def put_in(space: Any, x: jax.Array) -> jax.Array:
    """`x` in the memory of the device or of its host, inside `jax.jit`. A CPU has only one."""
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def gather_sequence(x: Float[Array, "batch seq embed"]) -> Float[Array, "batch full_seq embed"]:
    """Before column-parallel products: all-gather the sequence over sp (backward: reduce-scatter); over tp nothing
    (backward: all-reduce)."""
    axes = manual("sp")
    x = vary(x, ("tp",))  # here once, and not at each product: the transpose is the backward pass's all-reduce
    return lax.all_gather(x, axes, axis=1, tiled=True) if axes else x


def reduce_output(x: Float[Array, "batch full_seq embed"]) -> Float[Array, "batch seq embed"]:
    """After a row-parallel product: sum over tp, reduce-scatter of the sequence over sp (backward: all-gather)."""
    return _sum_and_split(x, ("tp",))


def vocab_parallel_embedding(
    table: Float[Array, "vocab_shard embed"], tokens: Int[Array, "batch full_seq"]
) -> Float[Array, "batch seq embed"]:
    """Look up rows of a table whose vocabulary is split over pp and the tensor group; sequence split over sp."""
    axes = vocabulary_axes()
    if not axes and _part.get()[1] == 1:
        return _lookup(table, tokens)
    row = tokens - vocabulary_columns(table.shape[0], axes)[0]
    held = (row >= 0) & (row < table.shape[0])
    x = jnp.where(held[..., None], _lookup(table, jnp.where(held, row, 0)), 0)
    return _sum_and_split(x, ("pp", "tp"))


def broadcast_from_last_stage(x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
    """The last pipeline stage's value, on all stages."""
    stage, stages = rank_and_size("pp")
    return sum_over(jnp.where(stage == stages - 1, x, 0), ("pp",))


def cross_entropy(
    logits: Float[Array, "batch seq vocab_shard"], targets: Int[Array, "batch seq"], axes: tuple[str, ...] = ()
) -> Float[Array, "batch seq"]:
    """-log softmax(logits)[target] of each token, in float32, in nats.

    Args:
      logits: any float dtype; where the vocabulary is split over the manual `axes`, this device's slice.
      targets: token ids in the whole vocabulary.
    """
    logits = logits.astype(jnp.float32)
    highest = lax.stop_gradient(logits).max(-1)
    if axes:
        highest = lax.pmax(highest, axes)
    total = jnp.exp(logits - highest[..., None]).sum(-1)
    # A comparison and a sum instead of an index: it splits over the vocabulary without communication.
    columns = vocabulary_columns(logits.shape[-1], axes)
    picked = jnp.where(columns == targets[..., None], logits, 0).sum(-1)
    if axes:
        total, picked = lax.psum((total, picked), axes)
    return highest + jnp.log(total) - picked


def mask_padded_vocabulary(logits: Float[Array, "... vocab_shard"], vocab_size: int) -> Float[Array, "... vocab_shard"]:
    """Give the rows that only pad the vocabulary no probability."""
    columns = vocabulary_columns(logits.shape[-1], vocabulary_axes())
    return jnp.where(columns < vocab_size, logits, MASKED)


def _sum_and_split(x: jax.Array, sum_axes: tuple[str, ...]) -> jax.Array:
    x = sum_over(x, sum_axes)
    if axes := manual("sp"):
        x = lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True)
    return x


@jax.custom_vjp
def _lookup(table: jax.Array, rows: jax.Array) -> jax.Array:
    """table[rows], whose gradient adds up in float32: a frequent token's would be lost in a bfloat16 sum."""
    return table[rows]


def _lookup_forward(table: jax.Array, rows: jax.Array):
    return table[rows], (table, rows)


def _lookup_backward(residuals, grad: jax.Array):
    table, rows = residuals
    total = jnp.zeros(table.shape, jnp.float32).at[rows].add(grad.astype(jnp.float32))
    return total.astype(table.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)
