"""Ring attention over the cp axis, with online softmax and a backward pass of its own.

Liu et al., 2023, "Ring Attention with Blockwise Transformers" (arXiv:2310.01889). Each rank keeps its queries; keys
and values go round the ring, and partial outputs merge by their log-sum-exp. The backward pass goes round again with
the saved output and log-sum-exp, so a score exists only for one block at a time, in either direction. Without cp the
ring has one member and this is plain attention that does not store its scores.

Einsum letters: b batch, q query tokens, s key tokens, k kv heads, g query heads a kv head, d head_dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpar.attention.mask import attention_mask
from jaxpar.collectives import MASKED, manual, vary, varying_axes

BLOCK_SIZE = 1024  # keys whose scores exist at a time, where the sequence divides by it


def attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    *,
    segment_ids: Int[Array, "batch seq"] | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """softmax(query keyᵀ / sqrt(head_dim)) value, over the whole sequence although each cp rank holds a part.

    Call it anywhere: inside jaxpar's train step `seq` is this rank's contiguous share of the sequence, elsewhere it is
    all of it.

    Args:
      query, key, value: any float dtype. heads is a multiple of kv_heads (grouped-query attention: query head i reads
        kv head i // (heads / kv_heads)); only the kv heads travel.
      segment_ids: a token attends only to tokens with the same id (documents of a packed sequence).
      causal: a token attends to itself and to earlier ones.
      window: and to the `window` latest of these only.

    Returns:
      The query's dtype; statistics and sums are float32. A token that may attend to nothing gets zeros.

    Raises:
      ValueError: heads is not a multiple of kv_heads.
    """
    batch, seq, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {kv_heads} kv heads")
    grouped = query.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    kind = _Kind(causal, window, head_dim**-0.5, manual("cp"))
    return _ring(kind, grouped, _Keys(key, value, segment_ids), segment_ids).reshape(query.shape)


@dataclasses.dataclass(frozen=True)
class _Kind:
    causal: bool
    window: int | None
    scale: float
    axis: tuple[str, ...]  # ("cp",) or ()

    @property
    def size(self) -> int:
        return lax.axis_size(self.axis) if self.axis else 1

    @property
    def rank(self) -> jax.Array | int:
        return lax.axis_index(self.axis) if self.axis else 0


class _Keys(NamedTuple):
    """What goes round the ring."""

    key: jax.Array  # [b, s, k, d]
    value: jax.Array  # [b, s, k, d]
    segments: jax.Array | None  # [b, s]


class _Partial(NamedTuple):
    """Attention over some of the keys: normalized output and log-sum-exp of the scores."""

    output: jax.Array  # float32 [b, q, k, g, d]
    lse: jax.Array  # float32 [b, k, g, q]


def _ring_forward(kind: _Kind, query: jax.Array, keys: _Keys, segments: jax.Array | None):
    def attend(partial: _Partial, keys: _Keys, source) -> _Partial:
        def step(partial: _Partial, block):
            return _merge(partial, _block_forward(kind, query, segments, *block)), None

        return lax.scan(step, partial, _blocks(keys, source))[0]

    def pass_on_and_attend(carry, source):
        keys, partial = carry
        keys = _pass_on(kind, keys)
        return (keys, attend(partial, keys, source)), None

    partial = attend(_nothing(query), keys, kind.rank)
    if kind.size > 1:
        (_, partial), _ = lax.scan(pass_on_and_attend, (keys, partial), _sources(kind))
    output = partial.output.astype(query.dtype)
    return output, (query, keys, segments, output, partial.lse)


def _ring_backward(kind: _Kind, residuals, grad: jax.Array):
    query, keys, segments, output, lse = residuals
    # Row sums of grad·output: the softmax's own gradient (Dao et al., 2022, FlashAttention, arXiv:2205.14135, eq. 4).
    delta = jnp.einsum("bqkgd,bqkgd->bkgq", grad, output, preferred_element_type=jnp.float32)

    def attend(query_grad: jax.Array, keys: _Keys, source):
        def step(query_grad: jax.Array, block):
            block_keys, first_key = block
            more, kv_grad = _block_backward(kind, query, segments, block_keys, first_key, grad, lse, delta)
            return query_grad + more, kv_grad

        query_grad, kv_grad = lax.scan(step, query_grad, _blocks(keys, source))
        return query_grad, jax.tree.map(lambda x, like: x.swapaxes(0, 1).reshape(like.shape), kv_grad, keys[:2])

    def pass_on_and_attend(carry, source):
        keys, query_grad, kv_grad = carry
        keys, kv_grad = _pass_on(kind, (keys, kv_grad))
        query_grad, more = attend(query_grad, keys, source)
        return (keys, query_grad, jax.tree.map(jnp.add, kv_grad, more)), None

    query_grad, kv_grad = attend(_nothing(query).output, keys, kind.rank)
    if kind.size > 1:
        carry = (keys, query_grad, kv_grad)
        (_, query_grad, kv_grad), _ = lax.scan(pass_on_and_attend, carry, _sources(kind))
        kv_grad = _pass_on(kind, kv_grad)  # the last step of the way home
    key_grad, value_grad = kv_grad
    keys_grad = _Keys(key_grad.astype(keys.key.dtype), value_grad.astype(keys.value.dtype), None)
    return query_grad.astype(query.dtype), keys_grad, None


def _ring_output(kind: _Kind, query: jax.Array, keys: _Keys, segments: jax.Array | None) -> jax.Array:
    return _ring_forward(kind, query, keys, segments)[0]


_ring = jax.custom_vjp(_ring_output, nondiff_argnums=(0,))
_ring.defvjp(_ring_forward, _ring_backward)


def _sources(kind: _Kind) -> jax.Array:
    """The rank that the keys in hand come from, at each step after the local one."""
    return (kind.rank - jnp.arange(1, kind.size)) % kind.size


def _pass_on(kind: _Kind, tree):
    ring = [(rank, (rank + 1) % kind.size) for rank in range(kind.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, kind.axis, ring), tree)


def _blocks(keys: _Keys, source) -> tuple[_Keys, jax.Array]:
    """One rank's keys cut into blocks, [blocks, ...] each, and the place of each block's first key in the sequence."""
    seq = keys.key.shape[1]
    size = BLOCK_SIZE if seq % BLOCK_SIZE == 0 else seq
    cut = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1), keys)
    return cut, source * seq + jnp.arange(0, seq, size)


def _nothing(query: jax.Array) -> _Partial:
    """Attention over no keys at all."""
    batch, seq, kv_heads, group, _ = query.shape
    partial = _Partial(
        jnp.zeros(query.shape, jnp.float32), jnp.full((batch, kv_heads, group, seq), MASKED, jnp.float32)
    )
    return jax.tree.map(lambda x: vary(x, varying_axes(query)), partial)


def _scores(kind: _Kind, query: jax.Array, segments: jax.Array | None, keys: _Keys, first_key: jax.Array):
    """Scaled scores of one block, float32 [b, k, g, q, s], and its mask [b or 1, 1, 1, q, s]."""
    # The mask must seem to depend on the data. JAX would otherwise hoist it out of the scan over layers, for all blocks at
    # once: a matrix of sequence x sequence.
    query, first_key, segments, key_segments = lax.optimization_barrier((query, first_key, segments, keys.segments))
    scores = jnp.einsum("bqkgd,bskd->bkgqs", query, keys.key, preferred_element_type=jnp.float32) * kind.scale
    query_index = kind.rank * query.shape[1] - first_key + jnp.arange(query.shape[1])
    key_index = jnp.arange(keys.key.shape[1])
    mask = attention_mask(query_index, key_index, segments, key_segments, causal=kind.causal, window=kind.window)
    return scores, mask[:, None, None]


def _block_forward(kind: _Kind, query, segments, keys: _Keys, first_key) -> _Partial:
    scores, mask = _scores(kind, query, segments, keys, first_key)
    highest = jnp.where(mask, scores, MASKED).max(-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - highest), 0)
    total = jnp.maximum(weights.sum(-1), 1e-30)  # a fully masked row: output 0, log-sum-exp about MASKED
    output = jnp.einsum(
        "bkgqs,bskd->bqkgd", weights.astype(keys.value.dtype), keys.value, preferred_element_type=jnp.float32
    )
    return _Partial(output / _like_output(total), highest[..., 0] + jnp.log(total))


def _merge(a: _Partial, b: _Partial) -> _Partial:
    lse = jnp.logaddexp(a.lse, b.lse)
    output = a.output * _like_output(jnp.exp(a.lse - lse)) + b.output * _like_output(jnp.exp(b.lse - lse))
    return _Partial(output, lse)


def _block_backward(kind: _Kind, query, segments, keys: _Keys, first_key, grad, lse, delta):
    """Gradients of one block, float32: (query [b,q,k,g,d], (key, value) each [b,s,k,d])."""
    scores, mask = _scores(kind, query, segments, keys, first_key)
    weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0)
    weights_grad = jnp.einsum("bqkgd,bskd->bkgqs", grad, keys.value, preferred_element_type=jnp.float32)
    scores_grad = (weights * (weights_grad - delta[..., None]) * kind.scale).astype(query.dtype)
    weights = weights.astype(query.dtype)
    product = lambda spec, a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)  # noqa: E731
    query_grad = product("bkgqs,bskd->bqkgd", scores_grad, keys.key)
    key_grad = product("bkgqs,bqkgd->bskd", scores_grad, query)
    value_grad = product("bkgqs,bqkgd->bskd", weights, grad)
    return query_grad, (key_grad, value_grad)


def _like_output(x: jax.Array) -> jax.Array:
    """[b, k, g, q] → [b, q, k, g, 1]"""
    return x.transpose(0, 3, 1, 2)[..., None]
