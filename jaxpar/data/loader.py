"""Global batches in an order that depends on the seed alone, read by Grain (https://google-grain.readthedocs.io).

Global batch t (from 0) is samples t * B ... (t + 1) * B - 1 of an endless order: epoch after epoch, each a new seeded
permutation of the samples. Devices, processes and worker processes do not enter, so every layout sees the same batches
and the position of a run is the one integer t.
"""

import atexit
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from jaxpar.data.text import DataError

Batch = dict[str, np.ndarray]


class SampleSource(Protocol):
    """Random access to samples of equal shape, such as `PackedSource`. Must be picklable for `num_workers` > 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


class BatchLoader(Iterator[Batch]):
    """Iterates over global batches, or this process's rows of them; made by `build_loader`.

    Each item is a dict of arrays [len(rows), ...], one for each key of the samples, rows in the order asked for.

    Attributes:
      figures: numbers about the batch that came last, by name; only dynamic batches have any.
      batches_per_epoch: whole global batches in one pass, num_samples // global_batch_size.
      num_batches: global batches in all epochs, or None without an end.
    """

    def __init__(self, batches: grain.MapDataset, batches_per_epoch: int, num_batches: int | None, num_workers: int):
        self.figures: dict[str, float] = {}
        self.batches_per_epoch = batches_per_epoch
        self.num_batches = num_batches
        self._batches = batches
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
        arrays = {key: np.asarray(value) for key, value in batch.items()}  # workers send an ndarray subclass
        self.figures = {key: array.item() for key, array in arrays.items() if array.ndim == 0}
        return {key: array for key, array in arrays.items() if key not in self.figures}

    def get_state(self) -> dict[str, int]:
        """`{"batch": t}`: t batches were handed out, batch t is next. The same for every layout and process."""
        return {"batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position from `get_state`, at any time, without reading what lies before it.

        Raises `DataError` if `state` is none, or lies beyond the last batch.
        """
        batch = state.get("batch")
        if type(batch) is not int or batch < 0 or (self.num_batches is not None and batch > self.num_batches):
            end = "" if self.num_batches is None else f" up to {self.num_batches}"
            raise DataError(f'not a position in this data: {state}; expected {{"batch": t}} with t from 0{end}')
        self.close()
        self._next = batch

    def close(self) -> None:
        """Ends threads and worker processes. Going on afterwards is allowed and starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _dataset_from(self, batch: int) -> grain.IterDataset:
        # The position is a slice, not Grain's own state: that one has an entry for each worker process.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        dataset = self._batches[batch:].to_iter_dataset(ahead)
        if self._num_workers == 0:
            return dataset
        if not flags.FLAGS.is_parsed():
            # Grain's process prefetch reads an absl command-line flag, an error in a program that is no absl app.
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=2)
        return dataset.mp_prefetch(workers, worker_init_fn=_live_with_parent)


_running: weakref.WeakSet[BatchLoader] = weakref.WeakSet()


@atexit.register
def _close_running() -> None:
    # Left to itself, Grain ends its worker processes too late at exit: shared memory leaks, and it prints tracebacks.
    for loader in list(_running):
        loader.close()


def build_loader(
    source: SampleSource,
    *,
    global_batch_size: int,
    rows: Sequence[int] | None = None,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    num_workers: int = 0,
) -> BatchLoader:
    """Builds the loader of one process.

    Samples flow across the end of an epoch: a batch may hold the last samples of one and the first of the next, and
    each sample is read once an epoch. Only what is left after the last of `num_epochs` (fewer than
    `global_batch_size` samples) is dropped.

    Args:
      source: the samples; all processes must hold the same ones.
      global_batch_size: samples in a global batch, B.
      rows: which rows (0 ... B - 1) of each global batch this process needs; None is all. No other row is read.
      seed: a number from 0; decides the order, together with the number of the epoch.
      shuffle: False keeps the order of `source` in every epoch.
      num_epochs: passes over the data; None is without an end.
      num_workers: processes that read ahead (0: a thread). They are started afresh ("spawn"), so a script needs
        `if __name__ == "__main__":`. The batches are the same whatever the number.

    Raises:
      DataError: fewer samples than one global batch, a row outside of it, or a negative number.
    """
    size = global_batch_size
    rows = list(range(size)) if rows is None else list(rows)
    if not rows or not all(0 <= row < size for row in rows):
        raise DataError(f"rows {rows} are not rows of a global batch of {size} (0 ... {size - 1})")
    if len(source) < size:
        raise DataError(
            f"{len(source)} samples < actor.global_batch_size = {size}: {source!r} does not fill one global batch; "
            "give more data, a smaller runner.seq_length or a smaller actor.global_batch_size"
        )
    order = BatchOrder(size, seed, shuffle, num_epochs)
    return order.loader(grain.MapDataset.source(source), lambda samples: _ReadRows(samples, size, rows), num_workers)


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which samples are in which global batch; fields as in `build_loader`."""

    global_batch_size: int
    seed: int
    shuffle: bool
    num_epochs: int | None

    def loader(
        self,
        samples: grain.MapDataset,
        reader: Callable[[grain.MapDataset], Callable[[int], Batch]],
        num_workers: int,
    ) -> BatchLoader:
        """Loader of `reader(endless)(t)` for t = 0, 1, …: global batch t is `endless[t * B : (t + 1) * B]`.

        Raises:
          DataError: a negative number.
        """
        size, seed, num_samples = self.global_batch_size, self.seed, len(samples)
        if seed < 0 or num_workers < 0 or (self.num_epochs is not None and self.num_epochs < 1):
            raise DataError(
                f"bad data.seed={seed} (from 0), data.num_workers={num_workers} (from 0), epochs={self.num_epochs}"
            )
        if self.shuffle:
            # Grain orders epoch e by seed + e. Hashed first, or seed 1 would begin with the second epoch of seed 0.
            samples = samples.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        num_batches = None if self.num_epochs is None else self.num_epochs * num_samples // size
        batches = grain.MapDataset.range(sys.maxsize // size if num_batches is None else num_batches)
        batches = batches.map(reader(samples.repeat(self.num_epochs)))
        return BatchLoader(batches, num_samples // size, num_batches, num_workers)


@dataclasses.dataclass(frozen=True)
class _ReadRows:
    """Number of a global batch -> its rows, stacked."""

    samples: grain.MapDataset
    global_batch_size: int
    rows: list[int]

    def __call__(self, batch: int) -> Batch:
        samples = [self.samples[batch * self.global_batch_size + row] for row in self.rows]
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


def _live_with_parent(worker: int, num_workers: int) -> None:
    """Makes a worker process end when its parent does, and neither earlier nor later."""
    # Ctrl-C reaches the whole process group. The trainer answers it with a checkpoint and then closes its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:  # a parent that is killed cannot close its workers, and they would wait for it for ever
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
