"""The validation loss, without gradients, on the validation data in their stored order."""

from collections.abc import Iterator

import numpy as np

from jaxpar.data.loader import Batch, SampleSource
from jaxpar.program import Program


class Evaluation:
    """Evaluates parameters on validation samples.

    Args:
      samples: any number of them; empty rows fill up the last batch.
      max_batches: number of global batches to evaluate, starting with the first; None: all.
    """

    def __init__(self, program: Program, samples: SampleSource, max_batches: int | None):
        self._program, self._samples = program, samples
        available = -(-len(samples) // program.batch_layout.shape[0])
        self._num_batches = min(available, max_batches or available)

    def loss(self, params: object) -> float:
        """The objective's mean over all batches together; by default nats per token."""
        loss, tokens = 0.0, 0.0
        for batch in self._batches():
            sums = self._program.evaluate(params, self._program.batch_layout.put_on_mesh(batch))
            loss, tokens = loss + float(sums["loss"]), tokens + float(sums["tokens"])
        return loss / (tokens or 1)

    def _batches(self) -> Iterator[Batch]:
        """This process's rows of each global batch."""
        size = self._program.batch_layout.shape[0]
        for first in range(0, self._num_batches * size, size):
            rows = [self._sample(first + row) for row in self._program.batch_layout.rows]
            yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _sample(self, index: int) -> Batch:
        if index < len(self._samples):
            return self._samples[index]
        filler = self._samples[0]
        return {**filler, "loss_mask": np.zeros_like(filler["loss_mask"])}
