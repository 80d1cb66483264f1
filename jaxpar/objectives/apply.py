"""Calls an objective's functions."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.config import ConfigError
from jaxpar.objectives.base import Batch, Metric, Objective


def as_objective(given: Any) -> Objective:
    """An objective, or a function (statistics, batch) → losses as one.

    Raises:
      ConfigError: it is neither.
    """
    if isinstance(given, Objective):
        return given
    if callable(given):
        return Objective(given)
    raise ConfigError(
        f"objective: a {type(given).__name__} is no objective: give a function (jaxpar.TokenStatistics, batch) → losses "
        f"[batch, seq], or a jaxpar.Objective"
    )


def losses_and_metrics(objective: Objective, features: Any, batch: Batch) -> tuple[jax.Array, dict[str, Metric]]:
    """What `objective.loss` returns for these tokens."""
    result = objective.loss(features, batch)
    losses, metrics = result if isinstance(result, tuple) else (result, {})
    return losses.astype(jnp.float32), metrics


def weights_and_counts(objective: Objective, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What `objective.weights` returns for whole rows."""
    result = batch["loss_mask"] if objective.weights is None else objective.weights(batch)
    weights, counts = result if isinstance(result, tuple) else (result, result)
    return weights.astype(jnp.float32), counts.astype(jnp.float32)
