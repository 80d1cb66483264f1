"""`p2p`: keys and values go round a ring of cp ranks (Liu et al., 2023, Ring Attention, arXiv:2310.01889).

A rank holds an early and a late chunk of the sequence (see parallel/zigzag.py), which makes causal work the same on all
ranks. When keys of another rank arrive, the late queries attend to all of the early keys. In addition, the early
queries attend to the early keys if these precede them; otherwise the late queries attend to the late keys. None of
this needs a mask.

Words: a *stop* is how many ranks away the keys at hand come from, 0 for a rank's own. A *hop* is the number of ranks
that keys move between two stops.

The transfer of the next keys starts before the present ones are used. The backward pass goes round the ring again, with
the saved output and log-sum-exp; the gradients of the keys follow the keys, one stop behind.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.attention.blocks import Blocks, attend, attend_backward, output_grads_of
from jaxpar.attention.blockwise import mask_coverage
from jaxpar.attention.types import AttentionSpec, Keys, Queries, in_float32, tie_to_data, zero_grads


@dataclass(frozen=True)
class Ring:
    """`size` ranks of the manual mesh axis `axis`, `stride` apart. A ring of one does not communicate."""

    size: int = 1
    stride: int = 1
    axis: str = "cp"

    @property
    def rank(self) -> jax.Array | int:
        return lax.axis_index(self.axis) // self.stride if self.size > 1 else 0

    def pass_on(self, tree: Any, hop: int) -> Any:
        """Sends `tree` to the rank `hop` further along the ring."""
        ranks = self.size * self.stride
        pairs = [(rank, (rank + hop * self.stride) % ranks) for rank in range(ranks)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), tree) if hop % self.size else tree


def ring_attention(spec: AttentionSpec, ring: Ring, query: jax.Array, keys: Keys) -> jax.Array:
    """Output [b, q, k, g, v] of the local queries over the keys of all ranks of the ring.

    The local queries have the segments of the local keys.
    """
    return _attention(spec, ring, query, keys)


def _output(spec: AttentionSpec, ring: Ring, query: jax.Array, keys: Keys) -> jax.Array:
    return _forward(spec, ring, query, keys)[0]


def _forward(spec: AttentionSpec, ring: Ring, query: jax.Array, keys: Keys):
    rank, segments = tie_to_data((ring.rank, keys.segments), query)
    queries, seq = Queries(query, segments), query.shape[1]

    def step(carry, stop, _, hop: int):
        travelling, partial = carry
        coming = ring.pass_on(travelling, hop)
        blocks = _blocks_at_stop(spec, ring, rank, stop, seq)
        partial = attend(spec, queries, _unpack(travelling, keys), blocks, partial)
        return coming, partial if ring.size == 1 else in_float32(partial)

    _, partial = _visit_stops(_stops(spec, ring, seq), step, (_pack(ring, keys._replace(segments=segments)), None))
    output = partial.output.astype(query.dtype)
    return output, (query, keys, output, partial.lse)


def _backward(spec: AttentionSpec, ring: Ring, residuals, grad: jax.Array):
    query, keys, output, lse = residuals
    rank, segments = tie_to_data((ring.rank, keys.segments), query)
    queries, seq, stops = Queries(query, segments), query.shape[1], _stops(spec, ring, query.shape[1])
    output_grads = output_grads_of(grad, output, lse)

    def step(carry, stop, last_hop: int, hop: int):
        travelling, query_grad, keys_grads = carry
        coming, blocks = ring.pass_on(travelling, hop), _blocks_at_stop(spec, ring, rank, stop, seq)
        before = None if query_grad is None else zero_grads(queries, keys)._replace(query=query_grad)
        grads = attend_backward(spec, queries, _unpack(travelling, keys), blocks, output_grads, before)
        if ring.size == 1:
            return coming, grads.query, grads[1:]
        arrived = 0 if keys_grads is None else ring.pass_on(keys_grads, last_hop)
        grads = in_float32(grads)
        return coming, grads.query, arrived + _join(grads.key, grads.value)

    carry = _pack(ring, keys._replace(segments=segments)), None, None
    _, query_grad, keys_grads = _visit_stops(stops, step, carry)
    if ring.size > 1:
        sent = keys_grads.astype(jnp.result_type(keys.key, keys.value))
        keys_grads = ring.pass_on(sent, ring.size - stops[-1])  # the rest of the way home
        keys_grads = _part(keys_grads, keys)
    keys_grad = Keys(keys_grads[0].astype(keys.key.dtype), keys_grads[1].astype(keys.value.dtype), None)
    return query_grad.astype(query.dtype), keys_grad


_attention = jax.custom_vjp(_output, nondiff_argnums=(0, 1))
_attention.defvjp(_forward, _backward)


def _visit_stops(stops: list[int], step: Callable, carry: Any) -> Any:
    """Calls step(carry, stop, hop from the previous stop, hop to the next stop) → carry for each stop, in order.

    The hops are static. The stops between the first and the last are a loop, unless some stops are left out.
    """
    hops = [0, *(b - a for a, b in itertools.pairwise(stops)), 0]
    visits = list(zip(stops, hops, hops[1:], strict=False))
    first, middle, last = visits[:1], visits[1:-1], visits[1:][-1:]
    carry = step(carry, *first[0])
    if middle and all(hop == 1 for hop in hops[1:-1]):
        carry, _ = lax.scan(lambda carry, stop: (step(carry, stop, 1, 1), None), carry, jnp.arange(1, stops[-1]))
    else:
        last = visits[1:]
    for visit in last:
        carry = step(carry, *visit)
    return carry


def _stops(spec: AttentionSpec, ring: Ring, seq: int) -> list[int]:
    """The stops to visit: 0, then those at which the queries of some rank see some of the keys."""
    if spec.window is None:
        return list(range(ring.size))
    return [stop for stop in range(ring.size) if stop == 0 or _chunk_pairs(spec, ring, stop, seq)]


def _pack(ring: Ring, keys: Keys) -> tuple[Any, jax.Array | None]:
    """One array to send: XLA has one permute in flight at a time, so the work would not hide a second one."""
    return (keys.key, keys.value) if ring.size == 1 else _join(keys.key, keys.value), keys.segments


def _unpack(travelling: tuple[Any, jax.Array | None], keys: Keys) -> Keys:
    key_value, segments = travelling
    key, value = key_value if isinstance(key_value, tuple) else _part(key_value, keys)
    return Keys(key, value, segments)


def _join(key: jax.Array, value: jax.Array) -> jax.Array:
    """[2, b, s, k, d], or [b, s, k, d + v] if a value's size differs from a key's."""
    return jnp.stack([key, value]) if key.shape == value.shape else jnp.concatenate([key, value], -1)


def _part(joined: jax.Array, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_join`, for a key and a value of the shapes of `keys`."""
    if keys.key.shape == keys.value.shape:
        return joined[0], joined[1]
    head_dim = keys.key.shape[-1]
    return joined[..., :head_dim], joined[..., head_dim:]


