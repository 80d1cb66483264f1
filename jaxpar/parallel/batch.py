"""How a global batch lies on the mesh, and how numpy rows of this process become arrays on it."""

from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxpar.parallel.sharding import BATCH_SPEC
from jaxpar.parallel.zigzag import zigzag_order

DTYPES = {
    "tokens": np.int32, "targets": np.int32, "loss_mask": np.float32, "segment_ids": np.int32, "positions": np.int32
}  # fmt: skip
HINTS = {"tokens": "", "targets": ": where there is no target, set loss_mask to 0 and the target to any token"}


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
      inputs: what the model and the objective take for each token besides, {name: ShapeDtypeStruct of one token's}.
      problem: what the objective finds wrong with a whole batch, in a line, or None.
      dynamic: batches may have fewer rows.
    """

    def __init__(
        self,
        global_batch_size: int,
        seq_length: int,
        mesh: Mesh,
        *,
        within_documents: bool = True,
        inputs: Mapping[str, jax.ShapeDtypeStruct] | None = None,
        problem: Callable[[Mapping[str, np.ndarray]], str | None] | None = None,
        dynamic: bool = False,
    ):
        self.shape, self._within_documents, self._problem = (global_batch_size, seq_length), within_documents, problem
        self._inputs, self._dynamic = inputs or {}, dynamic
        self._mesh, self.sharding = mesh, NamedSharding(mesh, BATCH_SPEC)
        self.order = zigzag_order(seq_length, mesh.shape["cp"])
        slices = self.sharding.addressable_devices_indices_map(self.shape).values()
        self.rows = sorted({row for index in slices if index for row in range(global_batch_size)[index[0]]})

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of each array of a batch."""
        one = {**{key: jax.ShapeDtypeStruct((), dtype) for key, dtype in DTYPES.items()}, **self._inputs}
        return {
            key: jax.ShapeDtypeStruct((*self.shape, *x.shape), x.dtype, sharding=self.sharding)
            for key, x in one.items()
        }

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
                start, stop, _ = index[0].indices(self.shape[0])  # (further dimensions are whole)
                first = self.rows.index(start)  # the rows of a shard are consecutive
                return array[first : first + stop - start, self.order[index[1]]]

            return jax.make_array_from_callback((*self.shape, *array.shape[2:]), self.sharding, shard)

        numbered = {key: number_documents(ids) for key, ids in rows.items() if key == "segment_ids"}
        return {key: put(array) for key, array in {**rows, **numbered}.items()}

    def resized(self, num_rows: int) -> "BatchLayout":
        """The same with `num_rows` rows on this process, and as many on each dp rank."""
        return self._like(self.shape[0] * num_rows // len(self.rows), self._inputs)

    def with_inputs(self, inputs: Mapping[str, jax.ShapeDtypeStruct]) -> "BatchLayout":
        """The same with more arrays."""
        return self._like(self.shape[0], {**self._inputs, **inputs}, dynamic=self._dynamic)

    def _like(self, rows: int, inputs: Mapping[str, jax.ShapeDtypeStruct], *, dynamic: bool = False) -> "BatchLayout":
        return BatchLayout(
            rows,
            self.shape[1],
            self._mesh,
            within_documents=self._within_documents,
            inputs=inputs,
            problem=self._problem,
            dynamic=dynamic,
        )

    def own_rows(
        self, batch: Mapping[str, Any], *, trained: bool = True, optional: Set[str] = frozenset()
    ) -> dict[str, np.ndarray]:
        """Checks a user's global batch, adds defaults, and cuts it down to this process's rows.

        Where a process has not all rows, it may give its own ones alone, in the order of `rows`. Dynamic batches are always those
        of the whole run.

        Args:
          trained: whether its loss is asked for, which needs targets that are not masked.
          optional: additional inputs that may be missing.

        Raises:
          ValueError: a key is unknown or missing, a shape is not `shape`, a dtype is of another kind, a token is negative,
            `loss_mask` has a weight that is negative or not finite or has too little weight in all, a document is in two
            parts, or documents are given that attention would ignore.
        """
        num_rows = len(batch.get("tokens", ()))
        if self._dynamic and 0 < num_rows < self.shape[0] and num_rows % self._mesh.shape["dp"] == 0:
            return self._like(num_rows, self._inputs).own_rows(batch, trained=trained, optional=optional)
        if unknown := sorted(batch.keys() - DTYPES.keys() - self._inputs.keys()):
            raise ValueError(
                f"batch: unknown keys {', '.join(unknown)}; known: {', '.join([*DTYPES, *self._inputs])}; a model or "
                f"an objective says with `inputs` what else it takes (see jaxpar.Stack, jaxpar.Objective)"
            )
        if missing := sorted({"tokens", "targets", *self._inputs} - optional - batch.keys()):
            raise ValueError(f"batch: {' and '.join(missing)} missing")
        if "segment_ids" in batch and not self._within_documents:
            raise ValueError(
                "batch: segment_ids are given, but data.reset_attention_mask is False, so tokens attend across documents: "
                "leave them out, or set data.reset_attention_mask: True"
            )
        given = {key: np.asarray(array) for key, array in batch.items()}
        own = (len(self.rows), self.shape[1])
        is_own = own != self.shape and given["tokens"].shape == own
        shape = own if is_own else self.shape
        for key, array in given.items():
            if key in self._inputs:
                _check_input(key, array, self._inputs[key], shape)
                continue
            if array.shape != shape:
                more = "" if own == self.shape else f", and this process's rows of it {own}"
                more += f", or fewer rows, a multiple of dp: {self._mesh.shape['dp']}" if self._dynamic else ""
                raise ValueError(
                    f"batch: {key} is {array.shape}, but a global batch has the shape (rows, tokens) {self.shape}{more}"
                )
            _check_dtype(key, array.dtype)
        for key in ("tokens", "targets"):
            _check_entries(key, given[key], given[key] < 0, "is not a token" + HINTS[key])
        defaults = {
            "loss_mask": np.ones(shape, bool),
            "segment_ids": np.zeros(shape, int),
            "positions": np.broadcast_to(np.arange(shape[1]), shape),
        }
        whole = {**defaults, **given}
        _check_mask(whole["loss_mask"], trained and not is_own)  # other rows may have a weight
        _check_documents(whole["segment_ids"], whole["loss_mask"])
        if trained and self._problem and (problem := self._problem(whole)):
            raise ValueError(f"batch: {problem}")
        rows = range(len(self.rows)) if is_own else self.rows
        return {key: np.asarray(whole[key], x.dtype)[rows] for key, x in self.shapes.items() if key in whole}


def number_documents(segment_ids: np.ndarray) -> np.ndarray:
    """Numbers each row's documents from 0 in their order, int32 [rows, seq]. A document is consecutive tokens of one id.

    Ids then never decrease along a row, which is what attention kernels ask for (`jaxpar.attention.tokamax`).
    """
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return np.pad(np.cumsum(starts, axis=1, dtype=np.int32), ((0, 0), (1, 0)))


def _check_dtype(key: str, dtype: np.dtype) -> None:
    """Raises ValueError for a dtype of another kind than that of `DTYPES`: a cast could lose something."""
    if DTYPES[key] is np.int32:
        allowed, name = np.issubdtype(dtype, np.integer), "an integer dtype"
    else:  # bfloat16 is no np.floating
        allowed, name = jnp.issubdtype(dtype, jnp.floating) or dtype.kind in "biu", "a float, integer or bool dtype"
    if not allowed:
        raise ValueError(f"batch: {key} is {dtype}, expected {name}")


def _check_input(key: str, array: np.ndarray, one: jax.ShapeDtypeStruct, rows_and_tokens: tuple[int, int]) -> None:
    """Raises ValueError unless an additional array has what the model takes for each token."""
    if array.shape != (*rows_and_tokens, *one.shape):
        raise ValueError(f"batch: {key} is {array.shape}, but it is declared as {(*rows_and_tokens, *one.shape)}")
    if not np.can_cast(array.dtype, one.dtype, "same_kind"):
        raise ValueError(f"batch: {key} is {array.dtype}, but it is declared as {one.dtype}")


def _check_entries(key: str, array: np.ndarray, wrong: np.ndarray, problem: str) -> None:
    """Raises ValueError about the first entry of `array` [rows, seq] that is wrong."""
    if wrong.any():
        row, token = np.argwhere(wrong)[0]
        more = f" ({wrong.sum()} such entries in all)" if wrong.sum() > 1 else ""
        raise ValueError(f"batch: {key}: row {row}, token {token} is {array[row, token]}, which {problem}{more}")


def _check_mask(mask: np.ndarray, trained: bool) -> None:
    """Raises ValueError unless `mask` [rows, seq] has weights that the loss can be divided by."""
    weights = mask.astype(np.float64)
    _check_entries(
        "loss_mask", mask, ~(np.isfinite(weights) & (weights >= 0)), "is not a weight: it must be finite, and 0 or more"
    )
    if not trained:
        return
    total = weights.sum()
    if total == 0:
        raise ValueError("batch: loss_mask is 0 everywhere, so nothing would be trained on")
    if total < 1:  # the loss is divided by max(total, 1)
        raise ValueError(
            f"batch: loss_mask has a sum of {total:.6g}, but the loss is a mean only from 1 on: multiply the mask by "
            f"{1 / total:.6g} or more, which changes no mean"
        )


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
