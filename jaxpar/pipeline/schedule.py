"""Pipeline schedules as data: who does what in each tick. No jax here.

Each of P stages holds V chunks of the layers; chunk c of stage s is the virtual stage c·P + s. A tick has three slots:
F (forward), B (gradient of the activations, and of the weights too unless the table splits them) and W (gradient of the
weights). In a slot each stage works on one item, a microbatch in one of its chunks, or on none. All stages run the
slots of a tick in step; after its slot an activation goes one virtual stage up, a gradient one down, and waits there
until its turn in a later tick.

A new schedule is one function that returns a table, and an entry in SCHEDULES.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

IDLE = -1  # instead of an item


class ScheduleError(ValueError):
    """A table that cannot be run; the message points at tick, slot and stage."""


@dataclass(frozen=True)
class Segment:
    """A run of ticks that use the same slots, so that one loop body serves them all."""

    ticks: slice
    forward: bool
    backward: bool
    weight: bool


@dataclass(frozen=True)
class Buffers:
    """Places for what waits, the fewest that fit; the same number on all stages because all run one program.

    Attributes:
      sizes: how many places each kind needs: "kept" (what backward needs of an item, from its F to its last slot),
        "pending" (what W needs of B), "from_below" and "from_above" (arrived, not yet used), "outputs" (of the last
        virtual stage, waiting for the loss).
      tables: int arrays [ticks, stages], the place that a slot reads or writes, named by kind and slot. An unused slot
        runs too, and scribbles on a free place.
    """

    sizes: Mapping[str, int]
    tables: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Schedule:
    """A pipeline schedule.

    Attributes:
      name: its name in YAML.
      num_chunks, num_microbatches: V and M.
      forward, backward, weight: int arrays [ticks, stages], chunk · M + microbatch of the item that each stage works
        on, or IDLE. `weight` is None where B computes the gradient of the weights too; a table without any B only
        evaluates.

    Raises:
      ScheduleError: on creation, where the table is not runnable.
    """

    name: str
    num_chunks: int
    num_microbatches: int
    forward: np.ndarray
    backward: np.ndarray
    weight: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_ticks(self) -> int:
        return self.forward.shape[0]

    @property
    def num_stages(self) -> int:
        return self.forward.shape[1]

    @property
    def slots(self) -> dict[str, np.ndarray]:
        """The tables in use, by slot: F, B and W in the order in which a tick runs them."""
        tables = {"F": self.forward, "B": self.backward, "W": self.weight}
        return {slot: table for slot, table in tables.items() if table is not None and (table != IDLE).any()}

    @cached_property
    def ticks_of(self) -> dict[str, np.ndarray]:
        """For each slot in use the tick of each item, int [virtual stages, microbatches]."""
        result = {}
        for slot, table in self.slots.items():
            ticks = np.full((self.num_chunks, self.num_stages, self.num_microbatches), IDLE)
            for tick, stage in np.argwhere(table != IDLE):
                chunk, microbatch = divmod(table[tick, stage], self.num_microbatches)
                ticks[chunk, stage, microbatch] = tick
            result[slot] = ticks.reshape(-1, self.num_microbatches)
        return result

    @cached_property
    def runs(self) -> dict[str, np.ndarray]:
        """bool [ticks] for each slot, and for "head" (the loss), "embed" and "embed_grad": ticks that execute it."""
        first, last = self.num_microbatches, (self.num_chunks - 1) * self.num_microbatches
        runs = {slot: _filled((table != IDLE).any(1)) for slot, table in self.slots.items()}
        none = np.zeros(self.num_ticks, bool)
        runs = {slot: runs.get(slot, none) for slot in "FBW"}
        entering = {slot: (t[:, 0] != IDLE) & (t[:, 0] < first) for slot, t in self.slots.items()}
        leaving = self.slots.get("B", self.forward)[:, -1]
        # With one chunk the embedding runs along with the layers; with more, only where a microbatch enters.
        alone = self.num_chunks == 1
        return {
            **runs,
            "head": (leaving != IDLE) & (leaving >= last),
            "embed": runs["F"] if alone else entering["F"],
            "embed_grad": runs["B"] if alone else entering.get("B", none),
        }

    @cached_property
    def segments(self) -> list[Segment]:
        runs, segments, start = self.runs, [], 0
        for flags, ticks in groupby(zip(runs["F"], runs["B"], runs["W"], _filled(runs["head"]), strict=True)):
            stop = start + len(list(ticks))
            segments.append(Segment(slice(start, stop), *map(bool, flags[:3])))
            start = stop
        return segments

    @cached_property
    def in_flight(self) -> list[int]:
        """For each stage, the most items (microbatches, or microbatches of a chunk) whose forward is done and whose
        last slot is not, the one in work included: what it must keep activations for."""
        last = self.ticks_of[list(self.slots)[-1]]
        counts = np.zeros((self.num_ticks + 1, self.num_stages), int)
        for virtual, microbatch in np.ndindex(last.shape):
            counts[self.ticks_of["F"][virtual, microbatch], virtual % self.num_stages] += 1
            counts[last[virtual, microbatch] + 1, virtual % self.num_stages] -= 1
        return [int(n) for n in counts.cumsum(0).max(0)]

    @cached_property
    def buffers(self) -> Buffers:
        ticks, order, virtual = self.ticks_of, list(self.slots), range(self.num_chunks * self.num_stages)
        lifetimes: dict[tuple[str, str, str], list[tuple[int, int]]] = {}  # kind, writer, reader: virtual stages
        for reader in order[1:]:
            lifetimes["kept", "F", reader] = [(v, v) for v in virtual]
        if "W" in order:
            lifetimes["pending", "B", "W"] = [(v, v) for v in virtual]
        lifetimes["from_below", "F", "F"] = [(v, v + 1) for v in virtual[:-1]]
        if "B" in order:
            lifetimes["from_above", "B", "B"] = [(v, v - 1) for v in virtual[1:]]
            lifetimes["outputs", "F", "B"] = [(virtual[-1], virtual[-1])]
        sizes: dict[str, int] = {}
        tables: dict[str, np.ndarray] = {}
        for kind in dict.fromkeys(kind for kind, _, _ in lifetimes):
            readers = [key for key in lifetimes if key[0] == kind]
            places = _Places(self, writer=readers[0][1], own=kind in ("from_below", "from_above"))
            for _, writer, reader in readers:
                for source, target in lifetimes[kind, writer, reader]:
                    places.hold(source, target, ticks[writer][source], reader, ticks[reader][target])
            sizes[kind], found = places.allocate()
            tables |= {f"{kind}_{name}": table for name, table in found.items()}
        return Buffers(sizes, tables)

    def slot_time(self, forward_cost: float = 1.0, backward_cost: float = 1.0, weight_cost: float = 1.0) -> float:
        """Time of the whole table, in units in which one microbatch's F, B and W take these costs on a whole stage. A
        slot costs the same to all as soon as one stage uses it."""
        costs = {"F": forward_cost, "B": backward_cost, "W": weight_cost}
        if self.weight is None:
            costs["B"] += costs.pop("W")
        return sum(self.runs[slot].sum() * cost for slot, cost in costs.items()) / self.num_chunks

    def bubble_fraction(self, forward_cost: float = 1.0, backward_cost: float = 1.0, weight_cost: float = 1.0) -> float:
        """Share of a stage's time in which it does nothing useful."""
        useful = forward_cost + ((backward_cost + weight_cost) if "B" in self.slots else 0)
        return float(1 - self.num_microbatches * useful / self.slot_time(forward_cost, backward_cost, weight_cost))


