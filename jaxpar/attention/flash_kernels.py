"""What one program of a flash kernel's grid does, see flash.py. Arguments are Pallas references
to this program's tile, or to all of the side that it walks over; segments and offset are None where there are none.

A program holds a tile of queries and walks over the keys, or the other way round for the keys' gradients.
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

from jaxpar.attention.types import Kind
from jaxpar.parallel.collectives import MASKED

LOG2_E = math.log2(math.e)  # exponentials are of base 2, which is what the hardware has


def forward_kernel(query, key, value, query_segments, key_segments, offset, output, lse, *, kind: Kind, tiles):
    rows = _Rows(kind, tiles, offset, query_segments, key_segments)
    q = query[...]

    def attend(tile, carry, masked):
        total, highest, weight = carry
        columns = pl.ds(tile * tiles[1], tiles[1])
        scores = plgpu.dot(q, key[columns, :].T) * (kind.scale * LOG2_E)
        mask = rows.mask(tile, masked)
        now = jnp.maximum(highest, _where(mask, scores, MASKED).max(-1))
        weights, shrink = _where(mask, jnp.exp2(scores - now[:, None]), 0.0), jnp.exp2(highest - now)
        v = value[columns, :]
        total = total * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return total, now, weight * shrink + weights.sum(-1)

    start = (jnp.zeros(q.shape, jnp.float32), jnp.full((tiles[0],), MASKED), jnp.zeros((tiles[0],), jnp.float32))
    total, highest, weight = rows.walk(attend, start, key.shape[0] // tiles[1])
    weight = jnp.maximum(weight, 1e-30)
    output[...] = total / weight[:, None]
    lse[...] = (highest + jnp.log2(weight)) / LOG2_E


def query_grad_kernel(
    query, key, value, grad, lse, delta, query_segments, key_segments, offset, query_grad, *, kind: Kind, tiles
):
    rows = _Rows(kind, tiles, offset, query_segments, key_segments)
    q, do, lse_, delta_ = query[...], grad[...], lse[...], delta[...]

    def attend(tile, total, masked):
        columns = pl.ds(tile * tiles[1], tiles[1])
        k, v = key[columns, :], value[columns, :]
        mask = rows.mask(tile, masked)
        _, scores_grad = _scores_grad(kind, q, k, v, do, lse_, delta_, mask)
        return total + plgpu.dot(scores_grad.astype(k.dtype), k)

    query_grad[...] = rows.walk(attend, jnp.zeros(q.shape, jnp.float32), key.shape[0] // tiles[1])


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
    kind: Kind,
    tiles,
):
    columns = _Columns(kind, tiles, offset, query_segments, key_segments)
    k, v = key[...], value[...]

    def attend(head, tile, carry, masked):
        key_total, value_total = carry
        rows = pl.ds(tile * tiles[0], tiles[0])
        q, do = query[rows, head, :], grad[rows, head, :]
        mask = columns.mask(tile, masked)
        weights, scores_grad = _scores_grad(kind, q, k, v, do, lse[rows, head], delta[rows, head], mask)
        key_total += plgpu.dot(scores_grad.astype(q.dtype).T, q)
        return key_total, value_total + plgpu.dot(weights.astype(do.dtype).T, do)

    def one_head(head, carry):
        return columns.walk(functools.partial(attend, head), carry, query.shape[0] // tiles[0])

    zeros = jnp.zeros(k.shape, jnp.float32)
    key_grad[...], value_grad[...] = lax.fori_loop(0, query.shape[1], one_head, (zeros, zeros))


def _scores_grad(kind: Kind, q, k, v, do, lse, delta, mask) -> tuple[jax.Array, jax.Array]:
    """Weights of a tile and the gradient of its scores, [q, s]."""
    scores = plgpu.dot(q, k.T) * (kind.scale * LOG2_E)
    weights = _where(mask, jnp.exp2(scores - lse[:, None] * LOG2_E), 0.0)
    return weights, weights * (plgpu.dot(do, v.T) - delta[:, None]) * kind.scale


def _where(mask: jax.Array | None, x: jax.Array, other: float) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, other)


class _Walk(abc.ABC):
    """One side's tile of this program, and the tiles of the other side that it meets.

    Attributes:
      side: which side's tile is held, 0 queries, 1 keys.
    """

    side: int

    def __init__(self, kind: Kind, tiles: tuple[int, int], offset, query_segments, key_segments):
        self.kind, self.tiles = kind, tiles
        self.start = pl.program_id(2) * tiles[self.side]
        self.offset: Any = None if offset is None else offset[0]
        self.held, self.passing = (query_segments, key_segments)[:: 1 if self.side == 0 else -1]

    @abc.abstractmethod
    def ranges(self, number: int) -> list[tuple[Any, Any, bool]]:
        """(first, end, masked) of the other side's tiles, of which there are `number`."""

    def walk(self, attend: Any, carry: Any, number: int) -> Any:
        """attend(tile, carry, masked) → carry, for each tile; not for those that have no document in common."""

        def step(masked: bool, tile: jax.Array, carry: Any) -> Any:
            if self.held is None:
                return attend(tile, carry, masked)
            mine, others = self.held[...], self._segments(tile)
            meet = (mine.min() <= others.max()) & (others.min() <= mine.max())
            return lax.cond(meet, lambda: attend(tile, carry, masked), lambda: carry)

        for first, end, masked in [(0, number, False)] if self.offset is None else self.ranges(number):
            carry = lax.fori_loop(first, end, functools.partial(step, masked), carry)
        return carry

    def mask(self, tile: jax.Array, masked: bool) -> jax.Array | None:
        """bool [q, s], or None: all."""
        mask = None
        if masked:
            starts = (self.start, tile * self.tiles[1]) if self.side == 0 else (tile * self.tiles[0], self.start)
            rows, columns = (lax.broadcasted_iota(jnp.int32, self.tiles, i) + starts[i] for i in (0, 1))
            distance = self.offset + rows - columns
            mask = distance >= 0 if self.kind.causal else None
            if self.kind.window is not None:
                near = distance < self.kind.window
                mask = near if mask is None else mask & near
        if self.held is not None:
            sides = (self.held[...], self._segments(tile))[:: 1 if self.side == 0 else -1]
            same = sides[0][:, None] == sides[1][None, :]
            mask = same if mask is None else mask & same
        return mask

    def _segments(self, tile: jax.Array) -> jax.Array:
        size = self.tiles[1 - self.side]
        return self.passing[pl.ds(tile * size, size)]


