"""Checks that a schedule's tables can be run, with errors that point into them. Needs no jax."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

IDLE = -1  # instead of an item
AROUND = 4  # ticks that are drawn before and after a fault


class ScheduleError(ValueError):
    """A table cannot be run. The message points at the tick, slot and stage."""


@dataclass(frozen=True)
class Tables:
    """The tables of a schedule, before they are checked.

    Attributes:
      slots: for F, B and possibly W, an int array [ticks, stages]: chunk * M + microbatch, or IDLE.
    """

    name: str
    num_chunks: int
    num_microbatches: int
    slots: Mapping[str, np.ndarray]

    def ticks(self) -> dict[str, np.ndarray]:
        """For each slot in use, the tick of each item, int [virtual stages, microbatches].

        Raises:
          ScheduleError: an item is not in each slot exactly once, or it comes before something that it needs.
        """
        self._check_shapes()
        evaluates = all((table == IDLE).all() for slot, table in self.slots.items() if slot != "F")
        ticks = {slot: self._ticks_of(slot) for slot in (["F"] if evaluates else self.slots)}
        for slot, virtual, source, needed, delay in _needs(len(ticks["F"]), ticks):
            late = np.flatnonzero(ticks[slot][virtual] - ticks[source][needed] < delay)
            if late.size:
                microbatch = int(late[0])
                stages = self.slots["F"].shape[1]
                raise self._error(
                    f"{slot} of {self._words(virtual // stages, microbatch)} needs {source} of stage "
                    f"{needed % stages}{self._chunk(needed // stages)}, which is in tick "
                    f"{ticks[source][needed, microbatch]}; it must be in "
                    f"{'an earlier tick' if delay else 'the same tick or earlier'}",
                    *(int(ticks[slot][virtual, microbatch]), virtual % stages, slot),
                )
        return ticks

    def label(self, slot: str, item: int) -> str:
        """F3 is the forward of microbatch 3. With several chunks, F3a is its forward in the first chunk, F3b in the
        second."""
        if not 0 <= item < self.num_chunks * self.num_microbatches:
            return f"{slot}[{item}]"
        chunk, microbatch = divmod(item, self.num_microbatches)
        return f"{slot}{microbatch}" + (chr(ord("a") + chunk) if self.num_chunks > 1 else "")

    def _check_shapes(self) -> None:
        forward = self.slots["F"]
        if min(self.num_chunks, self.num_microbatches) < 1 or forward.ndim != 2 or not forward.size:
            raise ScheduleError(
                f"{self.name}: a table needs at least one tick, stage, microbatch and chunk, but this one has the shape "
                f"{forward.shape} for {self.num_microbatches} microbatches in {self.num_chunks} chunks"
            )
        for slot, table in self.slots.items():
            if table.shape != forward.shape:
                raise ScheduleError(
                    f"{self.name}: tables F and {slot} have different shapes, {forward.shape} and {table.shape}"
                )
            if table.dtype.kind != "i":
                raise ScheduleError(f"{self.name}: table {slot} holds {table.dtype}, not integers")

    def _ticks_of(self, slot: str) -> np.ndarray:
        table, items = self.slots[slot], self.num_chunks * self.num_microbatches
        ticks = np.full((items, table.shape[1]), IDLE)
        for tick, stage in np.argwhere(table != IDLE).tolist():
            item = int(table[tick, stage])
            if not 0 <= item < items:
                raise self._error(
                    f"{slot} of item {item}, but items are 0 to {items - 1} (chunk x {self.num_microbatches} + microbatch)",
                    *(tick, stage, slot),
                )
            if ticks[item, stage] != IDLE:
                again = f"{slot} of {self._words(*divmod(item, self.num_microbatches))} for the second time"
                raise self._error(f"{again}, after tick {ticks[item, stage]}", tick, stage, slot)
            ticks[item, stage] = tick
        for item, stage in np.argwhere(ticks == IDLE).tolist():
            used = np.flatnonzero(table[:, stage] != IDLE)
            raise ScheduleError(
                f"{self.name}: stage {stage} never does {slot} of {self._words(*divmod(item, self.num_microbatches))}\n"
                + self._excerpt(int(used.max(initial=0)), stage, "")
            )
        by_chunk = ticks.reshape(self.num_chunks, self.num_microbatches, -1)
        return by_chunk.swapaxes(1, 2).reshape(-1, self.num_microbatches)

    def _words(self, chunk: int, microbatch: int) -> str:
        return f"microbatch {microbatch}{self._chunk(chunk)}"

    def _chunk(self, chunk: int) -> str:
        return f" in chunk {chunk}" if self.num_chunks > 1 else ""

    def _error(self, text: str, tick: int, stage: int, slot: str) -> ScheduleError:
        drawn = self._excerpt(tick, stage, slot)
        return ScheduleError(f"{self.name}: tick {tick}, stage {stage}: {text}\n{drawn}")

    def _excerpt(self, tick: int, stage: int, slot: str) -> str:
        """A drawing of the ticks and stages around a fault, with a mark at the fault."""
        num_ticks, num_stages = self.slots["F"].shape
        ticks = range(max(0, tick - AROUND), min(num_ticks, tick + AROUND + 1))
        stages = range(num_stages) if num_stages <= 8 else range(max(0, stage - 2), min(num_stages, stage + 3))
        cells = {(t, s): self._cell(t, s, (tick, stage, slot)) for t in ticks for s in stages}
        width = max(map(len, cells.values())) + 2
        lines = ["  " + "tick".ljust(9) + "".join(str(t).ljust(width) for t in ticks)]
        lines += [f"  stage {s}".ljust(11) + "".join(cells[t, s].ljust(width) for t in ticks) for s in stages]
        return "\n".join(line.rstrip() for line in lines)

    def _cell(self, tick: int, stage: int, fault: tuple[int, int, str]) -> str:
        texts = []
        for slot, table in self.slots.items():
            item = int(table[tick, stage])
            text = "." if item == IDLE else self.label(slot, item)
            texts.append(text + ("!" if (tick, stage, slot) == fault else ""))
        return " ".join(texts)


def _needs(num_virtual: int, slots: Mapping) -> Iterator[tuple[str, int, str, int, int]]:
    """Every dependence: (slot, virtual stage, the slot that it needs, of which virtual stage, at least how many ticks
    earlier)."""
    for v in range(num_virtual):
        if v > 0:
            yield "F", v, "F", v - 1, 1
        if "B" in slots:
            yield "B", v, "F", v, 0
            if v + 1 < num_virtual:
                yield "B", v, "B", v + 1, 1
        if "W" in slots:
            yield "W", v, "B", v, 0
