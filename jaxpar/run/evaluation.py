"""The validation loss, without gradients."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxpar.config import ConfigError
from jaxpar.data.loader import Batch, SampleSource
from jaxpar.program import Program
from jaxpar.run.processes import highest
from jaxpar.run.sources import own_rows

EvalBatches = Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]


class Evaluation:
    """Evaluates parameters on the same batches each time.

    Args:
      batches: gives this process's rows of each global batch, the same number of batches in all processes.
    """

    def __init__(self, program: Program, batches: Callable[[], Iterable[Batch]]):
        self._program, self._batches = program, batches

    def loss(self, params: object) -> float:
        """The objective's mean over all batches together; by default nats per token."""
        loss, tokens = 0.0, 0.0
        for batch in self._batches():
            sums = self._program.evaluate(params, self._program.batch_layout.put_on_mesh(batch))
            loss, tokens = loss + float(sums["loss"]), tokens + float(sums["tokens"])
        return loss / (tokens or 1)


def sample_batches(program: Program, samples: SampleSource, max_batches: int | None) -> Iterator[Batch]:
    """Validation samples in their stored order; empty rows fill up the last batch.

    Args:
      max_batches: number of global batches, starting with the first; None: all.
    """
    size = program.batch_layout.shape[0]
    num_batches = min(-(-len(samples) // size), max_batches or len(samples))

    def sample(index: int) -> Batch:
        if index < len(samples):
            return samples[index]
        filler = samples[0]
        return {**filler, "loss_mask": np.zeros_like(filler["loss_mask"])}

    for first in range(0, num_batches * size, size):
        rows = [sample(first + row) for row in program.batch_layout.rows]
        yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def user_batches(program: Program, batches: EvalBatches, max_batches: int | None) -> Iterator[Batch]:
    """A user's validation batches from the first on, until they end in one of the processes."""
    iterator = itertools.islice(batches() if callable(batches) else batches, max_batches)
    for batch in iterator:
        if highest(0)[0]:
            return
        yield own_rows(program.batch_layout, batch, "eval_batches")
    highest(1)


def check_eval_batches(program: Program, batches: EvalBatches) -> None:
    """Raises ConfigError if they cannot be read more than once, or are never asked for."""
    if program.blueprint.config.runner.val_check_interval <= 0:
        raise ConfigError(
            "eval_batches: given, but runner.val_check_interval is not, so they would never be used: set it to the number of "
            "steps between two evaluations"
        )
    if not callable(batches) and (isinstance(batches, Mapping) or not isinstance(batches, Iterable)):
        raise ConfigError(
            f"eval_batches: a {type(batches).__name__}, expected an iterable of global batches, or a function without "
            f"arguments that returns one"
        )
    if isinstance(batches, Iterator):
        raise ConfigError(
            "eval_batches: an iterator can be read only once, but every evaluation reads them from the first: give a list, a "
            "dataset, or a function that returns an iterator"
        )
