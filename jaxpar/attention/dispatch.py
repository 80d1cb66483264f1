"""The one function that models call."""

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpar.attention.all_gather import all_gather_attention
from jaxpar.attention.all_to_all import all_to_all_attention
from jaxpar.attention.ring import Ring, ring_attention
from jaxpar.attention.settings import current_settings
from jaxpar.attention.types import Keys, Kind
from jaxpar.parallel.collectives import manual, vary, varying_axes

CORE_ATTENTION = "core_attention"  # scope of what recompute_granularity: selective computes again


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

    Call it anywhere: inside jaxpar's train step `seq` is this rank's two chunks of the sequence (see
    `jaxpar.attention.zigzag_order`), elsewhere it is all of it.

    Args:
      query, key, value: any float dtype. heads is a multiple of kv_heads (grouped-query attention: query head i reads
        kv head i // (heads / kv_heads)); only the kv heads travel.
      segment_ids: a token attends only to tokens with the same id (documents of a packed sequence).
      causal: a token attends to itself and to earlier ones.
      window: and to the `window` latest of these only.

    Returns:
      The query's dtype; statistics and sums are float32. A token that may attend to nothing gets zeros.

    Raises:
      ValueError: heads is not a multiple of kv_heads, or seq is odd with cp > 1.
      ConfigError: `actor.model.cp_comm_type` does not suit the heads.
    """
    batch, seq, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {kv_heads} kv heads")
    size = lax.axis_size("cp") if manual("cp") else 1
    if size > 1 and seq % 2:
        raise ValueError(f"attention: {seq} tokens on a cp rank are not two chunks: the sequence must divide by 2 * cp")
    axes = {"cp"}.union(*(varying_axes(x) for x in (query, key, value, segment_ids) if x is not None))
    query, key, value, segment_ids = jax.tree.map(
        lambda x: vary(x, tuple(sorted(axes))), (query, key, value, segment_ids)
    )
    settings = current_settings()
    kind = Kind(causal, window, head_dim**-0.5, settings.backend)
    grouped, keys = query.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim), Keys(key, value, segment_ids)
    with jax.named_scope(CORE_ATTENTION):
        if size == 1 or settings.cp_comm_type == "p2p":
            output = ring_attention(kind, Ring(size), grouped, keys)
        elif settings.cp_comm_type == "all_gather":
            output = all_gather_attention(kind, size, grouped, keys)
        else:
            group = size if settings.cp_comm_type == "a2a" else settings.a2a_size
            output = all_to_all_attention(kind, size, group, grouped, keys)
    return output.reshape(query.shape)
