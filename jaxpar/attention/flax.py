"""`flax_attention`: the `attention_fn` of Flax's attention layers, in Linen and in nnx."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpar.attention.dispatch import Order, attention


def flax_attention(
    query: Float[Array, "*batch seq heads head_dim"],
    key: Float[Array, "*batch seq kv_heads head_dim"],
    value: Float[Array, "*batch seq kv_heads value_dim"],
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: bool | None = None,
    *,
    segment_ids: Int[Array, "*batch seq"] | None = None,
    causal: bool | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    axis: str | None = "cp",
    order: Order | None = None,
) -> Float[Array, "*batch seq heads value_dim"]:
    """`jaxpar.attention.attention` as Flax's layers call it.

        attend = functools.partial(flax_attention, causal=True, segment_ids=info.segment_ids)
        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=attend)(x)

    The arguments up to `is_causal` are Flax's, which the layers pass. The others are for `functools.partial`, and have the
    meanings that they have in `attention`.

    Args:
      dtype: query, key and value are cast to it; None: to the dtype that holds all three.
      broadcast_dropout, dropout_rng, deterministic: of no effect, because there is no dropout.
      force_fp32_for_softmax: of no effect, because the softmax is float32 always.
      is_causal: what nnx passes; False if its caller says nothing. Linen does not pass it.
      causal: None: `is_causal=True` if nnx was told so; in Linen True, as in `attention`.

    Returns:
      An array of `dtype`.

    Raises:
      ValueError: Flax asks for what this attention does not have: a mask or bias as an array, dropout, a precision, weights
        to look at, an einsum of one's own; in nnx, neither causal order nor its absence is asked for. Or as in `attention`.
    """
    asked = {
        "mask": mask,
        "bias": bias,
        "dropout_rate": None if deterministic or not dropout_rate else dropout_rate,
        "precision": precision,
        "module": module,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, argument in asked.items():
        if argument is not None:
            raise ValueError(f"flax_attention: {_INSTEAD[name]}")
    arrays = _as_flax_casts(query, key, value, dtype)
    batch = query.shape[:-3]
    output = attention(
        *(x.reshape(-1, *x.shape[-3:]) for x in arrays),
        segment_ids=None if segment_ids is None else segment_ids.reshape(-1, segment_ids.shape[-1]),
        causal=_is_causal(causal, is_causal),
        window=window,
        scale=scale,
        soft_cap=soft_cap,
        axis=axis,
        order=order,
    )
    return output.reshape(*batch, *output.shape[1:])


# What to do about an argument of Flax's.
_INSTEAD = {
    "mask": "a mask is an array of queries x keys, which cannot be split along the sequence: give the layer no mask, and say "
    "what it masks in functools.partial(flax_attention, ...): causal=True, window=, segment_ids= (padding is a document of "
    "its own). decode=True, which makes a mask, is not supported",
    "bias": "a bias is an array of queries x keys, which cannot be split along the sequence: leave it out",
    "dropout_rate": "dropout of attention weights is not supported: set the layer's dropout_rate to 0, or deterministic=True",
    "precision": "it takes no precision: leave the layer's out, and call it inside jax.default_matmul_precision(...)",
    "module": "sow_weights is not supported: the attention weights are never all there",
    "qk_attn_weights_einsum": "qk_attn_weights_einsum_cls is not supported: leave it out",
    "attn_weights_value_einsum": "attn_weights_value_einsum_cls is not supported: leave it out",
}


def _as_flax_casts(query: jax.Array, key: jax.Array, value: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)


def _is_causal(causal: bool | None, told: bool | None) -> bool:
    """`causal` is what functools.partial was given, `told` what nnx passes."""
    if causal is None and told is False:
        raise ValueError(
            "flax_attention: nnx says is_causal=False, which is also what it says if nobody told it: write causal=True in "
            "functools.partial(flax_attention, ...), or causal=False if a token attends to later tokens too"
        )
    if causal is False and told:
        raise ValueError("flax_attention: causal=False in functools.partial, but is_causal=True from nnx: choose one")
    return causal is not False
