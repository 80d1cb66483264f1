"""Sums over the documents of whole rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sum_by(ids: Int[Array, "batch seq"], values: Float[Array, "batch seq"]) -> Float[Array, "batch seq"]:
    """For each token, the sum over all tokens of its row with the same id. Ids are at least 0 and below seq."""

    def one_row(ids: jax.Array, values: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, ids, num_segments=ids.shape[0])[ids]

    return jax.vmap(one_row)(ids, values)


def one_for_each(ids: Int[Array, "batch seq"], mask: Float[Array, "batch seq"]) -> Float[Array, "batch seq"]:
    """Weights of the tokens in the mask that add up to 1 for each id that has any: each token's share of the mask."""
    total = sum_by(ids, mask)
    return mask / jnp.where(total == 0, 1, total)
