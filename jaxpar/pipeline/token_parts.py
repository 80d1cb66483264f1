"""Cuts the tokens of a microbatch into parts, and puts what was computed for each together again."""

import math

import jax
import jax.numpy as jnp

from jaxpar.parallel.collectives import rank_and_size, sum_over


def split_tokens(x: jax.Array, parts: int, ways: int) -> jax.Array:
    """[batch, seq, ...] → [parts, batch, seq / parts, ...]. Each part has an equal piece of each of the `ways` shards into
    which sp splits the sequence."""
    batch, seq, *rest = x.shape
    pieces = x.reshape(batch, ways, parts, seq // ways // parts, *rest)
    return jnp.moveaxis(pieces, 2, 0).reshape(parts, batch, seq // parts, *rest)


def join_tokens(x: jax.Array, ways: int) -> jax.Array:
    """The inverse of `split_tokens`: [parts, batch, seq / parts, ...] → [batch, seq, ...]."""
    parts, batch, size, *rest = x.shape
    pieces = x.reshape(parts, batch, ways, size // ways, *rest)
    return jnp.moveaxis(pieces, 0, 2).reshape(batch, parts * size, *rest)


def from_all_stages(shares: jax.Array) -> jax.Array:
    """Each stage's share of the tokens, [parts, batch, share, ...] → all tokens, [parts, batch, stages * share, ...], on every
    stage."""
    stage, stages = rank_and_size("pp")
    if stages == 1:
        return shares
    share = shares.shape[2]
    mine = (jnp.arange(share * stages) // share == stage).reshape(-1, *[1] * (shares.ndim - 3))
    repeated = jnp.tile(shares, (1, 1, stages, *[1] * (shares.ndim - 3)))
    return sum_over(jnp.where(mine, repeated, 0), ("pp",))


def least_parts(size: int, limit: int, total: int) -> int:
    """The smallest number of equal parts of `total` elements such that `size` bytes give at most `limit` in each part."""
    return next((n for n in range(1, total) if total % n == 0 and size <= n * limit), total)


def nbytes(shape: tuple[int, ...]) -> int:
    """Bytes of a float32 array."""
    return 4 * math.prod(shape)
