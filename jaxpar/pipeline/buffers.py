"""Where items wait between two slots: the fewest places that are enough, and which slot writes and reads each. Needs no
jax."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# kind → the slot that writes, the slots that read, the number of virtual stages from writer to reader
KINDS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "kept": ("F", ("B", "W"), 0),
    "pending": ("B", ("W",), 0),
    "from_below": ("F", ("F",), 1),
    "from_above": ("B", ("B",), -1),
    "outputs": ("F", ("B",), 0),
}


@dataclass(frozen=True)
class BufferPlan:
    """The fewest places in which values can wait. All stages have the same number, because all run the same program.

    Attributes:
      sizes: the number of places of each kind: "kept" (what the backward pass needs of an item, from its F to its last
        slot), "pending" (what W needs of B), "from_below" and "from_above" (arrived, but not yet used), "outputs" (of the
        last virtual stage, waiting for the loss).
      tables: int arrays [ticks, stages], the place that a slot reads or writes, named by kind and slot: "kept_write",
        "kept_read_B", … An idle slot runs too, and writes garbage to a free place.
    """

    sizes: Mapping[str, int]
    tables: Mapping[str, np.ndarray]


def plan_buffers(ticks_of: Mapping[str, np.ndarray], runs: Mapping[str, np.ndarray], num_stages: int) -> BufferPlan:
    """Plans the places for a schedule's `ticks_of` and `runs`."""
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

        # A message is written after its slot has ended, and so after that slot's own reads. What a stage makes for
        # itself is written at once.
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
    return BufferPlan({kind: int(size) for kind, size in sizes.items()}, tables)


def _times(num_ticks: int, slot: str) -> np.ndarray:
    """When a slot starts in each tick, in half slots."""
    return (np.arange(num_ticks) * 3 + "FBW".index(slot)) * 2


def _places(starts: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]) -> np.ndarray:
    """A place for each interval, int [stages, intervals]. Each interval, in the order of their starts, takes the first free
    place. Place n is taken only if n other intervals are open, so no fewer places are enough."""
    result = np.zeros(np.shape(starts), int)
    for stage, intervals in enumerate(zip(starts, ends, strict=True)):
        free_from: list[int] = []  # for each place
        for i, (start, end) in enumerate(zip(*intervals, strict=True)):
            place = next((n for n, free in enumerate(free_from) if free < start), len(free_from))
            free_from[place : place + 1] = [end]
            result[stage, i] = place
    return result
