"""Supervised fine-tuning: cross-entropy of the answers. Prompts are read, but not trained on.

`completion_mask` says which targets belong to an answer. `loss_agg_func` says what is averaged, under RLinf's names:

    token-mean            Σ_tokens loss / number of tokens
    seq-mean-token-sum    mean over documents of Σ_tokens loss
    seq-mean-token-mean   mean over documents of the mean over its tokens
"""

import jax
import jax.numpy as jnp

from jaxpar.objectives.base import Batch, Mean, Objective, Sum, TokenStatistics
from jaxpar.objectives.documents import one_for_each

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def fine_tuning(loss_agg_func: str = "token-mean") -> Objective:
    """The objective. Metrics: `prompt_loss`, the cross-entropy of the prompts; `completion_tokens`, their number."""

    def loss(tokens: TokenStatistics, batch: Batch) -> tuple:
        is_prompt = batch["loss_mask"] * (batch["completion_mask"] == 0)
        return -tokens.log_probs, {
            "prompt_loss": Mean(-tokens.log_probs, is_prompt),
            "completion_tokens": Sum(jnp.ones_like(tokens.log_probs)),
        }

    def weights(batch: Batch) -> tuple[jax.Array, jax.Array]:
        return aggregated(batch["loss_mask"] * batch["completion_mask"], batch["segment_ids"], loss_agg_func)

    return Objective(loss, weights, inputs={"completion_mask": jax.ShapeDtypeStruct((), jnp.float32)})


def aggregated(mask: jax.Array, segment_ids: jax.Array, loss_agg_func: str) -> tuple[jax.Array, jax.Array]:
    """(weights, counts) of `Objective`, for one of `AGGREGATIONS`. `mask`: [batch, seq], of whole rows."""
    if loss_agg_func == "token-mean":
        return mask, mask
    shares = one_for_each(segment_ids, mask)
    return (mask if loss_agg_func == "seq-mean-token-sum" else shares), shares
