"""A rank's share of the score matrix as a list of blocks. Every kind of context parallelism is built from these.

The kernel that `choose` names computes a block, unless its queries and keys have no document in common.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.attention.choose import kernel_for
from jaxpar.attention.types import (
    AttentionSpec,
    Grads,
    Keys,
    Offset,
    OutputGrads,
    Partial,
    Queries,
    add_to_tokens,
    empty_partial,
    in_float32,
    merge_partials,
    slice_rows,
    slice_tokens,
    write_rows,
    zero_grads,
)


class Blocks(NamedTuple):
    """Square blocks of one size, as indices into this device's arrays.

    Attributes:
      size: tokens along each side of a block.
      starts: int32 [blocks, 2], first query and first key of each block; None: one block of everything.
      offset: the offset of all blocks, or int32 [blocks].
    """

    size: int
    starts: jax.Array | None
    offset: Offset


def attend(spec: AttentionSpec, queries: Queries, keys: Keys, blocks: Blocks, partial: Partial | None) -> Partial:
    """Extends `partial` by the attention of these blocks. None: there is nothing yet, and one block of everything stays as
    its kernel made it."""

    def add_block(partial: Partial, block: Any) -> Partial:
        (query_start, key_start), offset = block
        rows, columns = slice_rows(queries, query_start, blocks.size), slice_tokens(keys, key_start, blocks.size)
        more = _block_forward(spec, rows, columns, offset)
        merged = merge_partials(slice_rows(partial, query_start, blocks.size), more)
        return write_rows(partial, merged, query_start)

    if blocks.starts is None:
        more = _block_forward(spec, queries, keys, blocks.offset)
        return more if partial is None else merge_partials(partial, more)
    return _scan_blocks(add_block, empty_partial(queries.query, keys.value) if partial is None else partial, blocks)


def attend_backward(
    spec: AttentionSpec, queries: Queries, keys: Keys, blocks: Blocks, output_grads: OutputGrads, grads: Grads | None
) -> Grads:
    """Adds the gradients of these blocks to `grads`. None: as in `attend`."""

    def add_block(grads: Grads, block: Any) -> Grads:
        (query_start, key_start), offset = block
        rows, columns = slice_rows(queries, query_start, blocks.size), slice_tokens(keys, key_start, blocks.size)
        more = _block_backward(spec, rows, columns, offset, slice_rows(output_grads, query_start, blocks.size))
        return jax.tree.map(add_to_tokens, grads, more, Grads(query_start, key_start, key_start))

    if blocks.starts is None:
        more = _block_backward(spec, queries, keys, blocks.offset, output_grads)
        return more if grads is None else jax.tree.map(jnp.add, grads, more)
    return _scan_blocks(add_block, zero_grads(queries, keys) if grads is None else grads, blocks)


def output_grads_of(grad: jax.Array, output: jax.Array, lse: jax.Array) -> OutputGrads:
    # The gradient of the softmax needs the row sums of grad · output (FlashAttention, arXiv:2205.14135, eq. 4).
    delta = jnp.einsum("bqkgd,bqkgd->bkgq", grad, output, preferred_element_type=jnp.float32)
    return OutputGrads(grad, output, lse, delta)


def _scan_blocks(add_block: Any, total: Any, blocks: Blocks) -> Any:
    own_offsets = isinstance(blocks.offset, jax.Array)

    def step(total: Any, block: Any):
        return add_block(total, block if own_offsets else (block, blocks.offset)), None

    return lax.scan(step, total, (blocks.starts, blocks.offset) if own_offsets else blocks.starts)[0]


def _block_forward(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset) -> Partial:
    kernel = kernel_for(spec, queries, keys, offset)
    compute = lambda: kernel.forward(spec, queries, keys, offset)  # noqa: E731
    return _if_documents_overlap(queries, keys, offset, compute, lambda: empty_partial(queries.query, keys.value))


def _block_backward(
    spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset, output_grads: OutputGrads
) -> Grads:
    kernel = kernel_for(spec, queries, keys, offset)
    compute = lambda: kernel.backward(spec, queries, keys, offset, output_grads)  # noqa: E731
    return _if_documents_overlap(queries, keys, offset, compute, lambda: zero_grads(queries, keys))


def _if_documents_overlap(queries: Queries, keys: Keys, offset: Offset, compute: Any, empty: Any) -> Any:
    """compute(), or empty() where the ranges of document ids do not overlap.

    A block on the diagonal (its offset is an int) is always computed: its queries are its keys.
    """
    if queries.segments is None or keys.segments is None or isinstance(offset, int):
        return compute()
    overlap = (queries.segments.min() <= keys.segments.max()) & (keys.segments.min() <= queries.segments.max())
    return lax.cond(overlap, lambda: in_float32(compute()), empty)
