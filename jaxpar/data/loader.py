"""Global batches in an order that depends on the seed alone, read by Grain (https://google-grain.readthedocs.io).

Global batch t (from 0) is samples t * B ... (t + 1) * B - 1 of an endless order: epoch after epoch, each a new seeded
permutation of the samples. The order does not depend on devices, processes or worker processes, so every layout sees the
same batches, and one integer, t, is the position of a training run in the data.
"""

import atexit
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from jaxpar.data.formats import DataError

Batch = dict[str, np.ndarray]
FILES = "data.train_data_paths"  # the kind of a `BatchLoader`, see `jaxpar.run.sources`


class SampleSource(Protocol):
    """Random access to samples of equal shape, such as `PackedSource`. Must be picklable if `num_workers` > 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which samples are in which global batch.

    Epochs follow one another without a gap: a batch may have the last samples of one epoch and the first of the next, and
    each sample is read once per epoch. Only the remainder after the last epoch (fewer than `global_batch_size` samples)
    is dropped.

    Attributes:
      global_batch_size: samples in a global batch, B.
      seed: at least 0; determines the order, together with the number of the epoch.
      shuffle: False keeps the order of the samples in every epoch.
      num_epochs: passes over the data; None: no end.

    Raises:
      DataError: a negative seed, or fewer than one epoch.
    """

    global_batch_size: int
    seed: int
    shuffle: bool = True
    num_epochs: int | None = None

    def __post_init__(self) -> None:
        problems = [f"data.seed: must be at least 0, got {self.seed}"] if self.seed < 0 else []
        if self.num_epochs is not None and self.num_epochs < 1:
            problems.append(f"runner.max_epochs: must be at least 1, got {self.num_epochs}")
        if problems:
            raise DataError(problems)

    def arrange(self, samples: grain.MapDataset) -> grain.MapDataset:
        """All epochs of the samples in this order: global batch t is samples t * B ... (t + 1) * B - 1 of it."""
        if self.shuffle:
            # Grain orders epoch e by seed + e. Without the hash, seed 1 would start with the second epoch of seed 0.
            samples = samples.shuffle(int(np.random.SeedSequence(self.seed).generate_state(1)[0]))
        return samples.repeat(self.num_epochs)


class BatchLoader(Iterator[Batch]):
    """Iterates over global batches, or over the rows of them that this process needs.

    Made by `build_loader` or `build_dynamic_loader`, whose docstrings describe the items.

    Args:
      read: global batch number t → batch.
      order: the order of the samples, with the global batch size.
      num_samples: samples in one epoch.
      num_workers: as in `build_loader`.

    Attributes:
      figures: numbers about the last batch, by name; only dynamic batches have any.
      batches_per_epoch: whole global batches in one epoch, num_samples // global_batch_size.
      num_batches: global batches in all epochs, or None if there is no end.
      fingerprint: of the data, if somebody has set it.
    """

    kind = FILES
    notes: Sequence[str] = ()
    fingerprint: Mapping[str, Any] | None = None

    def __init__(self, read: Callable[[int], Batch], order: BatchOrder, num_samples: int, num_workers: int):
        if num_workers < 0:
            raise DataError(f"data.num_workers: must be at least 0, got {num_workers}")
        size = order.global_batch_size
        self.figures: dict[str, float] = {}
        self.batches_per_epoch = num_samples // size
        self.num_batches = None if order.num_epochs is None else order.num_epochs * num_samples // size
        endless = sys.maxsize // size
        self._batches = grain.MapDataset.range(endless if self.num_batches is None else self.num_batches).map(read)
        self._num_workers = num_workers
        self._next = 0
        self._iterator: Any = None

    def __next__(self) -> Batch:
        if self._next == self.num_batches:
            self.close()
            raise StopIteration
        if self._iterator is None:
            self._iterator = iter(self._dataset_from(self._next))
            _running.add(self)
        batch = next(self._iterator)
        self._next += 1
        arrays = {key: np.asarray(value) for key, value in batch.items()}  # worker processes send an ndarray subclass
        self.figures = {key: array.item() for key, array in arrays.items() if array.ndim == 0}
        return {key: array for key, array in arrays.items() if key not in self.figures}

    def get_state(self) -> dict[str, int]:
        """`{"batch": t}`: t batches were returned, and batch t is next. The same on every layout and process."""
        return {"batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position from `get_state`, at any time, without reading the batches before it.

        Raises:
          DataError: `state` is not such a position, or is beyond the last batch.
        """
        batch = state.get("batch")
        if type(batch) is not int or batch < 0 or (self.num_batches is not None and batch > self.num_batches):
            end = "" if self.num_batches is None else f" to {self.num_batches}"
            raise DataError(f'{state} is not a position in this data: expected {{"batch": t}} with t from 0{end}')
        self.close()
        self._next = batch

    def close(self) -> None:
        """Ends threads and worker processes. The next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _dataset_from(self, batch: int) -> grain.IterDataset:
        # The position is set by a slice, because Grain's own state has an entry for each worker process.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        dataset = self._batches[batch:].to_iter_dataset(ahead)
        if self._num_workers == 0:
            return dataset
        if not flags.FLAGS.is_parsed():
            # Grain's process prefetch reads an absl command-line flag, which fails in a program that is not an absl app.
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=2)
        return dataset.mp_prefetch(workers, worker_init_fn=_live_with_parent)


_running: weakref.WeakSet[BatchLoader] = weakref.WeakSet()


@atexit.register
def _close_running() -> None:
    # Without this, Grain ends its worker processes too late at exit: it leaks shared memory and prints tracebacks.
    for loader in list(_running):
        loader.close()


def build_loader(
    source: SampleSource, order: BatchOrder, *, rows: Sequence[int] | None = None, num_workers: int = 0
) -> BatchLoader:
    """Builds the loader of one process.

    Each item is a dict of arrays [len(rows), ...], one for each key of the samples, with the rows in the order given.

    Args:
      source: the samples, the same in all processes.
      rows: the rows (0 ... B - 1) of each global batch that this process needs; None: all. No other row is read.
      num_workers: processes that read ahead (0: a thread). They are new processes ("spawn"), so a script needs
        `if __name__ == "__main__":`. Their number does not change the batches.

    Raises:
      DataError: fewer samples than one global batch, a row outside it, or a negative number of workers.
    """
    size = order.global_batch_size
    rows = list(range(size)) if rows is None else list(rows)
    if not rows or not all(0 <= row < size for row in rows):
        raise DataError(f"rows {rows}: not rows of a global batch of {size} (0 ... {size - 1})")
    if len(source) < size:
        raise DataError(
            f"actor.global_batch_size: {size} is more than the {len(source)} samples of the data, {source!r}: give more data, "
            "or lower runner.seq_length or actor.global_batch_size"
        )
    samples = order.arrange(grain.MapDataset.source(source))
    return BatchLoader(_ReadRows(samples, size, rows), order, len(source), num_workers)


@dataclasses.dataclass(frozen=True)
class _ReadRows:
    """Global batch number → its rows, stacked."""

    samples: grain.MapDataset
    global_batch_size: int
    rows: list[int]

    def __call__(self, batch: int) -> Batch:
        samples = [self.samples[batch * self.global_batch_size + row] for row in self.rows]
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


def _live_with_parent(worker: int, num_workers: int) -> None:
    """Makes a worker process end exactly when its parent does."""
    # Ctrl-C reaches the whole process group, but the trainer first saves a checkpoint and then closes its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:  # a killed parent cannot close its workers, and they would wait for it forever
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
