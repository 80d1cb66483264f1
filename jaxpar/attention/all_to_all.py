"""`a2a`: all-to-alls exchange heads for tokens. Each rank of a group computes some of the heads, for all tokens of the
group (Jacobs et al., 2023, DeepSpeed Ulysses, arXiv:2309.14509).

`a2a+p2p`: all-to-alls inside groups of neighbouring ranks, and a ring across the groups. A group holds an early and a
late part of the sequence, as a single rank does, so the ring works on groups as it does on ranks.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.attention.ring import Ring, ring_attention
from jaxpar.attention.types import AttentionSpec, Keys
from jaxpar.config import ConfigError
from jaxpar.config.checks import all_to_all_problem


def all_to_all_attention(spec: AttentionSpec, size: int, group: int, query: jax.Array, keys: Keys) -> jax.Array:
    """Output [b, q, k, g, d]: all-to-all inside groups of `group` of the `size` ranks, a ring across the groups.

    Raises:
      ConfigError: the heads do not divide by `group`.
    """
    batch, seq, kv_heads, per_kv_head, head_dim = query.shape
    heads = kv_heads * per_kv_head
    if problem := all_to_all_problem(heads, kv_heads, group):
        raise ConfigError(problem)
    repeats = max(1, group // kv_heads)  # with fewer kv heads than ranks, several ranks take the same one
    key, value = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in keys[:2])
    groups = None if group == size else [list(range(i, i + group)) for i in range(0, size, group)]
    query_heads = query.reshape(batch, seq, heads, head_dim)
    query, key, value = (_split_heads(x, group, groups) for x in (query_heads, key, value))
    segments = keys.segments
    if segments is not None:
        gathered = lax.all_gather(segments, "cp", axis=1, axis_index_groups=groups, tiled=True)
        segments = _to_sequence_order(gathered, group)
    grouped = query.reshape(batch, group * seq, key.shape[2], -1, head_dim)
    output = ring_attention(spec, Ring(size // group, group), grouped, Keys(key, value, segments))
    output = _split_sequence(output.reshape(query.shape), group, groups)
    return output.reshape(batch, seq, kv_heads, per_kv_head, head_dim)


def _split_heads(x: jax.Array, group: int, groups: list[list[int]] | None) -> jax.Array:
    """[b, seq, heads, d] → [b, group·seq, heads/group, d], tokens in the order of the sequence."""
    x = lax.all_to_all(x, "cp", split_axis=2, concat_axis=1, axis_index_groups=groups, tiled=True)
    return _to_sequence_order(x, group)


def _split_sequence(x: jax.Array, group: int, groups: list[list[int]] | None) -> jax.Array:
    """The inverse of `_split_heads`."""
    x = _to_rank_order(x, group)
    return lax.all_to_all(x, "cp", split_axis=1, concat_axis=2, axis_index_groups=groups, tiled=True)


def _to_sequence_order(x: jax.Array, group: int) -> jax.Array:
    """Each rank's early and late chunk in turn → first all early chunks, then all late ones, each in order."""
    chunks = x.reshape(x.shape[0], group, 2, -1, *x.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x.shape)


def _to_rank_order(x: jax.Array, group: int) -> jax.Array:
    """The inverse of `_to_sequence_order`."""
    chunks = x.reshape(x.shape[0], 2, group, -1, *x.shape[2:])
    return jnp.stack([chunks[:, 0], chunks[:, 1, ::-1]], axis=2).reshape(x.shape)
