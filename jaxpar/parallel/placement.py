"""Which layers each pipeline stage holds. No jax here."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

NONE = -1  # instead of a layer: a slot that only pads


@dataclass(frozen=True)
class LayerPlacement:
    """Layers on P stages of V chunks; chunk c of stage s is the virtual stage c·P + s, and layers go through the virtual
    stages in order.

    Every virtual stage gets the same number of layers, the first `num_layers mod PV` of them one more. All run one
    program, so the others' last slot is computed too and its result thrown away.
    """

    num_layers: int
    num_stages: int = 1
    num_chunks: int = 1

    @property
    def slots_per_chunk(self) -> int:
        return -(-self.num_layers // (self.num_stages * self.num_chunks))

    @cached_property
    def counts(self) -> np.ndarray:
        """int [stages, chunks]: layers, without padding."""
        virtual = self.num_stages * self.num_chunks
        each, more = divmod(self.num_layers, virtual)
        return (each + (np.arange(virtual) < more)).reshape(self.num_chunks, self.num_stages).T

    @cached_property
    def slots(self) -> np.ndarray:
        """int [stages, chunks, slots_per_chunk]: layer, or NONE."""
        counts = self.counts.T.reshape(-1)
        first = np.cumsum(counts) - counts
        index = np.arange(self.slots_per_chunk)
        slots = np.where(index < counts[:, None], first[:, None] + index, NONE)
        return slots.reshape(self.num_chunks, self.num_stages, -1).swapaxes(0, 1)

    @property
    def is_padded(self) -> bool:
        return bool((self.slots == NONE).any())

    @property
    def is_contiguous(self) -> bool:
        """Stage s holds the s-th part of the layers, in order and without padding."""
        return self.num_chunks == 1 and not self.is_padded

    @property
    def padding_fraction(self) -> float:
        """Share of the stages' layer slots that only pad."""
        return float((self.slots == NONE).mean()) if self.num_layers else 0.0
