"""Which layers each pipeline stage holds. Needs no jax."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

NONE = -1  # instead of a layer: padding


@dataclass(frozen=True)
class LayerPlacement:
    """Layers on P stages of V chunks each. Chunk c of stage s is the virtual stage c * P + s, and activations go through
    the virtual stages in order.

    Every virtual stage gets the same number of layers, and the first `num_layers mod PV` of them get one more. All stages
    run the same program, so the others compute one layer more than they have, and its result is thrown away.

    `num_present`: how many of the layers, from the first on, are there; default: all. A repeated pattern of blocks that is cut
    short lacks some in its last repetition.
    """

    num_layers: int
    num_stages: int = 1
    num_chunks: int = 1
    num_present: int | None = None

    @property
    def layers_per_chunk(self) -> int:
        """Layers that every chunk computes, padding included."""
        return -(-self.num_layers // (self.num_stages * self.num_chunks))

    @cached_property
    def counts(self) -> np.ndarray:
        """int [stages, chunks]: number of layers, without padding."""
        virtual = self.num_stages * self.num_chunks
        each, more = divmod(self.num_layers, virtual)
        return (each + (np.arange(virtual) < more)).reshape(self.num_chunks, self.num_stages).T

    @cached_property
    def table(self) -> np.ndarray:
        """int [stages, chunks, layers_per_chunk]: the index of each layer, or NONE for padding."""
        counts = self.counts.T.reshape(-1)
        first = np.cumsum(counts) - counts
        index = np.arange(self.layers_per_chunk)
        table = np.where(index < counts[:, None], first[:, None] + index, NONE)
        if self.num_present is not None:
            table = np.where(table < self.num_present, table, NONE)
        return table.reshape(self.num_chunks, self.num_stages, -1).swapaxes(0, 1)

    @property
    def is_padded(self) -> bool:
        return bool((self.table == NONE).any())

    @property
    def is_contiguous(self) -> bool:
        """Whether stage s holds the s-th part of the layers, in order and without padding."""
        return self.num_chunks == 1 and not self.is_padded
