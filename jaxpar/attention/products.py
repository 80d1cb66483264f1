"""A rank's share of the score matrix, as a list of blocks: what each kind of context parallelism consists of.

A block goes to the backend that the settings name, unless its queries and keys have no document in common.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.attention import blockwise, flash
from jaxpar.attention.types import (
    Grads,
    Keys,
    Kind,
    Offset,
    OutputGrads,
    Partial,
    Queries,
    add_at,
    merge,
    no_grads,
    nothing,
    put,
    take,
)

BACKENDS = {"xla": blockwise, "pallas": flash}


class Products(NamedTuple):
    """Attributes:
    size: tokens on each side of a block.
    starts: int32 [blocks, 2], first query and first key of each in this device's arrays; None: one block of everything.
    offset: of all blocks, or int32 [blocks].
    """

    size: int
    starts: jax.Array | None
    offset: Offset


def attend(kind: Kind, queries: Queries, keys: Keys, products: Products, partial: Partial) -> Partial:
    """`partial` with the attention over more keys."""

    def one(partial: Partial, block):
        (query_start, key_start), offset = block
        more = _forward(kind, take(queries, query_start, products.size), take(keys, key_start, products.size), offset)
        return put(partial, merge(take(partial, query_start, products.size), more), query_start)

    if products.starts is None:
        return merge(partial, _forward(kind, queries, keys, products.offset))
    return _for_each(one, partial, products)


def attend_backward(
    kind: Kind, queries: Queries, keys: Keys, products: Products, output_grads: OutputGrads, grads: Grads
) -> Grads:
    """`grads` with what these blocks add."""

    def one(grads: Grads, block):
        (query_start, key_start), offset = block
        rows, columns = take((queries, output_grads), query_start, products.size), take(keys, key_start, products.size)
        more = _backward(kind, rows[0], columns, offset, rows[1])
        return jax.tree.map(add_at, grads, more, Grads(query_start, key_start, key_start))

    if products.starts is None:
        return jax.tree.map(jnp.add, grads, _backward(kind, queries, keys, products.offset, output_grads))
    return _for_each(one, grads, products)


def output_grads_of(grad: jax.Array, output: jax.Array, lse: jax.Array) -> OutputGrads:
    # The softmax's own gradient needs row sums of grad · output (FlashAttention, arXiv:2205.14135, eq. 4).
    return OutputGrads(grad, lse, jnp.einsum("bqkgd,bqkgd->bqkg", grad, output, preferred_element_type=jnp.float32))


def _for_each(one: Any, total: Any, products: Products) -> Any:
    each = isinstance(products.offset, jax.Array)

    def step(total: Any, block: Any):
        return one(total, block if each else (block, products.offset)), None

    return lax.scan(step, total, (products.starts, products.offset) if each else products.starts)[0]


def _forward(kind: Kind, queries: Queries, keys: Keys, offset: Offset) -> Partial:
    return _unless_apart(
        queries,
        keys,
        offset,
        lambda: BACKENDS[kind.backend].forward(kind, queries, keys, offset),
        lambda: nothing(queries.query),
    )


def _backward(kind: Kind, queries: Queries, keys: Keys, offset: Offset, output_grads: OutputGrads) -> Grads:
    return _unless_apart(
        queries,
        keys,
        offset,
        lambda: BACKENDS[kind.backend].backward(kind, queries, keys, offset, output_grads),
        lambda: no_grads(queries, keys),
    )


def _unless_apart(queries: Queries, keys: Keys, offset: Offset, compute: Any, empty: Any) -> Any:
    """Nothing is computed where the ranges of document ids do not overlap. A block on the diagonal always is: its
    queries are its keys."""
    if queries.segments is None or keys.segments is None or isinstance(offset, int):
        return compute()
    meet = (queries.segments.min() <= keys.segments.max()) & (keys.segments.min() <= queries.segments.max())
    return lax.cond(meet, compute, empty)
