"""Rollouts, and how they lie in the rows of a global batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpar.config import ConfigError
from jaxpar.data import DocumentCost, pack_row, plan_rows
from jaxpar.program import Program


@dataclass(frozen=True)
class Rollout:
    """A prompt and a sampled answer. Arrays are numpy, or lists.

    Attributes:
      tokens: int [length], the prompt and then the answer.
      prompt_length: how many of them are the prompt's, at least 1.
      reward: of the whole answer.
      log_probs: float [answer], of the answer's tokens, from the engine that sampled them, at its temperature. Only read with
        `algorithm.recompute_logprobs: False`.
      mask: bool [answer], which of them are trained on; a tool's output is not. Default: all.
      values: float [answer], a critic's, for `adv_type: gae`. Default: none.
    """

    tokens: Any
    prompt_length: int
    reward: float
    log_probs: Any = None
    mask: Any = None
    values: Any = None

    @property
    def answer_length(self) -> int:
        return len(self.tokens) - self.prompt_length


class PackedRollouts:
    """Rollouts in the rows of a global batch: one in each; or with dynamic batches, whole ones one after another.

    Attributes:
      batch: `tokens`, `targets`, `loss_mask`, `segment_ids`, `positions`, each [rows, seq], as `trainer.train_step` takes it.

    Raises:
      ConfigError: a rollout is too long, or they are not as many as a global batch has.
    """

    def __init__(self, rollouts: Sequence[Rollout], program: Program):
        self._rollouts, length = rollouts, program.blueprint.config.row_length
        self._rows = _rows(rollouts, program)
        rows = [pack_row([np.asarray(rollouts[i].tokens) for i in row], length) for row in self._rows]
        self.batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        masks = [
            np.ones(rollout.answer_length) if rollout.mask is None else np.asarray(rollout.mask) for rollout in rollouts
        ]
        self.batch["loss_mask"] = self.spread(masks)

    def spread(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Numbers of each answer's tokens → float32 [rows, seq], where these are the targets; 0 elsewhere."""
        array = np.zeros(self.batch["tokens"].shape, np.float32)
        for rollout, (row, span) in self._places():
            array[row, span] = values[rollout]
        return array

    def of_answers(self, array: np.ndarray) -> list[np.ndarray]:
        """[rows, seq] → the numbers of each answer's tokens, in the order of the rollouts. The inverse of `spread`."""
        found = {rollout: array[row, span] for rollout, (row, span) in self._places()}
        return [found[i] for i in range(len(self._rollouts))]

    def _places(self) -> Any:
        """(number of a rollout, (row, where the answer's targets are))."""
        for row, rollouts in enumerate(self._rows):
            start = 0
            for i in rollouts:
                stop = start + len(self._rollouts[i].tokens) - 1  # the last token is a target only
                yield i, (row, slice(stop - self._rollouts[i].answer_length, stop))
                start = stop


def check_rollouts(rollouts: Sequence[Rollout], length: int) -> None:
    """Raises ConfigError about the first one that is not as `Rollout` says, or has more tokens than fit into a row."""
    for i, rollout in enumerate(rollouts):
        if not 0 < rollout.prompt_length < len(rollout.tokens):
            raise ConfigError(
                f"rollouts: number {i} has {len(rollout.tokens)} tokens, of which prompt_length: {rollout.prompt_length}: a prompt "
                f"and an answer need a token at least"
            )
        if len(rollout.tokens) - 1 > length:
            raise ConfigError(
                f"rollouts: number {i} has {len(rollout.tokens)} tokens, but a row has room for {length} + 1: sample shorter "
                f"answers, or raise runner.seq_length (with dynamic batches runner.max_tokens_per_mbs)"
            )
        for name in ("log_probs", "mask", "values"):
            given = getattr(rollout, name)
            if given is not None and np.shape(given) != (rollout.answer_length,):
                raise ConfigError(
                    f"rollouts: number {i}: {name} is {list(np.shape(given))}, but the answer has {rollout.answer_length} tokens"
                )


def _rows(rollouts: Sequence[Rollout], program: Program) -> list[list[int]]:
    """The rollouts in each row, the rows of a dp rank one after another."""
    config = program.blueprint.config
    if not config.runner.enable_dynamic_batch_size:
        return [[i] for i in range(len(rollouts))]
    lengths, cost = np.array([len(r.tokens) - 1 for r in rollouts]), DocumentCost(*program.blueprint.document_flops)
    plan = plan_rows(lengths, config.row_length, program.mesh.shape["dp"], cost)
    return [row for rank in plan.rows for row in rank]
