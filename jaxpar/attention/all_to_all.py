"""`a2a`: all-to-alls exchange heads for tokens. Each rank of a group computes some of the heads, for all tokens of the
group (Jacobs et al., 2023, DeepSpeed Ulysses, arXiv:2309.14509).

`a2a+p2p`: all-to-alls inside groups of neighbouring ranks, and a ring across the groups. A group holds an early and a
late part of the sequence, as a single rank does, so the ring works on groups as it does on ranks.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.attention.ring import Ring, ring_attention
from jaxpar.attention.types import AttentionSpec, Keys
from jaxpar.config import ConfigError
from jaxpar.config.checks import all_to_all_problem


def all_to_all_attention(spec: AttentionSpec, ranks: Ring, group: int, query: jax.Array, keys: Keys) -> jax.Array:
    """Output [b, q, k, g, v]: all-to-all inside groups of `group` of all `ranks`, a ring across the groups.

    Raises:
      ConfigError: the heads do not divide by `group`.
    """
    batch, seq, kv_heads, per_kv_head, head_dim = query.shape
    heads = kv_heads * per_kv_head
    if problem := all_to_all_problem(heads, kv_heads, group):
        raise ConfigError(problem)
    repeats = max(1, group // kv_heads)  # with fewer kv heads than ranks, several ranks take the same one
    key, value = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in keys[:2])
    exchange = _Exchange(ranks.axis, group, ranks.size)
    query_heads = query.reshape(batch, seq, heads, head_dim)
    query, key, value = (exchange.split_heads(x) for x in (query_heads, key, value))
    segments = keys.segments
    if segments is not None:
        segments = exchange.gather(segments)
    grouped = query.reshape(batch, group * seq, key.shape[2], -1, head_dim)
    ring = Ring(ranks.size // group, group, ranks.axis)
    output = ring_attention(spec, ring, grouped, Keys(key, value, segments))
    value_dim = output.shape[-1]
    output = exchange.split_sequence(output.reshape(*query.shape[:-1], value_dim))
    return output.reshape(batch, seq, kv_heads, per_kv_head, value_dim)


@dataclass(frozen=True)
class _Exchange:
    """What the ranks of a group send each other: `group` neighbours of the `size` ranks along `axis`."""

    axis: str
    group: int
    size: int

    @property
    def groups(self) -> list[list[int]] | None:
        if self.group == self.size:
            return None
        return [list(range(i, i + self.group)) for i in range(0, self.size, self.group)]

    def gather(self, x: jax.Array) -> jax.Array:
        """[b, seq] → [b, group·seq], tokens in the order of the sequence."""
        x = lax.all_gather(x, self.axis, axis=1, axis_index_groups=self.groups, tiled=True)
        return _to_sequence_order(x, self.group)

    def split_heads(self, x: jax.Array) -> jax.Array:
        """[b, seq, heads, d] → [b, group·seq, heads/group, d], tokens in the order of the sequence."""
        x = lax.all_to_all(x, self.axis, split_axis=2, concat_axis=1, axis_index_groups=self.groups, tiled=True)
        return _to_sequence_order(x, self.group)

    def split_sequence(self, x: jax.Array) -> jax.Array:
        """The inverse of `split_heads`."""
        x = _to_rank_order(x, self.group)
        return lax.all_to_all(x, self.axis, split_axis=1, concat_axis=2, axis_index_groups=self.groups, tiled=True)


def _to_sequence_order(x: jax.Array, group: int) -> jax.Array:
    """Each rank's early and late chunk in turn → first all early chunks, then all late ones, each in order."""
    chunks = x.reshape(x.shape[0], group, 2, -1, *x.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x.shape)


def _to_rank_order(x: jax.Array, group: int) -> jax.Array:
    """The inverse of `_to_sequence_order`."""
    chunks = x.reshape(x.shape[0], 2, group, -1, *x.shape[2:])
    return jnp.stack([chunks[:, 0], chunks[:, 1, ::-1]], axis=2).reshape(x.shape)
