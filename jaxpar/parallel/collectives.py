"""Megatron-LM's tensor-parallel collectives, as functions that a model calls by name.

Each function looks up which mesh axes are manual where it is called (that is, inside `shard_map`) and does nothing for
the others. So the same model runs on one device, under XLA's automatic partitioning, and with Megatron's minimum of
collectives.

Sources: Shoeybi et al., 2019 (arXiv:1909.08053) for the tensor split; Korthikanti et al., 2022 (arXiv:2205.05198)
for sequence parallelism.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
MASKED = -1e30  # a logit that has no weight; finite, so that it cannot lead to a NaN


def manual(*axes: str) -> tuple[str, ...]:
    """The members of `axes` that are manual axes here; () outside of `shard_map`."""
    return tuple(axis for axis in axes if axis in get_abstract_mesh().manual_axes)


def vocabulary_axes() -> tuple[str, ...]:
    """The axes that split the vocabulary if the tensor group is manual; () if XLA splits it."""
    return manual("pp", "tp", "sp") if manual("tp") else ()


@dataclass(frozen=True)
class VocabularyPart:
    """Part `index` of `count` equal parts of what this device holds of the vocabulary. `index` may be traced."""

    index: Any = 0
    count: int = 1


WHOLE = VocabularyPart()


def vocabulary_columns(size: int, axes: tuple[str, ...], part: VocabularyPart = WHOLE) -> jax.Array:
    """The token ids of this device's `size` rows or columns, int32 [size], if the manual `axes` split the vocabulary."""
    rank = lax.axis_index(axes) if axes else 0
    return (rank * part.count + part.index) * size + jnp.arange(size)


def sum_over(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`lax.psum` over the members of `axes` that are manual here."""
    return lax.psum(x, manual(*axes)) if manual(*axes) else x


def rank_and_size(axis: str) -> tuple[jax.Array | int, int]:
    """This device's index along a manual axis and the axis's size; (0, 1) if the axis is not manual."""
    return (lax.axis_index(axis), lax.axis_size(axis)) if manual(axis) else (0, 1)


def varying_axes(x: Any) -> tuple[str, ...]:
    """The manual axes along which the value of `x` (an array or its shape) differs between devices.

    They are in the mesh's order. The order of a set of names differs between processes, and their programs would too.
    """
    kind = jax.typeof(x).manual_axis_type if isinstance(x, jax.Array) else getattr(x, "manual_axis_type", None)
    return tuple(axis for axis in get_abstract_mesh().axis_names if axis in kind.varying) if kind else ()


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Marks `x` as differing between devices along the manual members of `axes`. The transpose is a sum over the axes
    along which it did not differ before."""
    missing = tuple(axis for axis in manual(*axes) if axis not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def zeros(like: Any, *leading: int, dtype: Any = None, space: Any = DEVICE) -> jax.Array:
    """Zeros [*leading, *like.shape], marked as varying like `like` (an array or its shape).

    Args:
      space: the memory in which they are made.
    """
    zero = vary(jnp.zeros((), dtype or like.dtype), varying_axes(like))
    # Made in that memory, not on the device and then sent. XLA warns of computation on the host; its program only
    # allocates.
    return lax.broadcast(put_in(space, zero), (*leading, *like.shape))


def put_in(space: Any, x: jax.Array) -> jax.Array:
    """Moves `x` to the memory of the device or of its host, inside `jax.jit`. A CPU has only one memory."""
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def gather_sequence(x: Float[Array, "batch seq embed"]) -> Float[Array, "batch full_seq embed"]:
    """Called before column-parallel products: all-gathers the sequence over sp (backward: reduce-scatter). Over tp it
    does nothing (backward: all-reduce)."""
    axes = manual("sp")
    x = vary(x, ("tp",))  # once, not at each product: the transpose is the all-reduce of the backward pass
    return lax.all_gather(x, axes, axis=1, tiled=True) if axes else x


def reduce_output(x: Float[Array, "batch full_seq embed"]) -> Float[Array, "batch seq embed"]:
    """Called after a row-parallel product: sums over tp, or reduce-scatters the sequence over sp (backward:
    all-gather)."""
    return _sum_and_split(x, ("tp",))


def vocab_parallel_embedding(
    table: Float[Array, "vocab_shard embed"], tokens: Int[Array, "batch full_seq"], part: VocabularyPart = WHOLE
) -> Float[Array, "batch seq embed"]:
    """Looks up rows of a table whose vocabulary is split over pp and the tensor group. The result's sequence is split
    over sp.

    Args:
      part: the part of this device's vocabulary that `table` holds. Tokens outside of it get zeros.
    """
    axes = vocabulary_axes()
    if not axes and part.count == 1:
        return _lookup(table, tokens)
    row = tokens - vocabulary_columns(table.shape[0], axes, part)[0]
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
    """-log softmax(logits)[target] of each token, float32, in nats.

    Args:
      logits: any float dtype. If the manual `axes` split the vocabulary, this device's slice of it.
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


def mask_padded_vocabulary(
    logits: Float[Array, "... vocab_shard"], vocab_size: int, part: VocabularyPart = WHOLE
) -> Float[Array, "... vocab_shard"]:
    """Gives no probability to the columns that only pad the vocabulary."""
    columns = vocabulary_columns(logits.shape[-1], vocabulary_axes(), part)
    return jnp.where(columns < vocab_size, logits, MASKED)


def _sum_and_split(x: jax.Array, sum_axes: tuple[str, ...]) -> jax.Array:
    x = sum_over(x, sum_axes)
    if axes := manual("sp"):
        x = lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True)
    return x


@jax.custom_vjp
def _lookup(table: jax.Array, rows: jax.Array) -> jax.Array:
    """table[rows]. Its gradient is summed in float32, because in bfloat16 a frequent token's would be lost."""
    return table[rows]


def _lookup_forward(table: jax.Array, rows: jax.Array):
    return table[rows], (table, rows)


def _lookup_backward(residuals, grad: jax.Array):
    table, rows = residuals
    total = jnp.zeros(table.shape, jnp.float32).at[rows].add(grad.astype(jnp.float32))
    return total.astype(table.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)
