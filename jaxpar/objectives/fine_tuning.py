"""Supervised fine-tuning: cross-entropy of the answers. Prompts are read, but not trained on.

`completion_mask` says which targets belong to an answer. `loss_agg_func` says what is averaged, under RLinf's names:

    token-mean            Σ_tokens loss / number of tokens
    seq-mean-token-sum    mean over documents of Σ_tokens loss
    seq-mean-token-mean   mean over documents of the mean over its tokens
"""

from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.config import ConfigError
from jaxpar.config.errors import one_of
from jaxpar.config.keys import LossAggregation
from jaxpar.objectives.base import Batch, Mean, Objective, Sum, TokenStatistics
from jaxpar.objectives.documents import one_for_each


def fine_tuning(loss_agg_func: LossAggregation = "token-mean") -> Objective:
    """The objective. Metrics: `prompt_loss`, the cross-entropy of the prompts; `completion_tokens`, how many are trained on.

    Raises:
      ConfigError: `loss_agg_func` is none of these.
    """
    check_name("loss_agg_func", loss_agg_func, LossAggregation)

    def loss(tokens: TokenStatistics, batch: Batch) -> tuple:
        is_prompt = (batch["completion_mask"] == 0).astype(jnp.float32)
        return -tokens.log_probs, {
            "prompt_loss": Mean(-tokens.log_probs, is_prompt),
            "completion_tokens": Sum(jnp.ones_like(tokens.log_probs)),
        }

    def weights(batch: Batch) -> tuple[jax.Array, jax.Array]:
        return aggregated(batch["loss_mask"] * batch["completion_mask"], batch["segment_ids"], loss_agg_func)

    def problem(batch: Mapping[str, np.ndarray]) -> str | None:
        if (batch["loss_mask"] * batch["completion_mask"]).any():
            return None
        return "loss_mask * completion_mask is 0 everywhere, so nothing would be trained on"

    inputs = {"completion_mask": jax.ShapeDtypeStruct((), jnp.float32)}
    return Objective(loss, weights, inputs, problem=problem)


def check_name(setting: str, name: str, known: Any) -> None:
    """Raises ConfigError unless `name` is one of the Literal `known`."""
    if name not in (names := get_args(known)):
        raise ConfigError(f"objective: {setting}: {name!r} is unknown: {one_of(names)}")


def aggregated(mask: jax.Array, segment_ids: jax.Array, loss_agg_func: LossAggregation) -> tuple[jax.Array, jax.Array]:
    """(weights, counts) of `Objective`, for one of these names. `mask`: [batch, seq], of whole rows."""
    if loss_agg_func == "token-mean":
        return mask, mask
    shares = one_for_each(segment_ids, mask)
    return (mask if loss_agg_func == "seq-mean-token-sum" else shares), shares
