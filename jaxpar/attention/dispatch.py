"""`attention`, the one function that models call."""

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpar.attention.all_gather import all_gather_attention
from jaxpar.attention.all_to_all import all_to_all_attention
from jaxpar.attention.names import CORE_ATTENTION
from jaxpar.attention.ring import Ring, ring_attention
from jaxpar.attention.settings import current_settings
from jaxpar.attention.types import AttentionSpec, Keys
from jaxpar.parallel.collectives import manual, vary, varying_axes


def attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    *,
    segment_ids: Int[Array, "batch seq"] | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """softmax(query keyᵀ / sqrt(head_dim)) value over the whole sequence, even if each cp rank holds only a part of it.

    It can be called anywhere. Inside jaxpar's train step, `seq` is this rank's two chunks of the sequence (see
    `jaxpar.attention.zigzag_order`), and kernels of GPUs compute it. Elsewhere it is the whole sequence, in plain JAX.

    Args:
      query, key, value: any float dtype. heads is a multiple of kv_heads (grouped-query attention: query head i reads
        kv head i // (heads / kv_heads)); only the kv heads travel.
      segment_ids: a token attends only to tokens with the same id (the documents of a packed sequence). Inside jaxpar's train
        step they do not decrease along the sequence, which kernels of GPUs need.
      causal: a token attends only to itself and to earlier tokens.
      window: of these, a token attends only to the latest `window`.

    Returns:
      An array of the query's dtype; statistics and sums are float32. A token with no key to attend to gets zeros.

    Raises:
      ValueError: heads is not a multiple of kv_heads, or seq is odd with cp > 1.
      ConfigError: the heads cannot be shared out as `actor.model.cp_comm_type` requires.
    """
    batch, seq, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {kv_heads} kv heads")
    size = lax.axis_size("cp") if manual("cp") else 1
    if size > 1 and seq % 2:
        raise ValueError(
            f"attention: {seq} tokens on a cp rank are not two chunks: choose a sequence length that is a multiple of "
            f"2 * cp = {2 * size}"
        )
    axes = {"cp"}.union(*(varying_axes(x) for x in (query, key, value, segment_ids) if x is not None))
    query, key, value, segment_ids = jax.tree.map(
        lambda x: vary(x, tuple(sorted(axes))), (query, key, value, segment_ids)
    )
    settings = current_settings()
    spec = AttentionSpec(causal, window, head_dim**-0.5, settings.backend)
    grouped, keys = query.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim), Keys(key, value, segment_ids)
    with jax.named_scope(CORE_ATTENTION):
        if size == 1 or settings.cp_comm_type == "p2p":
            output = ring_attention(spec, Ring(size), grouped, keys)
        elif settings.cp_comm_type == "all_gather":
            output = all_gather_attention(spec, size, grouped, keys)
        else:
            group = size if settings.cp_comm_type == "a2a" else settings.a2a_size
            output = all_to_all_attention(spec, size, group, grouped, keys)
    return output.reshape(query.shape)