class _Places:
    """Gives what waits a place. Times are counted in half slots, so that a slot reads before, or writes after, others."""

    def __init__(self, schedule: Schedule, *, writer: str, own: bool):
        self.schedule, self.writer = schedule, writer
        # A message is written when its slot ends, after the same slot's reads; what a stage itself produces, at once.
        self.written_at = 1 if own else 0
        self.ends: dict[tuple[int, int], int] = {}  # (stage, tick of writing) → time of the last read
        self.reads: dict[str, list[tuple[int, int, int]]] = {}  # reader → (stage, tick of writing, tick of reading)

    def _time(self, tick: int, slot: str) -> int:
        return (tick * 3 + "FBW".index(slot)) * 2

    def hold(self, source: int, target: int, written: np.ndarray, reader: str, read: np.ndarray) -> None:
        stage = target % self.schedule.num_stages
        for start, end in zip(written.tolist(), read.tolist(), strict=True):
            key = (stage, start)
            self.ends[key] = max(self.ends.get(key, 0), self._time(end, reader))
            self.reads.setdefault(reader, []).append((stage, start, end))

    def allocate(self) -> tuple[int, dict[str, np.ndarray]]:
        shape, used = self.schedule.forward.shape, self.schedule.runs[self.writer]
        writes = np.zeros(shape, int)
        for stage in range(shape[1]):
            free_from: list[int] = []  # of each place
            for tick in np.flatnonzero(used).tolist():
                start = self._time(tick, self.writer) + self.written_at
                end = self.ends.get((stage, tick), start)
                place = next((i for i, free in enumerate(free_from) if free < start), len(free_from))
                free_from[place : place + 1] = [end]
                writes[tick, stage] = place
        tables = {"write": writes}
        for reader, reads in self.reads.items():
            tables[f"read_{reader}"] = np.zeros(shape, int)
            for stage, start, end in reads:
                tables[f"read_{reader}"][end, stage] = writes[start, stage]
        return int(writes.max()) + 1, tables


