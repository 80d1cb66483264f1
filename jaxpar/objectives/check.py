"""Checks an objective before it is used, by tracing it and by computing it once on a small batch."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.config import ConfigError
from jaxpar.objectives.apply import losses_and_metrics, weights_and_counts
from jaxpar.objectives.base import Metric, Objective, TokenStatistics

STANDARD = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32,
            "loss_mask": jnp.float32}  # fmt: skip


def check_objective(
    objective: Objective, reserved: set[str], outputs: tuple[int, ...] | None = None
) -> tuple[str, ...]:
    """Traces an objective.

    Args:
      reserved: names that its metrics must not have.
      outputs: the model's outputs of one token, if the objective takes these.

    Returns:
      The arrays of a batch that its loss reads.

    Raises:
      ConfigError: it reads an array that batches do not have, or returns something of another shape than it should; or a
        token's loss depends on another token, and `whole_rows` is False, or on another row.
    """
    tokens = (2, 8)
    shapes = {name: jax.ShapeDtypeStruct(tokens, dtype) for name, dtype in STANDARD.items()}
    shapes |= {name: jax.ShapeDtypeStruct((*tokens, *x.shape), x.dtype) for name, x in objective.inputs.items()}
    if clash := sorted(objective.inputs.keys() & STANDARD.keys()):
        raise ConfigError(f"objective: inputs: {clash[0]!r} is an array that every batch has: choose another name")
    if objective.candidates is not None and objective.candidates not in objective.inputs:
        raise ConfigError(f"objective: candidates: {objective.candidates!r} is not among its inputs: declare it there")
    read: set[str] = set()

    def run(features: Any, arrays: dict[str, Any]) -> tuple[jax.Array, dict[str, Metric]]:
        return losses_and_metrics(objective, features, _Recorded(arrays, read))

    features = _example_features(objective, shapes, outputs)
    losses, metrics = jax.eval_shape(run, features, shapes)
    if losses.shape != tokens:
        raise ConfigError(
            f"objective: its losses have the shape {list(losses.shape)} where the tokens are [batch, seq] = {list(tokens)}: "
            f"return a loss for each token; jaxpar takes their weighted mean"
        )
    if taken := sorted(metrics.keys() & reserved):
        raise ConfigError(f"objective: {taken[0]!r} is the name of another metric: choose another")
    for name, metric in metrics.items():
        for x in jax.tree.leaves(metric):
            if x.shape != tokens:
                raise ConfigError(
                    f"objective: the metric {name!r} has the shape {list(x.shape)} where the tokens are [batch, seq] = "
                    f"{list(tokens)}: return a number for each token, in a jaxpar.Mean, Sum or Max"
                )
    for x in jax.eval_shape(lambda arrays: weights_and_counts(objective, _Recorded(arrays, set())), shapes):
        if x.shape != tokens:
            raise ConfigError(f"objective: its weights have the shape {list(x.shape)} for tokens {list(tokens)}")
    _check_independence(objective, features, shapes)
    return tuple(name for name in shapes if name in read)


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


def _example_features(objective: Objective, shapes: Mapping[str, Any], outputs: tuple[int, ...] | None) -> Any:
    tokens = shapes["tokens"].shape
    if objective.of_outputs:
        return jax.ShapeDtypeStruct((*tokens, *(outputs or (8,))), jnp.float32)
    one: Any = jax.ShapeDtypeStruct(tokens, jnp.float32)
    candidates: Any = None
    if objective.candidates is not None:
        candidates = jax.ShapeDtypeStruct(shapes[objective.candidates].shape, jnp.float32)
    return TokenStatistics(
        one, one, one if objective.entropy else None, one if objective.mean_logits else None, candidates
    )


def _check_independence(objective: Objective, features: Any, shapes: Mapping[str, Any]) -> None:
    """Computes on a small batch which losses change when the statistics of one token do."""
    key = jax.random.key(0)

    def numbers(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype)
        return jax.random.uniform(key, x.shape, x.dtype, 0.1, 0.9)

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        given, batch = jax.tree.map(numbers, (features, dict(shapes)))
        batch["loss_mask"] = jnp.ones_like(batch["loss_mask"])

        def losses_with(step: jax.Array) -> jax.Array:
            moved = jax.tree.map(lambda x: -x.at[0, 2].add(step.astype(x.dtype)), given)
            return losses_and_metrics(objective, moved, batch)[0]

        before, after = jax.jit(losses_with)(jnp.float32(0)), jax.jit(losses_with)(jnp.float32(0.3))
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
