"""Checks an objective before it is used: by tracing it, and a user's by computing it once on a small batch too."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.config import ConfigError
from jaxpar.objectives.apply import losses_and_metrics, weights_and_counts
from jaxpar.objectives.base import Metric, Objective, TokenStatistics

STANDARD = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32,
            "loss_mask": jnp.float32}  # fmt: skip


TOKENS = (2, 8)  # rows and tokens of the examples


def check_objective(objective: Objective, reserved: set[str], outputs: jax.ShapeDtypeStruct) -> tuple[str, ...]:
    """Traces an objective.

    Args:
      reserved: names that its metrics must not have.
      outputs: the model's of one token.

    Returns:
      The arrays of a batch that its loss and its metrics need.

    Raises:
      ConfigError: it reads an array that batches do not have, or returns something of another shape than it should.
    """
    features, shapes = _examples(objective, outputs)
    if clash := sorted(objective.inputs.keys() & STANDARD.keys()):
        raise ConfigError(f"objective: inputs: {clash[0]!r} is an array that every batch has: choose another name")
    if objective.candidates is not None and objective.candidates not in objective.inputs:
        raise ConfigError(f"objective: candidates: {objective.candidates!r} is not among its inputs: declare it there")
    read = {objective.candidates} if objective.candidates else set[str]()

    def run(features: Any, arrays: dict[str, Any]) -> tuple[jax.Array, dict[str, Metric]]:
        return losses_and_metrics(objective, features, _Recorded(arrays, read))

    losses, metrics = jax.eval_shape(run, features, shapes)
    _check_shape("its losses have", losses, "return a loss for each token; jaxpar takes their weighted mean")
    if taken := sorted(metrics.keys() & reserved):
        raise ConfigError(f"objective: {taken[0]!r} is the name of another metric: choose another")
    for name, metric in metrics.items():
        for x in jax.tree.leaves(metric):
            _check_shape(f"the metric {name!r} has", x, "return a number for each token, in a jaxpar.Mean, Sum or Max")
    for x in jax.eval_shape(lambda arrays: weights_and_counts(objective, _Recorded(arrays, set())), shapes):
        _check_shape("its weights have", x, "return a weight for each token")
    return tuple(name for name in shapes if name in read or (metrics and name == "loss_mask"))


def _check_shape(what: str, found: Any, advice: str) -> None:
    if found.shape != TOKENS:
        raise ConfigError(
            f"objective: {what} the shape {list(found.shape)} where the tokens are [batch, seq] = {list(TOKENS)}: {advice}"
        )


class _Recorded(Mapping[str, jax.Array]):
    """A batch that notes what is read of it."""

    def __init__(self, arrays: Mapping[str, jax.Array], read: set[str]):
        self._arrays, self._read = arrays, read

    def __getitem__(self, name: str) -> jax.Array:
        if name not in self._arrays:
            raise ConfigError(
                f"objective: it reads batch[{name!r}], which batches do not have: declare it with its dtype, "
                f"jaxpar.Objective(…, inputs={{{name!r}: jax.ShapeDtypeStruct((), float)}})"
            )
        self._read.add(name)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _examples(objective: Objective, outputs: jax.ShapeDtypeStruct) -> tuple[Any, dict[str, Any]]:
    """Shapes and dtypes of (what its loss takes, a batch)."""
    batch: dict[str, Any] = {name: jax.ShapeDtypeStruct(TOKENS, dtype) for name, dtype in STANDARD.items()}
    batch |= {name: jax.ShapeDtypeStruct((*TOKENS, *x.shape), x.dtype) for name, x in objective.inputs.items()}
    if objective.of_outputs:
        return jax.ShapeDtypeStruct((*TOKENS, *outputs.shape), outputs.dtype), batch
    one: Any = jax.ShapeDtypeStruct(TOKENS, jnp.float32)
    several: Any = None
    if objective.candidates in batch:
        several = jax.ShapeDtypeStruct(batch[objective.candidates].shape, jnp.float32)
    entropy, mean_logits = (one if asked else None for asked in (objective.entropy, objective.mean_logits))
    return TokenStatistics(one, one, entropy, mean_logits, several), batch


def check_independence(objective: Objective, outputs: jax.ShapeDtypeStruct) -> None:
    """Computes, on a small batch and one of this process's devices, which losses change when the statistics of one token do.

    Raises:
      ConfigError: a token's loss depends on another token, and `whole_rows` is False, or on another row.
    """
    key = jax.random.key(0)

    def numbers(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype)
        return jax.random.uniform(key, x.shape, x.dtype, 0.1, 0.9)

    given, batch = jax.tree.map(numbers, _examples(objective, outputs))
    batch["loss_mask"] = jnp.ones_like(batch["loss_mask"])

    @jax.jit
    def losses_with(step: float) -> jax.Array:
        moved = jax.tree.map(lambda x: -x.at[0, 2].add(step), given)
        return losses_and_metrics(objective, moved, batch)[0]

    before, after = losses_with(0.0), losses_with(0.3)
    changed = (before != after) & jnp.isfinite(before) & jnp.isfinite(after)
    if changed[1].any():
        raise ConfigError(
            "objective: a token's loss depends on another row of the batch, which may be in another microbatch or on another "
            "device: let it depend on its own row, and put what belongs together into one row"
        )
    if changed[0].at[2].set(False).any() and not objective.whole_rows:
        raise ConfigError(
            "objective: a token's loss depends on other tokens of its row, which may be on another device: say so with "
            "jaxpar.Objective(…, whole_rows=True), and it is given whole rows in their order"
        )
