"""What one program of a flash kernel's grid does (see flash.py for the grid).

A program holds a tile of queries and walks over the keys; for the gradients of the keys it is the other way round.
Arguments are Pallas references to the tile that the program holds, or to everything that it walks over. Segments and
offset are None if there are none.
"""

import abc
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxpar.attention.types import AttentionSpec
from jaxpar.parallel.collectives import MASKED

LOG2_E = math.log2(math.e)  # exponentials have base 2, as in the hardware


def forward_kernel(query, key, value, query_segments, key_segments, offset, output, lse, *, spec: AttentionSpec, tiles):
    held = _HeldQueries(spec, tiles, offset, query_segments, key_segments)
    q = query[...]

    def attend(tile, carry, masked):
        total, highest, weight = carry
        columns = pl.ds(tile * tiles[1], tiles[1])
        scores = plgpu.dot(q, key[columns, :].T) * (spec.scale * LOG2_E)
        mask = held.mask(tile, masked)
        now = jnp.maximum(highest, _where(mask, scores, MASKED).max(-1))
        weights, shrink = _where(mask, jnp.exp2(scores - now[:, None]), 0.0), jnp.exp2(highest - now)
        v = value[columns, :]
        total = total * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return total, now, weight * shrink + weights.sum(-1)

    start = (jnp.zeros(q.shape, jnp.float32), jnp.full((tiles[0],), MASKED), jnp.zeros((tiles[0],), jnp.float32))
    total, highest, weight = held.walk(attend, start, key.shape[0] // tiles[1])
    weight = jnp.maximum(weight, 1e-30)
    output[...] = total / weight[:, None]
    lse[...] = (highest + jnp.log2(weight)) / LOG2_E


def query_grad_kernel(
    query, key, value, grad, lse, delta, query_segments, key_segments, offset, query_grad, *, spec: AttentionSpec, tiles
):
    held = _HeldQueries(spec, tiles, offset, query_segments, key_segments)
    q, do, lse_, delta_ = query[...], grad[...], lse[...], delta[...]

    def attend(tile, total, masked):
        columns = pl.ds(tile * tiles[1], tiles[1])
        k, v = key[columns, :], value[columns, :]
        mask = held.mask(tile, masked)
        _, scores_grad = _scores_grad(spec, q, k, v, do, lse_, delta_, mask)
        return total + plgpu.dot(scores_grad.astype(k.dtype), k)

    query_grad[...] = held.walk(attend, jnp.zeros(q.shape, jnp.float32), key.shape[0] // tiles[1])


def key_grad_kernel(
    query,
    key,
    value,
    grad,
    lse,
    delta,
    query_segments,
    key_segments,
    offset,
    key_grad,
    value_grad,
    *,
    spec: AttentionSpec,
    tiles,
):
    held = _HeldKeys(spec, tiles, offset, query_segments, key_segments)
    k, v = key[...], value[...]

    def attend(head, tile, carry, masked):
        key_total, value_total = carry
        rows = pl.ds(tile * tiles[0], tiles[0])
        q, do = query[rows, head, :], grad[rows, head, :]
        mask = held.mask(tile, masked)
        weights, scores_grad = _scores_grad(spec, q, k, v, do, lse[rows, head], delta[rows, head], mask)
        key_total += plgpu.dot(scores_grad.astype(q.dtype).T, q)
        return key_total, value_total + plgpu.dot(weights.astype(do.dtype).T, do)

    def one_head(head, carry):
        return held.walk(functools.partial(attend, head), carry, query.shape[0] // tiles[0])

    zeros = jnp.zeros(k.shape, jnp.float32)
    key_grad[...], value_grad[...] = lax.fori_loop(0, query.shape[1], one_head, (zeros, zeros))


def _scores_grad(spec: AttentionSpec, q, k, v, do, lse, delta, mask) -> tuple[jax.Array, jax.Array]:
    """The weights of a tile and the gradient of its scores, each [q, s]."""
    scores = plgpu.dot(q, k.T) * (spec.scale * LOG2_E)
    weights = _where(mask, jnp.exp2(scores - lse[:, None] * LOG2_E), 0.0)
    return weights, weights * (plgpu.dot(do, v.T) - delta[:, None]) * spec.scale


def _where(mask: jax.Array | None, x: jax.Array, other: float) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, other)


class _HeldTile(abc.ABC):
    """The tile that this program holds, and the walk over the tiles of the other side.

    Attributes:
      side: whether the tile is of queries (0) or of keys (1).
    """

    side: int

    def __init__(self, spec: AttentionSpec, tiles: tuple[int, int], offset, query_segments, key_segments):
        self.spec, self.tiles = spec, tiles
        self.start = pl.program_id(2) * tiles[self.side]
        self.offset: Any = None if offset is None else offset[0]
        self.held_segments, self.other_segments = (query_segments, key_segments)[:: 1 if self.side == 0 else -1]

    @abc.abstractmethod
    def ranges(self, number: int) -> list[tuple[Any, Any, bool]]:
        """The walk as ranges (first, end, masked) of the `number` tiles of the other side."""

    def walk(self, attend: Any, carry: Any, number: int) -> Any:
        """Calls attend(tile, carry, masked) → carry for each tile whose document ids overlap the held ones."""

        def step(masked: bool, tile: jax.Array, carry: Any) -> Any:
            if self.held_segments is None:
                return attend(tile, carry, masked)
            held, other = self.held_segments[...], self._segments(tile)
            overlap = (held.min() <= other.max()) & (other.min() <= held.max())
            return lax.cond(overlap, lambda: attend(tile, carry, masked), lambda: carry)

        for first, end, masked in [(0, number, False)] if self.offset is None else self.ranges(number):
            carry = lax.fori_loop(first, end, functools.partial(step, masked), carry)
        return carry

    def mask(self, tile: jax.Array, masked: bool) -> jax.Array | None:
        """The mask of a tile, bool [q, s]; None: nothing is masked."""
        mask = None
        if masked:
            starts = (self.start, tile * self.tiles[1]) if self.side == 0 else (tile * self.tiles[0], self.start)
            rows, columns = (lax.broadcasted_iota(jnp.int32, self.tiles, i) + starts[i] for i in (0, 1))
            distance = self.offset + rows - columns
            mask = distance >= 0 if self.spec.causal else None
            if self.spec.window is not None:
                near = distance < self.spec.window
                mask = near if mask is None else mask & near
        if self.held_segments is not None:
            sides = (self.held_segments[...], self._segments(tile))[:: 1 if self.side == 0 else -1]
            same = sides[0][:, None] == sides[1][None, :]
            mask = same if mask is None else mask & same
        return mask

    def _segments(self, tile: jax.Array) -> jax.Array:
        size = self.tiles[1 - self.side]
        return self.other_segments[pl.ds(tile * size, size)]


class _HeldQueries(_HeldTile):
    """A tile of queries that walks over the keys."""

    side = 0

    def ranges(self, number: int) -> list[tuple[Any, Any, bool]]:
        first, (rows, columns) = self.offset + self.start, self.tiles
        end = _tile_of(first + rows - 1 + columns, columns, number) if self.spec.causal else number
        if self.spec.window is not None:
            return [(_tile_of(first - self.spec.window + 1, columns, number), end, True)]
        whole = _tile_of(first + 1, columns, number)
        return [(0, whole, False), (whole, end, True)]


class _HeldKeys(_HeldTile):
    """A tile of keys that walks over the queries."""

    side = 1

    def ranges(self, number: int) -> list[tuple[Any, Any, bool]]:
        first, (rows, columns) = self.start - self.offset, self.tiles
        start = _tile_of(first, rows, number) if self.spec.causal else 0
        if self.spec.window is not None:
            return [(start, _tile_of(self.spec.window + first + columns - 1 + rows - 1, rows, number), True)]
        whole = _tile_of(first + columns - 1 + rows - 1, rows, number)
        return [(start, whole, True), (whole, number, False)]


def _tile_of(token: jax.Array, size: int, number: int) -> jax.Array:
    """Index of the tile that a token is in; 0 for tokens before the first tile, `number` for those after the last."""
    return jnp.minimum(lax.div(jnp.maximum(token, 0), jnp.int32(size)), number)
