"""The actor: one call trains on a batch of rollouts, as a step of RLinf's Megatron actor."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxpar.config import ConfigError
from jaxpar.objectives.actor import kl_penalty
from jaxpar.rl.advantages import Answers, advantages_of, check_algorithm
from jaxpar.rl.rollouts import PackedRollouts, Rollout, check_rollouts
from jaxpar.trainer import Trainer


class Actor:
    """Trains on rollouts, by the section `algorithm` of the config with `loss_type: actor`.

    Args:
      trainer: of the model that answers.
      reference: parameters of the reference model, a tree like `trainer.state["params"]`, of any float dtype. Default: where the
        config needs a reference (`kl_beta` or `reinpp_kl_beta` above 0), the weights that training started from, in the compute
        dtype, split like the trainer's. It has no optimizer and is never trained.

    Attributes:
      reference: None if none is needed.

    Raises:
      ConfigError: a setting of `algorithm` is wrong.
    """

    def __init__(self, trainer: Trainer, reference: Any = None):
        self._trainer, self._algorithm = trainer, trainer.config.algorithm
        if self._algorithm.loss_type != "actor" and trainer.program.blueprint.user_objective is None:
            raise ConfigError(
                f"algorithm.loss_type: {self._algorithm.loss_type}, but an actor trains with loss_type: actor, or with an objective "
                f"of your own, Trainer(config, objective=…)"
            )
        check_algorithm(self._algorithm)
        in_rewards = self._algorithm.adv_type == "reinpp" and self._algorithm.reinpp_kl_beta > 0
        self._inputs = trainer.program.blueprint.objective.inputs.keys()
        needed = in_rewards or "ref_log_probs" in self._inputs
        self.reference = reference if reference is not None or not needed else trainer.reference_params()

    @property
    def num_rollouts(self) -> int:
        """Rollouts that one call of `train` takes: `n_minibatches` global batches."""
        return self._algorithm.n_minibatches * self._trainer.config.actor.global_batch_size

    def train(self, rollouts: Sequence[Rollout]) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Takes one optimizer step for each minibatch. A collective call: all processes give all rollouts.

        The log-probabilities that ratios are taken to are those of the parameters before the first of these steps.

        Args:
          rollouts: `num_rollouts` of them. The answers to one prompt, `algorithm.group_size` of them, follow one another.

        Returns:
          (metrics of the rollouts, metrics of each step), under RLinf's names.

        Raises:
          ConfigError: they are too many, too few or too long, or lack what the config asks for.
        """
        trainer, algorithm, count = self._trainer, self._algorithm, len(rollouts)
        if count != self.num_rollouts:
            raise ConfigError(
                f"rollouts: {count}, expected algorithm.n_minibatches * actor.global_batch_size = {algorithm.n_minibatches} * "
                f"{trainer.config.actor.global_batch_size} = {self.num_rollouts}"
            )
        check_rollouts(rollouts, trainer.config.row_length)
        order = np.arange(count)
        if algorithm.shuffle_rollout:
            order = np.random.default_rng([trainer.config.actor.seed, int(trainer.state["step"])]).permutation(count)
        parts = order.reshape(algorithm.n_minibatches, -1)
        minibatches = [PackedRollouts([rollouts[i] for i in part], trainer.program) for part in parts]
        old = self._old_log_probs(rollouts, parts, minibatches)
        reference = self._log_probs(parts, minibatches, self.reference) if self.reference is not None else None
        answers = _answers(rollouts, old, reference, algorithm.kl_penalty_type)
        padded = advantages_of(answers, algorithm)
        advantages = [row[: rollout.answer_length] for row, rollout in zip(padded, rollouts, strict=True)]
        given = {"advantages": advantages, "old_log_probs": old, "ref_log_probs": reference}
        steps = []
        for part, minibatch in zip(parts, minibatches, strict=True):
            more = {
                name: minibatch.spread([values[i] for i in part])
                for name, values in given.items()
                if name in self._inputs and values is not None
            }
            steps.append(trainer.train_step({**minibatch.batch, **more}))
        return _rollout_metrics(rollouts, padded[answers.mask]), [
            {name: float(value) for name, value in step.items()} for step in steps
        ]

    def _old_log_probs(
        self, rollouts: Sequence[Rollout], parts: np.ndarray, minibatches: Sequence[PackedRollouts]
    ) -> list[np.ndarray]:
        """Of each answer's tokens, under the parameters that they were sampled with."""
        if self._algorithm.recompute_logprobs:
            return self._log_probs(parts, minibatches)
        for i, rollout in enumerate(rollouts):
            if rollout.log_probs is None:
                raise ConfigError(
                    f"rollouts: number {i} has no log_probs: give those of the engine that sampled it, or set "
                    f"algorithm.recompute_logprobs: True"
                )
        return [np.asarray(rollout.log_probs, np.float32) for rollout in rollouts]

    def _log_probs(
        self, parts: np.ndarray, minibatches: Sequence[PackedRollouts], params: Any = None
    ) -> list[np.ndarray]:
        """Of each answer's tokens, in the order of the rollouts. `params`: default the trainer's."""
        found: dict[int, np.ndarray] = {}
        for part, minibatch in zip(parts, minibatches, strict=True):
            log_probs = _on_host(self._trainer.log_probs(minibatch.batch, params=params))
            found |= zip(part.tolist(), minibatch.of_answers(log_probs), strict=True)
        return [found[i] for i in range(len(found))]


def _answers(
    rollouts: Sequence[Rollout], old: list[np.ndarray], reference: list[np.ndarray] | None, kl_penalty_type: Any
) -> Answers:
    def padded(values: Sequence[Any]) -> np.ndarray:
        array = np.zeros((len(rollouts), max(rollout.answer_length for rollout in rollouts)))
        for row, one in zip(array, values, strict=True):
            row[: len(one)] = one
        return array

    masks = [np.ones(r.answer_length) if r.mask is None else r.mask for r in rollouts]
    values = [r.values for r in rollouts if r.values is not None]
    if values and len(values) < len(rollouts):
        raise ConfigError(
            f"rollouts: {len(values)} of {len(rollouts)} have a critic's values: give them with all or with none"
        )
    kl = None
    if reference is not None:
        kl = np.asarray(kl_penalty(jnp.asarray(padded(old) - padded(reference), jnp.float32), kl_penalty_type))
    rewards = np.array([rollout.reward for rollout in rollouts], float)
    if not np.isfinite(rewards).all():
        raise ConfigError(
            f"rollouts: number {np.flatnonzero(~np.isfinite(rewards))[0]} has a reward that is not finite"
        )
    return Answers(rewards, padded(masks) > 0, padded(values) if values else None, kl)


def _rollout_metrics(rollouts: Sequence[Rollout], advantages: np.ndarray) -> dict[str, float]:
    """RLinf's names: means over the rollouts, and of the advantages of the tokens that are trained on."""
    prompts, answers = (
        np.array([r.prompt_length for r in rollouts]),
        np.array([r.answer_length for r in rollouts]),
    )
    numbers = {
        "total_num_sequence": len(rollouts),
        "prompt_length": prompts.mean(),
        "response_length": answers.mean(),
        "total_length": (prompts + answers).mean(),
        "reward_scores": np.mean([r.reward for r in rollouts]),
        "advantages_mean": advantages.mean(),
        "advantages_max": advantages.max(),
        "advantages_min": advantages.min(),
    }
    return {f"rollout/{name}": float(value) for name, value in numbers.items()}


def _on_host(array: jax.Array) -> np.ndarray:
    """The whole of a global array, on every process."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
