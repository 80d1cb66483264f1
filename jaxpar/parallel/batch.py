"""How a global batch lies on the mesh, and how numpy rows of this process become arrays on it."""

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


class BatchLayout:
    """The shape of a global batch, and where each part of it lies on the mesh.

    Attributes:
      shape: (global_batch_size, seq_length). With dynamic batches, the largest number of rows that occurs.
      sharding: batch over dp, sequence over cp.
      order: int [seq_length], for each index of an array on the mesh, the index in the sequence of the token there
        (see `jaxpar.attention.zigzag_order`).
      rows: the rows of the global batch that this process's devices need, in order.

    Args:
      within_documents: whether tokens attend only to their own document (`data.reset_attention_mask`).
    """

    def __init__(self, global_batch_size: int, seq_length: int, mesh: Mesh, *, within_documents: bool = True):
        self.shape, self._within_documents = (global_batch_size, seq_length), within_documents
        self._mesh, self.sharding = mesh, NamedSharding(mesh, BATCH_SPEC)
        self.order = zigzag_order(seq_length, mesh.shape["cp"])
        slices = self.sharding.addressable_devices_indices_map(self.shape).values()
        self.rows = sorted({row for index in slices if index for row in range(global_batch_size)[index[0]]})

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of each array of a batch."""
        return {key: jax.ShapeDtypeStruct(self.shape, dtype, sharding=self.sharding) for key, dtype in DTYPES.items()}

    def put_on_mesh(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Makes global arrays of this process's rows, and puts tokens in zigzag order.

        Targets, positions and masks move with their tokens, so that nothing after this function depends on the order.

        Args:
          rows: arrays [len(self.rows), seq_length], tokens in natural order. Dynamic batches may have fewer rows, the
            same number on each dp rank.
        """
        if len(rows["tokens"]) != len(self.rows):
            return self.resized(len(rows["tokens"])).put_on_mesh(rows)

        def put(array: np.ndarray) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(self.shape[0])
                first = self.rows.index(start)  # the rows of a shard are consecutive
                return array[first : first + stop - start, self.order[index[1]]]

            return jax.make_array_from_callback(self.shape, self.sharding, shard)

        numbered = {key: number_documents(ids) for key, ids in rows.items() if key == "segment_ids"}
        return {key: put(array) for key, array in {**rows, **numbered}.items()}

    def resized(self, num_rows: int) -> "BatchLayout":
        """The same with `num_rows` rows on this process, and as many on each dp rank."""
        rows = self.shape[0] * num_rows // len(self.rows)
        return BatchLayout(rows, self.shape[1], self._mesh, within_documents=self._within_documents)

    def own_rows(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Checks a user's global batch, adds defaults, and cuts it down to this process's rows.

        Raises:
          ValueError: a key is unknown or missing, a shape is not `shape`, a document is in two parts, or documents are
            given that attention would ignore.
        """
        if unknown := sorted(batch.keys() - DTYPES.keys()):
            raise ValueError(f"batch: unknown keys {', '.join(unknown)}; known: {', '.join(DTYPES)}")
        if missing := sorted({"tokens", "targets"} - batch.keys()):
            raise ValueError(f"batch: {' and '.join(missing)} missing")
        if "segment_ids" in batch and not self._within_documents:
            raise ValueError(
                "batch: segment_ids are given, but data.reset_attention_mask is False, so tokens attend across documents: "
                "leave them out, or set data.reset_attention_mask: True"
            )
        for key, array in batch.items():
            if np.shape(array) != self.shape:
                raise ValueError(
                    f"batch: {key} is {np.shape(array)}, but a global batch has the shape (rows, tokens) {self.shape}"
                )
        defaults = {
            "loss_mask": np.ones(self.shape),
            "segment_ids": np.zeros(self.shape),
            "positions": np.broadcast_to(np.arange(self.shape[1]), self.shape),
        }
        whole = {**defaults, **batch}
        _check_documents(np.asarray(whole["segment_ids"]), np.asarray(whole["loss_mask"]))
        return {key: np.asarray(whole[key], dtype)[self.rows] for key, dtype in DTYPES.items()}


def number_documents(segment_ids: np.ndarray) -> np.ndarray:
    """Numbers each row's documents from 0 in their order, int32 [rows, seq]. A document is consecutive tokens of one id.

    Ids then never decrease along a row, which is what attention kernels ask for (`jaxpar.attention.tokamax`).
    """
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return np.pad(np.cumsum(starts, axis=1, dtype=np.int32), ((0, 0), (1, 0)))


def _check_documents(segment_ids: np.ndarray, loss_mask: np.ndarray) -> None:
    """Raises ValueError if a document is in two parts, unless it is padding: id 0, and not trained on."""
    for row, (ids, weights) in enumerate(zip(segment_ids, loss_mask, strict=True)):
        starts = ids[np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))]
        is_padding = not weights[ids == 0].any()
        found, counts = np.unique(starts[starts != 0] if is_padding else starts, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"batch: segment_ids: row {row} has document {found[counts > 1][0]} in {counts.max()} separate parts, but the "
                f"tokens of a document must be consecutive: give each part an id of its own, or bring them together"
            )