def gpipe(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """All forwards, then all backwards (Huang et al., 2019, arXiv:1811.06965); keeps every microbatch's activations."""
    return _waves("gpipe", num_stages, num_microbatches, num_chunks, all_forwards_first=True)


def one_forward_one_backward(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """1F1B (Narayanan et al., 2021, arXiv:2104.04473) in lock-step: the last stage turns each microbatch round at once.

    Stage s keeps 2(P-1-s)+1 microbatches ("eager 1F1B"), whatever their number, and the time is that of 1F1B:
    (M+P-1)(F+B). With V chunks it is the paper's interleaved schedule: the bubble is divided by V, and stage s keeps
    (V+1)P-2s-1 items, each 1/V of a microbatch's activations on the stage, as many as Megatron-LM.
    """
    return _waves("1f1b", num_stages, num_microbatches, num_chunks)


def zero_bubble(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """1F1B with the gradient of the weights put off (Qi et al., 2023, arXiv:2401.10241), in lock-step.

    Every stage does W of an item in the tick of stage 0's B of it, when no other stage waits for anything. The time is
    ((MV+P-1)(F+B) + MV·W)/V: with one chunk 2/3 of 1F1B's bubble where F = B = W, with two chunks that of the paper's
    ZB-H1, (P-1)(F+B-W).
    """
    return _waves("zb1p", num_stages, num_microbatches, num_chunks, split_weight=True)


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "eager_1f1b": one_forward_one_backward,
    "interleaved_1f1b": one_forward_one_backward,
    "zb1p": zero_bubble,
}


def forward_only(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """For evaluation."""
    return _waves("forward_only", num_stages, num_microbatches, num_chunks, backward=False)


def build_schedule(name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """The table called `name` (a key of SCHEDULES).

    Raises:
      ScheduleError: no such schedule, or a size below 1.
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"actor.model.pipeline_schedule: {name!r} is none of: {', '.join(SCHEDULES)}")
    if min(num_stages, num_microbatches, num_chunks) < 1:
        raise ScheduleError(
            f"a schedule needs at least one stage, microbatch and chunk, not {num_stages}, {num_microbatches} and "
            f"{num_chunks}"
        )
    return SCHEDULES[name](num_stages, num_microbatches, num_chunks)


def _waves(
    name: str,
    num_stages: int,
    num_microbatches: int,
    num_chunks: int,
    *,
    all_forwards_first: bool = False,
    split_weight: bool = False,
    backward: bool = True,
) -> Schedule:
    """Stage s does its forwards one after the other from tick s on, the last stage its backwards as soon as it can, each
    stage below a tick later."""
    stages, groups = np.arange(num_stages), _groups(num_stages, num_microbatches)
    up = _order(groups, num_microbatches, range(num_chunks))
    down = _order(groups, num_microbatches, range(num_chunks)[::-1])
    turn = len(up) if all_forwards_first else (num_chunks - 1) * max(map(len, groups))
    first_backward = turn + num_stages - 1 + stages[::-1]
    tables = [_wave(stages, up)]
    if backward:
        tables.append(_wave(first_backward, down))
    if split_weight:
        tables.append(_wave(first_backward[:1] + 0 * stages, down))
    num_ticks = max(map(len, tables))
    tables = [np.pad(t, ((0, num_ticks - len(t)), (0, 0)), constant_values=IDLE) for t in tables]
    if not backward:
        tables.append(np.full_like(tables[0], IDLE))
    return Schedule(name, num_chunks, num_microbatches, *tables)


def _groups(num_stages: int, num_microbatches: int) -> list[list[int]]:
    """Microbatches that go through a chunk before the next chunk's turn: at least P of them, so that the first is back
    from the last stage by then. Fewer than P microbatches leave gaps (IDLE)."""
    if num_microbatches < num_stages:
        return [[*range(num_microbatches), *[IDLE] * (num_stages - num_microbatches)]]
    return [part.tolist() for part in np.array_split(np.arange(num_microbatches), num_microbatches // num_stages)]


def _order(groups: list[list[int]], num_microbatches: int, chunks: range) -> list[int]:
    items = [IDLE if m == IDLE else c * num_microbatches + m for group in groups for c in chunks for m in group]
    while items[-1] == IDLE:
        items.pop()
    return items


def _wave(start: np.ndarray, items: list[int]) -> np.ndarray:
    """A table in which stage s does `items` one a tick from tick start[s] on."""
    table = np.full((start.max() + len(items), len(start)), IDLE)
    for stage, tick in enumerate(start):
        table[tick : tick + len(items), stage] = items
    return table


def _filled(used: np.ndarray) -> np.ndarray:
    """True from the first to the last True."""
    return np.maximum.accumulate(used) & np.maximum.accumulate(used[::-1])[::-1]


def _check(schedule: Schedule) -> None:
    """Each item once in each slot, after what it needs."""
    tables = {"F": schedule.forward, "B": schedule.backward, "W": schedule.weight}
    for slot, table in tables.items():
        if table is None:
            continue
        if table.shape != schedule.forward.shape or table.ndim != 2:
            raise ScheduleError(
                f"{schedule.name}: tables F and {slot} of shapes {schedule.forward.shape} and {table.shape} do not match"
            )
        if slot in schedule.slots or slot == "F":
            _check_complete(schedule, slot, table)
    ticks, virtual = schedule.ticks_of, range(schedule.num_chunks * schedule.num_stages)
    needs = [("F", v, "F", v - 1, 1) for v in virtual[1:]]
    if "B" in ticks:
        needs += [("B", v, "F", v, 0) for v in virtual] + [("B", v, "B", v + 1, 1) for v in virtual[:-1]]
    if "W" in ticks:
        needs += [("W", v, "B", v, 0) for v in virtual]
    for slot, v, source, u, delay in needs:
        late = np.flatnonzero(ticks[slot][v] - ticks[source][u] < delay)
        if late.size:
            m = int(late[0])
            tick, stage = int(ticks[slot][v, m]), v % schedule.num_stages
            raise ScheduleError(
                f"{schedule.name}: tick {tick}, stage {stage}: {slot} of microbatch {m}{_chunk(schedule, v)} needs "
                f"{source} of stage {u % schedule.num_stages}{_chunk(schedule, u)}, which is in tick "
                f"{ticks[source][u, m]}; it must be in {'an earlier tick' if delay else 'the same tick or earlier'}\n"
                f"{_excerpt(schedule, tick, stage, slot)}"
            )


def _check_complete(schedule: Schedule, slot: str, table: np.ndarray) -> None:
    items = schedule.num_chunks * schedule.num_microbatches
    for stage, done in enumerate(table.T):
        found, counts = np.unique(done[done != IDLE], return_counts=True)
        if list(found) != list(range(items)) or (counts != 1).any():
            raise ScheduleError(
                f"{schedule.name}: stage {stage} does {slot} of items {done[done != IDLE].tolist()}, not of each of 0 "
                f"to {items - 1} (chunk x {schedule.num_microbatches} + microbatch) once"
            )


def _chunk(schedule: Schedule, virtual: int) -> str:
    return f", chunk {virtual // schedule.num_stages}" if schedule.num_chunks > 1 else ""


def _excerpt(schedule: Schedule, tick: int, stage: int, slot: str) -> str:
    """The ticks around a fault, drawn, with a mark at the fault."""
    ticks = range(max(0, tick - 2), min(schedule.num_ticks, tick + 3))
    width = 2 + len(str(schedule.num_chunks * schedule.num_microbatches))
    lines = ["  " + "tick".ljust(9) + "".join(str(t).ljust(width * len(schedule.slots) + 1) for t in ticks)]
    for s in range(schedule.num_stages):
        line = f"  stage {s}".ljust(11)
        for t in ticks:
            for name, table in schedule.slots.items():
                text = "." if table[t, s] == IDLE else f"{name}{table[t, s]}"
                line += (text + ("!" if (t, s, name) == (tick, stage, slot) else "")).ljust(width)
            line += " "
        lines.append(line.rstrip())
    return "\n".join(lines)
