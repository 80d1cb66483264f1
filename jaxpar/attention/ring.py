"""`p2p`: keys and values go round a ring of cp ranks (Liu et al., 2023, Ring Attention, arXiv:2310.01889).

A rank holds an early and a late chunk of the sequence (see placement.py), so that causal work is the same everywhere: of
keys from another rank its late queries attend to all early ones, and beside that its early queries to the early keys if
these come from before it, else its late queries to the late keys. Nothing of this is masked.

The next keys are sent for before the present ones are used. The backward pass goes round again with the saved output and
log-sum-exp, and the keys' gradients travel behind the keys.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.attention.blockwise import mask_leaves
from jaxpar.attention.products import Products, attend, attend_backward, output_grads_of
from jaxpar.attention.types import Keys, Kind, Queries, no_grads, nothing, tie


@dataclass(frozen=True)
class Ring:
    """`size` ranks of the cp axis that are `stride` apart; a ring of one communicates nothing."""

    size: int = 1
    stride: int = 1

    @property
    def rank(self) -> jax.Array | int:
        return lax.axis_index("cp") // self.stride if self.size > 1 else 0

    def pass_on(self, tree: Any, hop: int) -> Any:
        """To the rank `hop` places further."""
        ranks = self.size * self.stride
        pairs = [(rank, (rank + hop * self.stride) % ranks) for rank in range(ranks)]
        return jax.tree.map(lambda x: lax.ppermute(x, "cp", pairs), tree) if hop % self.size else tree


def ring_attention(kind: Kind, ring: Ring, query: jax.Array, keys: Keys) -> jax.Array:
    """Output [b, q, k, g, d] of the local queries over the keys of all members; their segments are the keys' own."""
    return _attention(kind, ring, query, keys)


def _output(kind: Kind, ring: Ring, query: jax.Array, keys: Keys) -> jax.Array:
    return _forward(kind, ring, query, keys)[0]


def _forward(kind: Kind, ring: Ring, query: jax.Array, keys: Keys):
    rank, segments = tie((ring.rank, keys.segments), query)
    queries, seq = Queries(query, segments), query.shape[1]

    def step(carry, stop, _, hop: int):
        travelling, partial = carry
        coming = ring.pass_on(travelling, hop)
        products = _products(kind, ring, rank, stop, seq)
        return coming, attend(kind, queries, _unpack(travelling), products, partial)

    _, partial = _go_round(_stops(kind, ring, seq), step, (_pack(keys._replace(segments=segments)), nothing(query)))
    output = partial.output.astype(query.dtype)
    return output, (query, keys, output, partial.lse)


def _backward(kind: Kind, ring: Ring, residuals, grad: jax.Array):
    query, keys, output, lse = residuals
    rank, segments = tie((ring.rank, keys.segments), query)
    queries, seq, stops = Queries(query, segments), query.shape[1], _stops(kind, ring, query.shape[1])
    output_grads, none = output_grads_of(grad, output, lse), no_grads(queries, keys)

    def step(carry, stop, last_hop: int, hop: int):
        travelling, query_grad, keys_grads = carry
        coming, arrived = ring.pass_on(travelling, hop), ring.pass_on(keys_grads, last_hop)
        grads, products = none._replace(query=query_grad), _products(kind, ring, rank, stop, seq)
        grads = attend_backward(kind, queries, _unpack(travelling), products, output_grads, grads)
        return coming, grads.query, arrived + jnp.stack(grads[1:])

    carry = (_pack(keys._replace(segments=segments)), none.query, jnp.stack(none[1:]))
    _, query_grad, keys_grads = _go_round(stops, step, carry)
    key_grad, value_grad = ring.pass_on(keys_grads, ring.size - stops[-1])  # the rest of the way home
    keys_grad = Keys(key_grad.astype(keys.key.dtype), value_grad.astype(keys.value.dtype), None)
    return query_grad.astype(query.dtype), keys_grad


_attention = jax.custom_vjp(_output, nondiff_argnums=(0, 1))
_attention.defvjp(_forward, _backward)


def _go_round(stops: list[int], step: Callable, carry: Any) -> Any:
    """step(carry, stop, hop from the stop before, hop to the next stop), in order; the hops are static. A loop, but for
    the ends and where stops are left out."""
    hops = [0, *(b - a for a, b in itertools.pairwise(stops)), 0]
    around = list(zip(stops, hops, hops[1:], strict=False))
    first, middle, last = around[:1], around[1:-1], around[1:][-1:]
    carry = step(carry, *first[0])
    if middle and all(hop == 1 for hop in hops[1:-1]):
        carry, _ = lax.scan(lambda carry, stop: (step(carry, stop, 1, 1), None), carry, jnp.arange(1, stops[-1]))
    else:
        last = around[1:]
    for one in last:
        carry = step(carry, *one)
    return carry


def _stops(kind: Kind, ring: Ring, seq: int) -> list[int]:
    """How far away the keys come from: 0, then the steps at which some rank's queries see some of the keys."""
    if kind.window is None:
        return list(range(ring.size))
    return [stop for stop in range(ring.size) if stop == 0 or _chunk_pairs(kind, ring, stop, seq)]


def _pack(keys: Keys) -> tuple[jax.Array, jax.Array | None]:
    """One array to send: XLA has one permute under way at a time, and a second would not hide behind the work."""
    return jnp.stack([keys.key, keys.value]), keys.segments


def _unpack(travelling: tuple[jax.Array, jax.Array | None]) -> Keys:
    key_value, segments = travelling
    return Keys(key_value[0], key_value[1], segments)


def _products(kind: Kind, ring: Ring, rank: Any, stop: Any, seq: int) -> Products:
    """The blocks of the local queries with the keys of the rank `stop` places before, of `seq` tokens each."""
    chunk = seq // 2
    if not kind.causal and kind.window is None:
        return Products(seq, None, None)
    if ring.size == 1 or (kind.window is None and isinstance(stop, int) and stop == 0):
        return Products(seq, None, 0)  # the late chunk comes after the early one: the local order will do
    if kind.window is None:
        other = jnp.where(stop <= rank, 0, chunk)
        return Products(chunk, jnp.array([[chunk, 0], [other, other]]), None)
    blocks = jnp.array(
        [
            [a, b, _chunk(ring, rank, a) - _chunk(ring, (rank - stop) % ring.size, b)]
            for a, b in _chunk_pairs(kind, ring, stop if isinstance(stop, int) else None, seq)
        ]
    )
    return Products(chunk, blocks[:, :2] * chunk, blocks[:, 2] * chunk)


def _chunk(ring: Ring, rank: Any, half: int) -> Any:
    """Which of the sequence's chunks is the early (0) or late (1) one of a rank."""
    return 2 * ring.size - 1 - rank if half else rank


def _chunk_pairs(kind: Kind, ring: Ring, stop: int | None, seq: int) -> list[tuple[int, int]]:
    """Halves (of the queries, of the keys) that any rank needs at this stop; None: at any."""

    def needed(query_half: int, key_half: int) -> bool:
        chunk = seq // 2
        return any(
            mask_leaves(kind, chunk * (_chunk(ring, a, query_half) - _chunk(ring, b, key_half)), (chunk, chunk))[0]
            for a, b in itertools.product(range(ring.size), repeat=2)
            if stop is None or (a - b) % ring.size == stop
        )

    return [(a, b) for a in (0, 1) for b in (0, 1) if needed(a, b)]
