"""Global batches of whole documents of any length, in rows of a token budget (see `jaxpar.data.dynamic`).

As for packed samples, `BatchOrder` determines which documents are in global batch t. It does not depend on dp or the
budget. A document of n tokens fills n - 1 tokens of a row, because its last token is only a target.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int

from jaxpar.data.cache import TokenCache
from jaxpar.data.dynamic import DocumentCost, plan_rows
from jaxpar.data.formats import DataError
from jaxpar.data.loader import Batch, BatchLoader, BatchOrder

_CHUNK = 1 << 20  # documents checked at once, so that memory does not grow with the corpus


class DocumentSource:
    """Random access to whole documents, each of which fits into a row.

    `source[i]` is int32 [length + 1], the tokens of document i with its end-of-document token.

    Args:
      folder: a token cache.
      budget: tokens in a row.

    Raises:
      DataError: documents do not fit into a row; names the first ten.
    """

    def __init__(self, folder: Path, budget: int):
        self.folder, self.budget = folder, budget
        self._cache = TokenCache(folder)
        too_long: list[int] = []
        for first in range(0, len(self), _CHUNK):
            before = self._cache.doc_ends[first - 1] if first else 0
            lengths = np.diff(self._cache.doc_ends[first : first + _CHUNK], prepend=before) - 1
            too_long += (first + np.flatnonzero(lengths > budget)).tolist()
        if too_long:
            more = [f"and {len(too_long) - 10:,} more documents"] if len(too_long) > 10 else []
            raise DataError([self._too_long(document) for document in too_long[:10]] + more)

    def _too_long(self, document: int) -> str:
        length = len(self[document]) - 1
        return (
            f"runner.max_tokens_per_mbs: {self._cache.origin(document)} has {length + 1:,} tokens, of which {length:,} are "
            f"inputs, but a row has max_tokens_per_mbs * context_parallel_size = {self.budget:,}, and documents are not cut: "
            f"raise one of the two, or remove the document from the data"
        )

    def lengths(self, documents: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Tokens of a row that each of these documents fills."""
        return np.array([end - start - 1 for start, end in map(self._span, documents)], np.int64)

    def _span(self, document: int) -> tuple[int, int]:
        """The first token of a document, and one past its last."""
        ends = [0, *self._cache.doc_ends[:1]] if document == 0 else self._cache.doc_ends[document - 1 : document + 1]
        return int(ends[0]), int(ends[1])

    def __len__(self) -> int:
        return len(self._cache.doc_ends)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self._cache.tokens[slice(*self._span(index))], np.int32)

    def __reduce__(self):
        return DocumentSource, (self.folder, self.budget)  # the path, not the corpus


def build_dynamic_loader(
    source: DocumentSource,
    order: BatchOrder,
    *,
    dp: int,
    ranks: Sequence[int],
    cost: DocumentCost,
    num_workers: int = 0,
) -> BatchLoader:
    """Builds the loader of one process, like `build_loader` but with documents as the samples.

    Each item is a dict of arrays [len(ranks) * rows per rank, budget] with the keys and dtypes of a `PackedSource`. The
    rows of a rank are adjacent. The number of rows changes from batch to batch. The loader's `figures` are
      num_microbatches: rows of each rank.
      dp_balance: cost of the busiest dp rank divided by the mean.
      padding_fraction: share of the tokens in the rows of all ranks that are padding.
      flops_per_token: cost of all documents divided by their tokens.

    Args:
      order: its `global_batch_size` counts documents.
      dp: number of dp ranks.
      ranks: the dp ranks that this process feeds.
      cost: cost of a document, which is balanced over dp.
      num_workers: as in `build_loader`.

    Raises:
      DataError: fewer documents than one global batch, or a negative number of workers.
    """
    size = order.global_batch_size
    if len(source) < size:
        raise DataError(
            f"actor.global_batch_size: {size} is more than the {len(source)} documents of the data: give more data, or "
            "lower actor.global_batch_size"
        )
    numbers = order.arrange(grain.MapDataset.range(len(source)))
    return BatchLoader(_ReadPlanned(numbers, source, size, dp, tuple(ranks), cost), order, len(source), num_workers)


@dataclasses.dataclass(frozen=True)
class _ReadPlanned:
    """Global batch number → its rows on `ranks`, and the figures of its plan as arrays without dimensions."""

    numbers: grain.MapDataset
    source: DocumentSource
    global_batch_size: int
    dp: int
    ranks: tuple[int, ...]
    cost: DocumentCost

    def __call__(self, batch: int) -> Batch:
        first = batch * self.global_batch_size
        numbers = np.array([self.numbers[first + i] for i in range(self.global_batch_size)])
        lengths = self.source.lengths(numbers)
        plan = plan_rows(lengths, self.source.budget, self.dp, self.cost)
        rows = [
            pack_row([self.source[number] for number in numbers[documents]], self.source.budget)
            for rank in self.ranks
            for documents in plan.rows[rank]
        ]
        figures = {
            "num_microbatches": plan.num_rows,
            "dp_balance": plan.balance,
            "padding_fraction": plan.padding_fraction,
            "flops_per_token": self.cost(lengths).sum() / max(lengths.sum(), 1),
        }
        arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        return {**arrays, **{key: np.asarray(value) for key, value in figures.items()}}


def pack_row(documents: Sequence[np.ndarray], budget: int) -> Batch:
    """Whole documents one after another, then padding: a dict of arrays [budget] as from a `PackedSource`."""
    dtypes = {"tokens": np.int32, "targets": np.int32, "loss_mask": np.float32, "segment_ids": np.int32}
    row: Batch = {key: np.zeros(budget, dtype) for key, dtype in {**dtypes, "positions": np.int32}.items()}
    start = 0
    for segment, document in enumerate(documents, start=1):
        span = slice(start, start + len(document) - 1)
        row["tokens"][span], row["targets"][span] = document[:-1], document[1:]
        row["loss_mask"][span], row["segment_ids"][span] = 1, segment
        row["positions"][span] = np.arange(len(document) - 1)
        start = span.stop
    return row
