"""The definition of attention, against which every implementation is tested. Stores the whole score matrix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpar.attention.mask import attention_mask
from jaxpar.parallel.collectives import MASKED


def reference_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    *,
    segment_ids: Int[Array, "batch seq"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "batch seq heads value_dim"]:
    """softmax(query keyᵀ * scale) value over the whole sequence on one device, softmax in float32.

    heads must be a multiple of kv_heads: query head i reads kv head i // (heads / kv_heads).
    See `jaxpar.attention.attention` for the masks, the scale and the soft cap. A token with no key to attend to gets zeros.
    """
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    index = jnp.arange(query.shape[1])
    mask = attention_mask(index, index, segment_ids, segment_ids, causal=causal, window=window)[:, None]
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1), 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
