"""`all_gather`: every rank has all keys and values for the time of one attention, and gathers them again for its backward
pass. More memory than the ring, one large transfer instead of many; nothing hides it."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.attention.products import Products, attend, attend_backward, output_grads_of
from jaxpar.attention.types import Keys, Kind, Queries, no_grads, nothing, tie


def all_gather_attention(kind: Kind, size: int, query: jax.Array, keys: Keys) -> jax.Array:
    """Output [b, q, k, g, d] of the local queries over the keys of all `size` ranks of the cp axis."""
    return _attention(kind, size, query, keys)


def _output(kind: Kind, size: int, query: jax.Array, keys: Keys) -> jax.Array:
    return _forward(kind, size, query, keys)[0]


def _forward(kind: Kind, size: int, query: jax.Array, keys: Keys):
    rank, segments = tie((lax.axis_index("cp"), keys.segments), query)
    queries, partial, gathered = Queries(query, segments), nothing(query), _gather(keys._replace(segments=segments))
    for products in _products(kind, size, rank, query.shape[1]):
        partial = attend(kind, queries, gathered, products, partial)
    output = partial.output.astype(query.dtype)
    return output, (query, keys, output, partial.lse)


def _backward(kind: Kind, size: int, residuals, grad: jax.Array):
    query, keys, output, lse = residuals
    rank, segments = tie((lax.axis_index("cp"), keys.segments), query)
    queries, gathered = Queries(query, segments), _gather(keys._replace(segments=segments))
    grads, output_grads = no_grads(queries, gathered), output_grads_of(grad, output, lse)
    for products in _products(kind, size, rank, query.shape[1]):
        grads = attend_backward(kind, queries, gathered, products, output_grads, grads)
    key_grad, value_grad = (lax.psum_scatter(x, "cp", scatter_dimension=1, tiled=True) for x in grads[1:])
    keys_grad = Keys(key_grad.astype(keys.key.dtype), value_grad.astype(keys.value.dtype), None)
    return grads.query.astype(query.dtype), keys_grad


_attention = jax.custom_vjp(_output, nondiff_argnums=(0, 1))
_attention.defvjp(_forward, _backward)


def _gather(keys: Keys) -> Keys:
    """[b, 2·size chunks, ...] in the order of the ranks."""
    return jax.tree.map(lambda x: lax.all_gather(x, "cp", axis=1, tiled=True), keys)


def _products(kind: Kind, size: int, rank: jax.Array, seq: int) -> list[Products]:
    """The blocks of this rank's two chunks of queries, the same number on every rank.

    Causal: on rank r the early chunk has r whole chunks of keys before it, the late one 2·size-1-r; each has one on the
    diagonal.
    """
    if not kind.causal and kind.window is None:
        return [Products(seq, None, None)]
    chunk, last = seq // 2, 2 * size - 1
    if kind.window is None:
        diagonal = jnp.array([[0, 2 * rank], [1, 2 * rank + 1]])
        number = jnp.arange(last)
        early = number < rank
        before = jnp.stack([jnp.where(early, 0, 1), _place(jnp.where(early, number, number - rank), size)], -1)
        return [Products(chunk, diagonal * chunk, 0), Products(chunk, before * chunk, None)]
    reach = min(last, -(-max(kind.window - 1, 0) // chunk))  # chunks that a causal query may look back over
    distance = jnp.arange(reach + 1) if kind.causal else jnp.arange(-last, last + 1)
    half, distance = (x.ravel() for x in jnp.meshgrid(jnp.arange(2), distance))
    key_chunk = jnp.where(half == 0, rank, last - rank) - distance
    exists = (key_chunk >= 0) & (key_chunk <= last)
    starts = jnp.stack([half, _place(jnp.clip(key_chunk, 0, last), size)], -1)
    too_far = -2 * chunk if kind.causal else 2 * chunk + kind.window  # all of it is masked
    return [Products(chunk, starts * chunk, jnp.where(exists, distance * chunk, too_far))]


def _place(chunk: jax.Array, size: int) -> jax.Array:
    """Where a chunk of the sequence is among the gathered ones (`placement.zigzag_chunks`, turned round)."""
    return jnp.where(chunk < size, 2 * chunk, 2 * (2 * size - 1 - chunk) + 1)
