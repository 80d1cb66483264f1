"""Where items wait between two slots: as few places as fit, and who writes and reads which. No jax here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# kind → slot that writes, slots that read, virtual stages from the writer to the reader.
KINDS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "kept": ("F", ("B", "W"), 0),
    "pending": ("B", ("W",), 0),
    "from_below": ("F", ("F",), 1),
    "from_above": ("B", ("B",), -1),
    "outputs": ("F", ("B",), 0),
}


@dataclass(frozen=True)
class Buffers:
    """Places for what waits, the fewest that fit; the same number on all stages because all run one program.

    Attributes:
      sizes: how many places each kind needs: "kept" (what backward needs of an item, from its F to its last slot),
        "pending" (what W needs of B), "from_below" and "from_above" (arrived, not yet used), "outputs" (of the last
        virtual stage, waiting for the loss).
      tables: int arrays [ticks, stages], the place that a slot reads or writes, named by kind and slot: "kept_write",
        "kept_read_B", … An unused slot runs too, and scribbles on a free place.
    """

    sizes: Mapping[str, int]
    tables: Mapping[str, np.ndarray]


def plan_buffers(ticks_of: Mapping[str, np.ndarray], runs: Mapping[str, np.ndarray], num_stages: int) -> Buffers:
    """For a table's `Schedule.ticks_of` and `Schedule.runs`."""
    virtual = np.arange(len(ticks_of["F"]))
    sizes: dict[str, int] = {}
    tables: dict[str, np.ndarray] = {}
    for kind, (writer, all_readers, step) in KINDS.items():
        readers = [slot for slot in all_readers if slot in ticks_of]
        if not readers:
            continue
        targets = virtual[-1:] if kind == "outputs" else virtual[max(step, 0) : len(virtual) + min(step, 0)]
        stage = np.broadcast_to(targets[:, None] % num_stages, ticks_of["F"][targets].shape)
        written = ticks_of[writer][targets - step], stage
        read = {slot: (ticks_of[slot][targets], stage) for slot in readers}

        # A message is written when its slot has ended, after the slot's own reads; what a stage itself makes, at once.
        starts = _times(len(runs[writer]), writer)[:, None] + bool(step) + np.zeros(num_stages, int)
        ends = starts.copy()
        for slot, (tick, _) in read.items():
            np.maximum.at(ends, written, _times(len(runs[slot]), slot)[tick])
        places = _places(starts[runs[writer]].T.tolist(), ends[runs[writer]].T.tolist())

        sizes[kind] = places.max() + 1
        tables[f"{kind}_write"] = write = np.zeros_like(starts)
        write[runs[writer]] = places.T
        for slot, where in read.items() if len(targets) else ():
            tables[f"{kind}_read_{slot}"] = table = np.zeros_like(starts)
            table[where] = write[written]
    return Buffers({kind: int(size) for kind, size in sizes.items()}, tables)


def _times(num_ticks: int, slot: str) -> np.ndarray:
    """When each tick's slot starts, in half slots, which is as fine as it needs."""
    return (np.arange(num_ticks) * 3 + "FBW".index(slot)) * 2


def _places(starts: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]) -> np.ndarray:
    """A place for each interval, int [stages, intervals]. In order of their starts the first free place will do: when
    place n is taken, n other intervals are open, so none fewer fits."""
    result = np.zeros(np.shape(starts), int)
    for stage, intervals in enumerate(zip(starts, ends, strict=True)):
        free_from: list[int] = []  # of each place
        for i, (start, end) in enumerate(zip(*intervals, strict=True)):
            place = next((n for n, free in enumerate(free_from) if free < start), len(free_from))
            free_from[place : place + 1] = [end]
            result[stage, i] = place
    return result
