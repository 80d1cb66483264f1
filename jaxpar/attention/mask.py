"""Which keys a query may attend to: causal order, sliding window, documents of a packed sequence."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def attention_mask(
    query_index: Int[Array, " queries"],
    key_index: Int[Array, " keys"],
    query_segments: Int[Array, "batch queries"] | None,
    key_segments: Int[Array, "batch keys"] | None,
    *,
    causal: bool,
    window: int | None,
) -> Bool[Array, "batch queries keys"]:
    """True where a query may attend to a key. The batch dimension is 1 if there are no segments.

    Args:
      query_index, key_index: each token's index in the whole sequence.
      window: a query sees the `window` latest keys, itself included (Mistral 7B, arXiv:2310.06825).
    """
    distance = query_index[:, None] - key_index[None, :]
    mask = jnp.ones(distance.shape, bool)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance < window
    if query_segments is None or key_segments is None:
        return mask[None]
    return mask & (query_segments[:, :, None] == key_segments[:, None, :])