class _Rows(_Walk):
    """A tile of queries, and the keys that it walks over."""

    side = 0

    def ranges(self, number: int) -> list[tuple[Any, Any, bool]]:
        first, (rows, columns) = self.offset + self.start, self.tiles
        end = _tile_of(first + rows - 1 + columns, columns, number) if self.kind.causal else number
        if self.kind.window is not None:
            return [(_tile_of(first - self.kind.window + 1, columns, number), end, True)]
        whole = _tile_of(first + 1, columns, number)
        return [(0, whole, False), (whole, end, True)]


class _Columns(_Walk):
    """A tile of keys, and the queries that it walks over."""

    side = 1

    def ranges(self, number: int) -> list[tuple[Any, Any, bool]]:
        first, (rows, columns) = self.start - self.offset, self.tiles
        start = _tile_of(first, rows, number) if self.kind.causal else 0
        if self.kind.window is not None:
            return [(start, _tile_of(self.kind.window + first + columns - 1 + rows - 1, rows, number), True)]
        whole = _tile_of(first + columns - 1 + rows - 1, rows, number)
        return [(start, whole, True), (whole, number, False)]


def _tile_of(token: jax.Array, size: int, number: int) -> jax.Array:
    """The tile that a token is in; before the first: 0, after the last: `number`."""
    return jnp.minimum(lax.div(jnp.maximum(token, 0), jnp.int32(size)), number)
