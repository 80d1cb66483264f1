"""`all_gather`: each attention gathers all keys and values on every rank, and its backward pass gathers them again.

It needs more memory than the ring, and one large transfer instead of many. No computation overlaps that transfer.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.attention.blocks import Blocks, attend, attend_backward, output_grads_of
from jaxpar.attention.ring import Ring
from jaxpar.attention.types import AttentionSpec, Grads, Keys, Partial, Queries, in_float32, tie_to_data


def all_gather_attention(spec: AttentionSpec, ring: Ring, query: jax.Array, keys: Keys) -> jax.Array:
    """Output [b, q, k, g, v] of the local queries over the keys of all ranks of `ring`, whose stride is 1."""
    return _attention(spec, ring, query, keys)


def _output(spec: AttentionSpec, ring: Ring, query: jax.Array, keys: Keys) -> jax.Array:
    return _forward(spec, ring, query, keys)[0]


def _forward(spec: AttentionSpec, ring: Ring, query: jax.Array, keys: Keys):
    rank, segments = tie_to_data((lax.axis_index(ring.axis), keys.segments), query)
    queries, gathered = Queries(query, segments), _gather(ring, keys._replace(segments=segments))
    partial: Partial | None = None
    for blocks in _local_blocks(spec, ring.size, rank, query.shape[1], documents=segments is not None):
        partial = attend(spec, queries, gathered, blocks, partial)
    assert partial is not None
    output = partial.output.astype(query.dtype)
    return output, (query, keys, output, partial.lse)


def _backward(spec: AttentionSpec, ring: Ring, residuals, grad: jax.Array):
    query, keys, output, lse = residuals
    rank, segments = tie_to_data((lax.axis_index(ring.axis), keys.segments), query)
    queries, gathered = Queries(query, segments), _gather(ring, keys._replace(segments=segments))
    output_grads = output_grads_of(grad, output, lse)
    grads: Grads | None = None
    for blocks in _local_blocks(spec, ring.size, rank, query.shape[1], documents=segments is not None):
        grads = attend_backward(spec, queries, gathered, blocks, output_grads, grads)
    assert grads is not None
    scatter = functools.partial(lax.psum_scatter, axis_name=ring.axis, scatter_dimension=1, tiled=True)
    key_grad, value_grad = map(scatter, in_float32(grads[1:]))
    keys_grad = Keys(key_grad.astype(keys.key.dtype), value_grad.astype(keys.value.dtype), None)
    return grads.query.astype(query.dtype), keys_grad


_attention = jax.custom_vjp(_output, nondiff_argnums=(0, 1))
_attention.defvjp(_forward, _backward)


def _gather(ring: Ring, keys: Keys) -> Keys:
    """[b, 2·size chunks, ...], chunks in the order of the ranks."""
    return jax.tree.map(lambda x: lax.all_gather(x, ring.axis, axis=1, tiled=True), keys)


def _local_blocks(spec: AttentionSpec, size: int, rank: jax.Array, seq: int, *, documents: bool) -> list[Blocks]:
    """The blocks of this rank's two chunks of queries. Every rank has the same number of them.

    Causal: on rank r, r whole chunks of keys precede the early chunk of queries, and 2·size-1-r precede the late one;
    each chunk has one more block on the diagonal.
    """
    chunk, last = seq // 2, 2 * size - 1
    if not spec.causal and spec.window is None:
        # Kernels find documents in order only inside a chunk.
        everything = jnp.stack(jnp.meshgrid(jnp.arange(2), jnp.arange(2 * size)), -1).reshape(-1, 2)
        return [Blocks(chunk, everything * chunk, None) if documents else Blocks(seq, None, None)]
    if spec.window is None:
        diagonal = jnp.array([[0, 2 * rank], [1, 2 * rank + 1]])
        number = jnp.arange(last)
        early = number < rank
        query_chunk = jnp.where(early, 0, 1)
        key_chunk = _gathered_index(jnp.where(early, number, number - rank), size)
        before = jnp.stack([query_chunk, key_chunk], -1)
        return [Blocks(chunk, diagonal * chunk, 0), Blocks(chunk, before * chunk, None)]
    reach = min(last, -(-max(spec.window - 1, 0) // chunk))  # how many chunks back a causal query can see
    distance = jnp.arange(reach + 1) if spec.causal else jnp.arange(-last, last + 1)
    half, distance = (x.ravel() for x in jnp.meshgrid(jnp.arange(2), distance))
    key_chunk = jnp.where(half == 0, rank, last - rank) - distance
    exists = (key_chunk >= 0) & (key_chunk <= last)
    starts = jnp.stack([half, _gathered_index(jnp.clip(key_chunk, 0, last), size)], -1)
    too_far = -2 * chunk if spec.causal else 2 * chunk + spec.window  # an offset at which the whole block is masked
    return [Blocks(chunk, starts * chunk, jnp.where(exists, distance * chunk, too_far))]


def _gathered_index(chunk: jax.Array, size: int) -> jax.Array:
    """Index of a chunk of the sequence among the gathered ones: the inverse of `zigzag_chunks` (parallel/zigzag.py)."""
    return jnp.where(chunk < size, 2 * chunk, 2 * (2 * size - 1 - chunk) + 1)
