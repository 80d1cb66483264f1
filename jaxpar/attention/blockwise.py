"""The backend `xla`: attention of one block in plain JAX, tile by tile. Only one tile's scores exist at a time.

Tiles that are masked completely are not computed, and tiles that are not masked at all are computed without a mask. The
backward pass follows Dao et al., 2022, FlashAttention (arXiv:2205.14135), algorithm 4.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.attention.mask import attention_mask
from jaxpar.attention.settings import Backend
from jaxpar.attention.types import (
    AttentionSpec,
    BlockNeeds,
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
    tie_to_data,
    write_tokens,
    zero_grads,
)
from jaxpar.parallel.collectives import MASKED

MAX_TILE, MIN_TILE = 1024, 128  # tokens
TOKEN_AXIS = 3  # the tokens' dimension in this file, see _heads_first
# Tiles along each side of a masked block, within these limits: 1/2 + 1/32 of a causal square is computed.
TRIANGLE_TILES = 16


def problem(backend: Backend, needs: BlockNeeds) -> None:
    """Plain JAX computes any block."""


def forward(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset) -> Partial:
    def add(partial: Partial, more: Partial, query_start: jax.Array, _: jax.Array) -> Partial:
        before = slice_tokens(partial, query_start, more.lse.shape[TOKEN_AXIS], TOKEN_AXIS)
        merged = merge_partials(before, more, TOKEN_AXIS)
        return jax.tree.map(lambda x, part: write_tokens(x, part, query_start, TOKEN_AXIS), partial, merged)

    steps = _TileSteps(_tile_forward, lambda queries, keys: empty_partial(queries.query, keys.value, TOKEN_AXIS), add)
    partial = _accumulate_tiles(spec, _heads_first(queries), _heads_first(keys), offset, steps)
    return Partial(jnp.moveaxis(partial.output, TOKEN_AXIS, 1), partial.lse)


def backward(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset, output_grads: OutputGrads) -> Grads:
    def compute(spec: AttentionSpec, rows: tuple[Queries, OutputGrads], keys: Keys, offset: Offset) -> Grads:
        return _tile_backward(spec, rows[0], keys, offset, rows[1])

    def add(grads: Grads, more: Grads, query_start: jax.Array, key_start: jax.Array) -> Grads:
        starts = Grads(query_start, key_start, key_start)
        return jax.tree.map(
            lambda total, more, start: add_to_tokens(total, more, start, TOKEN_AXIS), grads, more, starts
        )

    steps = _TileSteps(compute, lambda rows, keys: zero_grads(rows[0], keys), add)
    rows = _heads_first(queries), _heads_first(output_grads)
    grads = _accumulate_tiles(spec, rows, _heads_first(keys), offset, steps)
    query, key, value = (jnp.moveaxis(x, TOKEN_AXIS, 1) for x in grads)
    return Grads(query, key[:, :, :, 0], value[:, :, :, 0])


def _heads_first(tree: Any) -> Any:
    """Moves heads before tokens, as matrix products want them. Done once, not for each tile.

    Queries become [b, k, g, q, d], keys and values [b, k, 1, s, d], segments [b, 1, 1, tokens]. Statistics, which have four
    dimensions, are so already.
    """

    def move(x: jax.Array) -> jax.Array:
        return x if x.ndim == 4 else jnp.moveaxis(x, 1, TOKEN_AXIS)

    if isinstance(tree, Keys):
        segments = None if tree.segments is None else tree.segments[:, None, None]
        return Keys(move(tree.key[:, :, :, None]), move(tree.value[:, :, :, None]), segments)
    if isinstance(tree, Queries):
        return Queries(move(tree.query), None if tree.segments is None else tree.segments[:, None, None])
    return jax.tree.map(move, tree)


class _TileSteps(NamedTuple):
    """What the forward or backward pass does with each tile. `rows` are all arrays with a query dimension."""

    compute: Callable[[AttentionSpec, Any, Keys, Offset], Any]  # spec, rows, keys, offset of a tile → its result
    empty: Callable[[Any, Keys], Any]  # rows, keys → the result of a tile that is masked completely
    add: Callable[[Any, Any, jax.Array, jax.Array], Any]  # total, result, first query, first key → total


def _accumulate_tiles(spec: AttentionSpec, rows: Any, keys: Keys, offset: Offset, steps: _TileSteps) -> Any:
    """The total over all tiles that are not masked completely. `rows`: all arrays with a query dimension."""
    sides = jax.tree.leaves(rows)[0].shape[TOKEN_AXIS], keys.key.shape[TOKEN_AXIS]
    sizes = tile_size(sides[0], masked=offset is not None), tile_size(sides[1], masked=offset is not None)
    columns = sides[1] // sizes[1]
    tiles = np.arange(sides[0] // sizes[0] * columns)  # row by row

    def tile_start(tile: Any) -> tuple[Any, Any]:
        return tile // columns * sizes[0], tile % columns * sizes[1]

    def coverage(tile: Any) -> tuple[Any, Any]:
        query_start, key_start = tile_start(tile)
        return mask_coverage(spec, offset + query_start - key_start, sizes)

    def step(masked: bool, total: Any, tile: jax.Array):
        query_start, key_start = tile_start(tile)
        tile_rows = slice_tokens(rows, query_start, sizes[0], TOKEN_AXIS)
        args = spec, tile_rows, slice_tokens(keys, key_start, sizes[1], TOKEN_AXIS)
        if not masked:
            result = steps.compute(*args, None)
        elif isinstance(offset, jax.Array):
            compute = lambda: steps.compute(*args, offset + query_start - key_start)  # noqa: E731
            result = lax.cond(coverage(tile)[0], compute, lambda: steps.empty(*args[1:]))
        else:
            assert offset is not None
            result = steps.compute(*args, offset + query_start - key_start)
        return steps.add(total, result, query_start, key_start), None

    total = steps.empty(rows, keys)
    if offset is None or isinstance(offset, jax.Array):
        return lax.scan(functools.partial(step, offset is not None), total, jnp.arange(len(tiles)))[0]

    def chosen(masked: bool, tile: Any) -> Any:
        return coverage(tile)[0] & ~coverage(tile)[1] if masked else coverage(tile)[1]

    for masked in (False, True):
        # The list is computed in the program: the backward pass would have to keep a constant array.
        if number := chosen(masked, tiles).sum():
            index = jnp.arange(len(tiles))
            index = jnp.sort(jnp.where(chosen(masked, index), index, len(tiles)))[:number]
            total, _ = lax.scan(functools.partial(step, masked), total, index)
    return total


def mask_coverage(spec: AttentionSpec, offset: Any, sizes: tuple[int, int]) -> tuple[Any, Any]:
    """Of a block of sizes (queries, keys) at `offset`: whether the mask allows any pair, and whether it allows all."""
    nearest, farthest = offset - (sizes[1] - 1), offset + (sizes[0] - 1)
    some, all_ = offset == offset, offset == offset
    if spec.causal:
        some, all_ = some & (farthest >= 0), all_ & (nearest >= 0)
    if spec.window is not None:
        some, all_ = some & (nearest < spec.window), all_ & (farthest < spec.window)
    return some, all_


def tile_size(tokens: int, *, masked: bool) -> int:
    """The largest tile that divides `tokens` and is within the limits; `tokens` itself if that would be far too small."""
    wanted = min(tokens, MAX_TILE, max(MIN_TILE, tokens // TRIANGLE_TILES) if masked else MAX_TILE)
    size = next(size for size in range(wanted, 0, -1) if tokens % size == 0)
    return size if 4 * size >= wanted else tokens


def _scores(spec: AttentionSpec, queries: Queries, keys: Keys, distance: jax.Array | None):
    """Scores of a tile, scaled and capped, float32 [b, k, g, q, s], and its mask [b or 1, 1, 1, q, s] or None."""
    scores = _product("bkgqd,bksd->bkgqs", queries.query, keys.key[:, :, 0]) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    if distance is None and queries.segments is None:
        return scores, None
    indices_matter = distance is not None
    query_index = jnp.arange(scores.shape[-2]) + (tie_to_data(distance, queries.query) if indices_matter else 0)
    mask = attention_mask(
        query_index,
        jnp.arange(scores.shape[-1]),
        None if queries.segments is None else queries.segments[:, 0, 0],
        None if keys.segments is None else keys.segments[:, 0, 0],
        causal=spec.causal and indices_matter,
        window=spec.window if indices_matter else None,
    )
    return scores, mask[:, None, None]


def _masked(mask: jax.Array | None, x: jax.Array, other: float) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, other)


def _tile_forward(spec: AttentionSpec, queries: Queries, keys: Keys, distance) -> Partial:
    scores, mask = _scores(spec, queries, keys, distance)
    highest = _masked(mask, scores, MASKED).max(-1, keepdims=True)
    weights = _masked(mask, jnp.exp(scores - highest), 0)
    total = jnp.maximum(weights.sum(-1), 1e-30)  # a fully masked row has output 0 and a log-sum-exp of about MASKED
    output = _product("bkgqs,bksd->bkgqd", weights.astype(keys.value.dtype), keys.value[:, :, 0])
    return Partial(output / total[..., None], highest[..., 0] + jnp.log(total))


def _tile_backward(spec: AttentionSpec, queries: Queries, keys: Keys, distance, output_grads: OutputGrads) -> Grads:
    scores, mask = _scores(spec, queries, keys, distance)
    weights = _masked(mask, jnp.exp(scores - output_grads.lse[..., None]), 0)
    weights_grad = _product("bkgqd,bksd->bkgqs", output_grads.grad, keys.value[:, :, 0])
    scores_grad = weights * (weights_grad - output_grads.delta[..., None]) * spec.scale
    if spec.soft_cap is not None:
        scores_grad *= 1 - (scores / spec.soft_cap) ** 2  # the derivative of tanh
    scores_grad = scores_grad.astype(queries.query.dtype)
    weights = weights.astype(queries.query.dtype)
    return Grads(
        query=_product("bkgqs,bksd->bkgqd", scores_grad, keys.key[:, :, 0]),
        key=_product("bkgqs,bkgqd->bksd", scores_grad, queries.query)[:, :, None],
        value=_product("bkgqs,bkgqd->bksd", weights, output_grads.grad)[:, :, None],
    )


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
