"""`order="contiguous"`: ranks that hold consecutive parts of the sequence exchange them for zigzag chunks, and back.

With n ranks, the sequence has 2n chunks. Rank r holds chunks 2r and 2r+1 in contiguous order, and r and 2n-1-r in zigzag
order (see parallel/zigzag.py). So each way is two permutes: one of all even chunks, one of all odd ones. No two even chunks
go to the same rank, because chunk c goes to rank c or 2n-1-c. An even chunk comes to rest as the early one where the rank is
even, and as the late one where it is odd.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.parallel.zigzag import zigzag_chunks


def to_zigzag(tree: Any, axis: str) -> Any:
    """Arrays [b, tokens, ...] that are consecutive parts of the sequence → the same tokens in zigzag order.

    `axis` is a manual mesh axis, and the number of tokens on a rank is even.
    """
    even_pairs, odd_pairs = _pairs(lax.axis_size(axis))
    on_even_rank = lax.axis_index(axis) % 2 == 0

    def exchange(x: jax.Array) -> jax.Array:
        even, odd = jnp.split(x, 2, axis=1)
        even, odd = lax.ppermute(even, axis, even_pairs), lax.ppermute(odd, axis, odd_pairs)
        return jnp.where(on_even_rank, jnp.concatenate([even, odd], 1), jnp.concatenate([odd, even], 1))

    return jax.tree.map(exchange, tree)


def from_zigzag(tree: Any, axis: str) -> Any:
    """The inverse of `to_zigzag`."""
    even_pairs, odd_pairs = ([(b, a) for a, b in pairs] for pairs in _pairs(lax.axis_size(axis)))
    on_even_rank = lax.axis_index(axis) % 2 == 0

    def exchange(x: jax.Array) -> jax.Array:
        early, late = jnp.split(x, 2, axis=1)
        even, odd = jnp.where(on_even_rank, early, late), jnp.where(on_even_rank, late, early)
        return jnp.concatenate([lax.ppermute(even, axis, even_pairs), lax.ppermute(odd, axis, odd_pairs)], 1)

    return jax.tree.map(exchange, tree)


def _pairs(size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(contiguous rank, zigzag rank) of each even chunk, and of each odd one."""
    rank = {chunk: place // 2 for place, chunk in enumerate(zigzag_chunks(size))}
    return [(c // 2, rank[c]) for c in range(0, 2 * size, 2)], [(c // 2, rank[c]) for c in range(1, 2 * size, 2)]