def _blocks_at_stop(spec: AttentionSpec, ring: Ring, rank: Any, stop: Any, seq: int) -> Blocks:
    """The blocks of the local queries and the keys of the rank `stop` before it, `seq` tokens each."""
    chunk = seq // 2
    if not spec.causal and spec.window is None:
        return Blocks(seq, None, None)
    if ring.size == 1 or (spec.window is None and isinstance(stop, int) and stop == 0):
        # One block: the late chunk comes after the early one, so the local order is the causal order.
        return Blocks(seq, None, 0)
    if spec.window is None:
        other = jnp.where(stop <= rank, 0, chunk)
        return Blocks(chunk, jnp.array([[chunk, 0], [other, other]]), None)
    pairs_and_offsets = jnp.array(
        [
            [a, b, _chunk(ring, rank, a) - _chunk(ring, (rank - stop) % ring.size, b)]
            for a, b in _chunk_pairs(spec, ring, stop if isinstance(stop, int) else None, seq)
        ]
    )
    return Blocks(chunk, pairs_and_offsets[:, :2] * chunk, pairs_and_offsets[:, 2] * chunk)


def _chunk(ring: Ring, rank: Any, half: int) -> Any:
    """Index in the sequence of a rank's early (half 0) or late (half 1) chunk."""
    return 2 * ring.size - 1 - rank if half else rank


def _chunk_pairs(spec: AttentionSpec, ring: Ring, stop: int | None, seq: int) -> list[tuple[int, int]]:
    """Pairs (half of the queries, half of the keys) that some rank needs at this stop; None: at any stop."""

    def needed(query_half: int, key_half: int) -> bool:
        chunk = seq // 2
        return any(
            mask_coverage(spec, chunk * (_chunk(ring, a, query_half) - _chunk(ring, b, key_half)), (chunk, chunk))[0]
            for a, b in itertools.product(range(ring.size), repeat=2)
            if stop is None or (a - b) % ring.size == stop
        )

    return [(a, b) for a in (0, 1) for b in (0, 1) if needed(a, b)]
