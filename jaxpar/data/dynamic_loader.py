"""Global batches of whole documents of any length, in rows of a token budget (see `jaxpar.data.dynamic`).

Global batch t holds the documents that a `PackedSource`'s loader would take as samples: their order is `BatchOrder`'s,
whatever dp and the budget are. A document of n tokens takes n - 1 places, because its last is a target only.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from jaxpar.data.dynamic import DocumentCost, plan_rows
from jaxpar.data.loader import Batch, BatchLoader, BatchOrder
from jaxpar.data.packing import TokenCache
from jaxpar.data.text import DataError


class DocumentSource:
    """Random access to whole documents, all of which fit into a row.

    Args:
      folder: of a token cache.
      budget: places in a row.

    Attributes:
      lengths: int64 [num_documents], places that each document takes.

    `source[i]` is int32 [lengths[i] + 1], the tokens of document i with its end-of-document token.
    Raises `DataError` if documents take more places than a row has; says which.
    """

    def __init__(self, folder: Path, budget: int):
        self.folder, self.budget = folder, budget
        self._cache = TokenCache(folder)
        self.lengths = np.diff(self._cache.doc_ends, prepend=0) - 1
        if len(too_long := np.flatnonzero(self.lengths > budget)):
            raise DataError(
                [self._too_long(int(document)) for document in too_long[:10]] + _and_more(len(too_long) - 10)
            )

    def _too_long(self, document: int) -> str:
        length = int(self.lengths[document])
        return (
            f"runner.max_tokens_per_mbs: {self._cache.origin(document)} has {length + 1:,} tokens, which need {length:,} "
            f"places, but max_tokens_per_mbs * context_parallel_size gives {self.budget:,}, and no document is cut: raise "
            f"one of them, or take the document out of the data"
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        end = int(self._cache.doc_ends[index])
        return np.asarray(self._cache.tokens[end - int(self.lengths[index]) - 1 : end], np.int32)

    def __reduce__(self):
        return DocumentSource, (self.folder, self.budget)  # not the corpus


def build_dynamic_loader(
    source: DocumentSource,
    *,
    global_batch_size: int,
    dp: int,
    ranks: Sequence[int],
    cost: DocumentCost,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    num_workers: int = 0,
) -> BatchLoader:
    """Builds the loader of one process; what is not said here is as in `build_loader`, with documents for samples.

    Each item is a dict of arrays [len(ranks) * rows a rank, budget] like a `PackedSource`'s, the rows of each rank
    together; the number of rows changes from batch to batch. Its `figures` are
      num_microbatches: rows of each rank.
      dp_balance: cost of the busiest dp rank over the mean.
      padding_fraction: share of the places of all ranks that hold no token.
      flops_per_token: cost of all documents over their tokens.

    Args:
      global_batch_size: documents in a global batch.
      dp, ranks: number of dp ranks, and which of them this process feeds.
      cost: of a document, to be balanced over dp.

    Raises:
      DataError: fewer documents than one global batch, or a negative number.
    """
    if len(source) < global_batch_size:
        raise DataError(
            f"{len(source)} documents < actor.global_batch_size = {global_batch_size}: the data do not fill one global "
            "batch; give more of them or a smaller actor.global_batch_size"
        )
    order = BatchOrder(global_batch_size, seed, shuffle, num_epochs)
    numbers = grain.MapDataset.range(len(source))
    return order.loader(
        numbers, lambda numbers: _ReadPlanned(numbers, source, global_batch_size, dp, tuple(ranks), cost), num_workers
    )


@dataclasses.dataclass(frozen=True)
class _ReadPlanned:
    """Number of a global batch -> its rows on `ranks`, and the figures of its plan."""

    numbers: grain.MapDataset
    source: DocumentSource
    global_batch_size: int
    dp: int
    ranks: tuple[int, ...]
    cost: DocumentCost

    def __call__(self, batch: int) -> Batch:
        first = batch * self.global_batch_size
        numbers = np.array([self.numbers[first + i] for i in range(self.global_batch_size)])
        lengths = self.source.lengths[numbers]
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
    """Whole documents side by side, then padding: a dict of arrays [budget] like a `PackedSource`'s."""
    dtypes = {"tokens": np.int32, "targets": np.int32, "loss_mask": np.float32, "segment_ids": np.int32}
    row: Batch = {key: np.zeros(budget, dtype) for key, dtype in {**dtypes, "positions": np.int32}.items()}
    start = 0
    for segment, document in enumerate(documents, start=1):
        places = slice(start, start + len(document) - 1)
        row["tokens"][places], row["targets"][places] = document[:-1], document[1:]
        row["loss_mask"][places], row["segment_ids"][places] = 1, segment
        row["positions"][places] = np.arange(len(document) - 1)
        start = places.stop
    return row


def _and_more(number: int) -> list[str]:
    return [f"and {number:,} documents more"] if number > 0 else []
