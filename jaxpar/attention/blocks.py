"""A rank's share of the score matrix as a list of blocks. Every kind of context parallelism is built from these.

The backend named in the settings computes a block, unless its queries and keys have no document in common.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.attention import blockwise, flash
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
    merge_partials,
    slice_tokens,
    write_tokens,
    zero_grads,
)

BACKENDS = {"xla": blockwise, "pallas": flash}


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


def attend(spec: AttentionSpec, queries: Queries, keys: Keys, blocks: Blocks, partial: Partial) -> Partial:
    """Extends `partial` by the attention of these blocks."""

    def add_block(partial: Partial, block):
        (query_start, key_start), offset = block
        rows, columns = slice_tokens(queries, query_start, blocks.size), slice_tokens(keys, key_start, blocks.size)
        more = _block_forward(spec, rows, columns, offset)
        merged = merge_partials(slice_tokens(partial, query_start, blocks.size), more)
        return write_tokens(partial, merged, query_start)

    if blocks.starts is None:
        return merge_partials(partial, _block_forward(spec, queries, keys, blocks.offset))
    return _scan_blocks(add_block, partial, blocks)


def attend_backward(
    spec: AttentionSpec, queries: Queries, keys: Keys, blocks: Blocks, output_grads: OutputGrads, grads: Grads
) -> Grads:
    """Adds the gradients of these blocks to `grads`."""

    def add_block(grads: Grads, block):
        (query_start, key_start), offset = block
        rows = slice_tokens((queries, output_grads), query_start, blocks.size)
        columns = slice_tokens(keys, key_start, blocks.size)
        more = _block_backward(spec, rows[0], columns, offset, rows[1])
        return jax.tree.map(add_to_tokens, grads, more, Grads(query_start, key_start, key_start))

    if blocks.starts is None:
        return jax.tree.map(jnp.add, grads, _block_backward(spec, queries, keys, blocks.offset, output_grads))
    return _scan_blocks(add_block, grads, blocks)


def output_grads_of(grad: jax.Array, output: jax.Array, lse: jax.Array) -> OutputGrads:
    # The gradient of the softmax needs the row sums of grad · output (FlashAttention, arXiv:2205.14135, eq. 4).
    return OutputGrads(grad, lse, jnp.einsum("bqkgd,bqkgd->bqkg", grad, output, preferred_element_type=jnp.float32))


def _scan_blocks(add_block: Any, total: Any, blocks: Blocks) -> Any:
    own_offsets = isinstance(blocks.offset, jax.Array)

    def step(total: Any, block: Any):
        return add_block(total, block if own_offsets else (block, blocks.offset)), None

    return lax.scan(step, total, (blocks.starts, blocks.offset) if own_offsets else blocks.starts)[0]


def _block_forward(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset) -> Partial:
    return _if_documents_overlap(
        queries,
        keys,
        offset,
        lambda: BACKENDS[spec.backend].forward(spec, queries, keys, offset),
        lambda: empty_partial(queries.query),
    )


def _block_backward(
    spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset, output_grads: OutputGrads
) -> Grads:
    return _if_documents_overlap(
        queries,
        keys,
        offset,
        lambda: BACKENDS[spec.backend].backward(spec, queries, keys, offset, output_grads),
        lambda: zero_grads(queries, keys),
    )


def _if_documents_overlap(queries: Queries, keys: Keys, offset: Offset, compute: Any, empty: Any) -> Any:
    """compute(), or empty() where the ranges of document ids do not overlap.

    A block on the diagonal (its offset is an int) is always computed: its queries are its keys.
    """
    if queries.segments is None or keys.segments is None or isinstance(offset, int):
        return compute()
    overlap = (queries.segments.min() <= keys.segments.max()) & (keys.segments.min() <= queries.segments.max())
    return lax.cond(overlap, compute, empty)
