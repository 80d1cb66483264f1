"""A product of some queries with some keys in plain JAX, tile by tile: the scores of one tile exist at a time.

Tiles that the mask empties are not computed, and tiles that it leaves whole compute no mask. The backward pass follows
Dao et al., 2022, FlashAttention (arXiv:2205.14135), algorithm 4.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.attention.mask import attention_mask
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
    tie,
)
from jaxpar.parallel.collectives import MASKED

MAX_TILE, MIN_TILE = 1024, 128  # tokens
TOKENS = 3  # the tokens' dimension in here, see _inside
TRIANGLE_TILES = 16  # along each side, within these limits: of a causal square 1/2 + 1/32 is computed


def forward(kind: Kind, queries: Queries, keys: Keys, offset: Offset) -> Partial:
    def add(partial: Partial, more: Partial, query_start: jax.Array, _: jax.Array) -> Partial:
        before = take(partial, query_start, more.lse.shape[TOKENS], TOKENS)
        return put(partial, merge(before, more), query_start, TOKENS)

    functions = _Functions(_tile_forward, lambda queries, _: nothing(queries.query), add)
    partial = _over_tiles(kind, _inside(queries), _inside(keys), offset, functions)
    return Partial(*(jnp.moveaxis(x, TOKENS, 1) for x in partial))


def backward(kind: Kind, queries: Queries, keys: Keys, offset: Offset, output_grads: OutputGrads) -> Grads:
    def compute(kind: Kind, rows: tuple[Queries, OutputGrads], keys: Keys, offset: Offset) -> Grads:
        return _tile_backward(kind, rows[0], keys, offset, rows[1])

    def add(grads: Grads, more: Grads, query_start: jax.Array, key_start: jax.Array) -> Grads:
        starts = Grads(query_start, key_start, key_start)
        return jax.tree.map(lambda total, more, start: add_at(total, more, start, TOKENS), grads, more, starts)

    functions = _Functions(compute, lambda rows, keys: no_grads(rows[0], keys), add)
    rows = _inside(queries), _inside(output_grads)
    grads = _over_tiles(kind, rows, _inside(keys), offset, functions)
    query, key, value = (jnp.moveaxis(x, TOKENS, 1) for x in grads)
    return Grads(query, key[:, :, :, 0], value[:, :, :, 0])


def _inside(tree: Any) -> Any:
    """In here heads come first, as products want them: [b, k, g, q, d], keys [b, k, 1, s, d], segments [b, 1, 1, tokens].
    Turned round once, and not for each tile."""

    def move(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 1, TOKENS)

    if isinstance(tree, Keys):
        segments = None if tree.segments is None else tree.segments[:, None, None]
        return Keys(move(tree.key[:, :, :, None]), move(tree.value[:, :, :, None]), segments)
    if isinstance(tree, Queries):
        return Queries(move(tree.query), None if tree.segments is None else tree.segments[:, None, None])
    return jax.tree.map(move, tree)


class _Functions(NamedTuple):
    compute: Callable[[Kind, Any, Keys, Offset], Any]  # kind, query side, key side, offset of a tile → its result
    empty: Callable[[Any, Keys], Any]  # query side, key side → the result where there is nothing to do
    add: Callable[[Any, Any, jax.Array, jax.Array], Any]  # total, result, first query, first key → total


def _over_tiles(kind: Kind, rows: Any, keys: Keys, offset: Offset, functions: _Functions) -> Any:
    """Adds up all tiles that the mask leaves something of. `rows`: all that has a query dimension."""
    sides = jax.tree.leaves(rows)[0].shape[TOKENS], keys.key.shape[TOKENS]
    sizes = tile_size(sides[0], masked=offset is not None), tile_size(sides[1], masked=offset is not None)
    columns = sides[1] // sizes[1]
    tiles = np.arange(sides[0] // sizes[0] * columns)  # the tiles of a query in a row

    def corner(tile: Any) -> tuple[Any, Any]:
        return tile // columns * sizes[0], tile % columns * sizes[1]

    def leaves(tile: Any) -> tuple[Any, Any]:
        query_start, key_start = corner(tile)
        return mask_leaves(kind, offset + query_start - key_start, sizes)

    def step(masked: bool, total: Any, tile: jax.Array):
        query_start, key_start = corner(tile)
        args = kind, take(rows, query_start, sizes[0], TOKENS), take(keys, key_start, sizes[1], TOKENS)
        if not masked:
            result = functions.compute(*args, None)
        elif isinstance(offset, jax.Array):
            compute = lambda: functions.compute(*args, offset + query_start - key_start)  # noqa: E731
            result = lax.cond(leaves(tile)[0], compute, lambda: functions.empty(*args[1:]))
        else:
            assert offset is not None
            result = functions.compute(*args, offset + query_start - key_start)
        return functions.add(total, result, query_start, key_start), None

    total = functions.empty(rows, keys)
    if offset is None or isinstance(offset, jax.Array):
        return lax.scan(functools.partial(step, offset is not None), total, jnp.arange(len(tiles)))[0]
    for masked in (False, True):
        # The list is made in the program: a constant array would be one more thing that the backward pass keeps.
        chosen = lambda tile, masked=masked: leaves(tile)[0] & ~leaves(tile)[1] if masked else leaves(tile)[1]  # noqa: E731
        if number := chosen(tiles).sum():
            index = jnp.arange(len(tiles))
            index = jnp.sort(jnp.where(chosen(index), index, len(tiles)))[:number]
            total, _ = lax.scan(functools.partial(step, masked), total, index)
    return total


def mask_leaves(kind: Kind, offset: Any, sizes: tuple[int, int]) -> tuple[Any, Any]:
    """Whether the mask leaves something of a block of (queries, keys) at `offset`, and whether it leaves all."""
    nearest, farthest = offset - (sizes[1] - 1), offset + (sizes[0] - 1)
    some, all_ = offset == offset, offset == offset
    if kind.causal:
        some, all_ = some & (farthest >= 0), all_ & (nearest >= 0)
    if kind.window is not None:
        some, all_ = some & (nearest < kind.window), all_ & (farthest < kind.window)
    return some, all_


def tile_size(tokens: int, *, masked: bool) -> int:
    """The largest that divides `tokens` and keeps the limits, or all tokens where that would be far too small."""
    wanted = min(tokens, MAX_TILE, max(MIN_TILE, tokens // TRIANGLE_TILES) if masked else MAX_TILE)
    size = next(size for size in range(wanted, 0, -1) if tokens % size == 0)
    return size if 4 * size >= wanted else tokens


def _scores(kind: Kind, queries: Queries, keys: Keys, distance: jax.Array | None):
    """Scaled scores of a tile, float32 [b, k, g, q, s], and its mask [b or 1, 1, 1, q, s] or None."""
    scores = _product("bkgqd,bksd->bkgqs", queries.query, keys.key[:, :, 0]) * kind.scale
    if distance is None and queries.segments is None:
        return scores, None
    places = distance is not None
    query_index = jnp.arange(scores.shape[-2]) + (tie(distance, queries.query) if places else 0)
    mask = attention_mask(
        query_index,
        jnp.arange(scores.shape[-1]),
        None if queries.segments is None else queries.segments[:, 0, 0],
        None if keys.segments is None else keys.segments[:, 0, 0],
        causal=kind.causal and places,
        window=kind.window if places else None,
    )
    return scores, mask[:, None, None]


def _masked(mask: jax.Array | None, x: jax.Array, other: float) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, other)


def _tile_forward(kind: Kind, queries: Queries, keys: Keys, distance) -> Partial:
    scores, mask = _scores(kind, queries, keys, distance)
    highest = _masked(mask, scores, MASKED).max(-1, keepdims=True)
    weights = _masked(mask, jnp.exp(scores - highest), 0)
    total = jnp.maximum(weights.sum(-1), 1e-30)  # a fully masked row: output 0, log-sum-exp about MASKED
    output = _product("bkgqs,bksd->bkgqd", weights.astype(keys.value.dtype), keys.value[:, :, 0])
    return Partial(output / total[..., None], highest[..., 0] + jnp.log(total))


def _tile_backward(kind: Kind, queries: Queries, keys: Keys, distance, of: OutputGrads) -> Grads:
    scores, mask = _scores(kind, queries, keys, distance)
    weights = _masked(mask, jnp.exp(scores - of.lse[..., None]), 0)
    weights_grad = _product("bkgqd,bksd->bkgqs", of.grad, keys.value[:, :, 0])
    scores_grad = (weights * (weights_grad - of.delta[..., None]) * kind.scale).astype(queries.query.dtype)
    weights = weights.astype(queries.query.dtype)
    return Grads(
        query=_product("bkgqs,bksd->bkgqd", scores_grad, keys.key[:, :, 0]),
        key=_product("bkgqs,bkgqd->bksd", scores_grad, queries.query)[:, :, None],
        value=_product("bkgqs,bkgqd->bksd", weights, of.grad)[:, :, None],
    )


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
