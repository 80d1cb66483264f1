"""Global batches: numpy rows of this process → arrays on the mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxpar.parallel.sharding import BATCH_SPEC
from jaxpar.parallel.zigzag import zigzag_order

DTYPES = {
    "tokens": np.int32, "targets": np.int32, "loss_mask": np.float32, "segment_ids": np.int32, "positions": np.int32
}  # fmt: skip


class GlobalBatch:
    """Shape and place of a global batch.

    Attributes:
      shape: (global_batch_size, seq_length); with dynamic batches the most rows that there may be.
      sharding: batch over dp, sequence over cp.
      order: int [seq_length], index in the sequence of the token at each place (see `jaxpar.attention.zigzag_order`).
      rows: rows of the global batch that this process's devices need, in order.
    """

    def __init__(self, global_batch_size: int, seq_length: int, mesh: Mesh):
        self.shape = (global_batch_size, seq_length)
        self._mesh, self.sharding = mesh, NamedSharding(mesh, BATCH_SPEC)
        self.order = zigzag_order(seq_length, mesh.shape["cp"])
        slices = self.sharding.addressable_devices_indices_map(self.shape).values()
        self.rows = sorted({row for index in slices if index for row in range(global_batch_size)[index[0]]})

    def place(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Arrays [len(self.rows), seq_length] of this process, tokens in natural order → global arrays on the mesh, tokens
        in the order of their places. Labels, positions and masks travel with their tokens, so nothing after this minds.
        Dynamic batches may have fewer rows, the same number on each dp rank."""
        if len(rows["tokens"]) != len(self.rows):
            return self.resized(len(rows["tokens"])).place(rows)

        def place(array: np.ndarray) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(self.shape[0])
                first = self.rows.index(start)  # a shard's rows are neighbours
                return array[first : first + stop - start, self.order[index[1]]]

            return jax.make_array_from_callback(self.shape, self.sharding, shard)

        return {key: place(array) for key, array in rows.items()}

    def resized(self, num_rows: int) -> "GlobalBatch":
        """Of so many rows on this process, and as many on each dp rank."""
        return GlobalBatch(self.shape[0] * num_rows // len(self.rows), self.shape[1], self._mesh)

    def complete(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A user's global batch, checked, with defaults, cut down to this process's rows.

        Raises:
          ValueError: an unknown or missing key, or a shape other than `shape`.
        """
        if unknown := sorted(batch.keys() - DTYPES.keys()):
            raise ValueError(f"batch: unknown keys {', '.join(unknown)}; known: {', '.join(DTYPES)}")
        if missing := sorted({"tokens", "targets"} - batch.keys()):
            raise ValueError(f"batch: {' and '.join(missing)} missing")
        for key, array in batch.items():
            if np.shape(array) != self.shape:
                raise ValueError(
                    f"batch: {key} is {np.shape(array)}, but the rows and tokens of a global batch are {self.shape}"
                )
        defaults = {
            "loss_mask": np.ones(self.shape),
            "segment_ids": np.zeros(self.shape),
            "positions": np.broadcast_to(np.arange(self.shape[1]), self.shape),
        }
        whole = {**defaults, **batch}
        return {key: np.asarray(whole[key], dtype)[self.rows] for key, dtype in DTYPES.items()}
