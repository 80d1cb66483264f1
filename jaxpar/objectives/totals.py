"""Sums over tokens that become the loss and the metrics of a step: added up over microbatches, then over devices."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.objectives.base import Batch, Max, Mean, Metric, Sum
from jaxpar.parallel.collectives import manual, sum_over, varying_axes

Totals = dict[str, "Total"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "weight"], meta_fields=["is_max"])
@dataclass(frozen=True)
class Total:
    """One metric so far, float32 scalars.

    Attributes:
      value: a sum, or the largest.
      weight: what a mean's sum is divided by; None for others.
      is_max: whether `value` is the largest.
    """

    value: jax.Array
    weight: jax.Array | None = None
    is_max: bool = False


def totals_of(metrics: Mapping[str, Metric], batch: Batch) -> Totals:
    """The totals over one microbatch's tokens on this device.

    Args:
      batch: "weights" and "counts" (default: the weights) of the tokens in the loss, see `Objective`, and "loss_mask", each
        [batch, seq]. Tokens that only fill up a stage's share have 0 in all of them.
    """
    weights, counts = batch["weights"], batch.get("counts", batch["weights"])

    def one(metric: Any) -> Total:
        trained = weights != 0
        match metric:
            case Sum(values):
                return Total(jnp.where(trained, values, 0).astype(jnp.float32).sum())
            case Max(values):
                return Total(jnp.where(trained, values, -jnp.inf).astype(jnp.float32).max(), is_max=True)
            case Mean(values, own):
                own = None if own is None else jnp.where(batch["loss_mask"] != 0, own, 0)
                weight, count = (weights, counts) if own is None else (own, own)
                return Total(jnp.where(weight != 0, values * weight, 0).astype(jnp.float32).sum(), count.sum())
            case _:
                return one(Mean(metric))

    return {name: one(lax.stop_gradient(metric)) for name, metric in metrics.items()}


def add_totals(a: Totals, b: Totals, b_counts: Any = True) -> Totals:
    """Both together. `b_counts`: False if the sums of `b` are 0, and its largest values mean nothing."""

    def one(a: Total, b: Total) -> Total:
        if a.is_max:
            return Total(jnp.maximum(a.value, jnp.where(b_counts, b.value, -jnp.inf)), is_max=True)
        return jax.tree.map(jnp.add, a, b)

    return {name: one(a[name], b[name]) for name in a}


def start_of(like: Totals) -> Totals:
    """The totals over no tokens, from zeros like the totals that will be added."""
    return {name: Total(x.value - jnp.inf, is_max=True) if x.is_max else x for name, x in like.items()}


def joined(stacked: Totals) -> Totals:
    """The totals over the leading dimension."""
    return {
        name: Total(x.value.max(0), is_max=True) if x.is_max else jax.tree.map(lambda a: a.sum(0), x)
        for name, x in stacked.items()
    }


def finished(totals: Totals) -> dict[str, jax.Array]:
    """The metrics of the whole global batch, the same on all devices."""

    def one(x: Total) -> jax.Array:
        if x.is_max:
            axes = manual(*varying_axes(x.value))
            return lax.pmax(x.value, axes) if axes else x.value
        value = sum_over(x.value, varying_axes(x.value))
        if x.weight is None:
            return value
        weight = sum_over(x.weight, varying_axes(x.weight))
        return value / jnp.where(weight == 0, 1, weight)

    return {name: one(x) for name, x in totals.items()}
