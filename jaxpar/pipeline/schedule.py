"""Pipeline schedules as data: which stage does what in each tick. Needs no jax.

Each of P stages holds V chunks of the layers; chunk c of stage s is the virtual stage c * P + s. A tick has three slots:
F (forward), B (gradient of the activations, and of the weights too unless the table splits them) and W (gradient of the
weights). In a slot, each stage works on one item, which is a microbatch in one of its chunks, or it is idle. All stages
run the slots of a tick in lock-step. After its slot, an activation goes one virtual stage up or a gradient one down, and
waits there for its turn in a later tick.

A new schedule is a function that returns a table, and an entry in SCHEDULES.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np

from jaxpar.pipeline.buffers import BufferPlan, plan_buffers
from jaxpar.pipeline.check import IDLE, ScheduleError, Tables


@dataclass(frozen=True)
class Segment:
    """Consecutive ticks that use the same slots, so that one loop serves them all."""

    ticks: slice
    forward: bool
    backward: bool
    weight: bool


@dataclass(frozen=True, eq=False)
class Schedule:
    """A pipeline schedule.

    Attributes:
      name: its name in YAML.
      num_chunks, num_microbatches: V and M.
      forward, backward, weight: int arrays [ticks, stages]: chunk * M + microbatch of the item that each stage works on,
        or IDLE. `weight` is None if B computes the gradient of the weights too. A table without any B only evaluates.
      ticks_of: for each slot in use, the tick of each item, int [virtual stages, microbatches].

    Raises:
      ScheduleError: on creation, if the table cannot be run.
    """

    name: str
    num_chunks: int
    num_microbatches: int
    forward: np.ndarray
    backward: np.ndarray
    weight: np.ndarray | None = None

    def __post_init__(self) -> None:
        _ = self.ticks_of

    @cached_property
    def ticks_of(self) -> dict[str, np.ndarray]:
        return self.tables.ticks()

    @cached_property
    def tables(self) -> Tables:
        weight = {} if self.weight is None else {"W": self.weight}
        slots = {"F": self.forward, "B": self.backward, **weight}
        return Tables(self.name, self.num_chunks, self.num_microbatches, slots)

    @property
    def num_ticks(self) -> int:
        return self.forward.shape[0]

    @property
    def num_stages(self) -> int:
        return self.forward.shape[1]

    @property
    def slots(self) -> dict[str, np.ndarray]:
        """The tables in use, by slot, in the order in which a tick runs them: F, B, W."""
        return {slot: self.tables.slots[slot] for slot in self.ticks_of}

    @cached_property
    def runs(self) -> dict[str, np.ndarray]:
        """bool [ticks] for each slot, and for "head" (the loss), "embed" and "embed_grad": the ticks that execute it.

        A slot runs from its first item to its last without a gap, so that the program has few loops. Ticks in between
        that no stage uses still cost time.
        """
        first, last = self.num_microbatches, (self.num_chunks - 1) * self.num_microbatches
        none = np.zeros(self.num_ticks, bool)
        runs = dict.fromkeys("FBW", none) | {s: _filled((table != IDLE).any(1)) for s, table in self.slots.items()}
        entering = {slot: (t[:, 0] != IDLE) & (t[:, 0] < first) for slot, t in self.slots.items()}
        leaving = self.slots.get("B", self.forward)[:, -1]
        # With one chunk, the embedding runs along with the layers. With more, it runs only if a microbatch enters.
        alone = self.num_chunks == 1
        return {
            **runs,
            "head": (leaving != IDLE) & (leaving >= last),
            "embed": runs["F"] if alone else entering["F"],
            "embed_grad": runs["B"] if alone else entering.get("B", none),
        }

    @cached_property
    def segments(self) -> list[Segment]:
        """The loops of the program. Their number does not grow with the number of microbatches.

        Ticks before the first loss and after the last one have loops of their own, which need no check for a loss.
        """
        runs, segments, start = self.runs, [], 0
        for flags, ticks in groupby(zip(runs["F"], runs["B"], runs["W"], _filled(runs["head"]), strict=True)):
            stop = start + len(list(ticks))
            segments.append(Segment(slice(start, stop), *map(bool, flags[:3])))
            start = stop
        return segments

    @property
    def timeline(self) -> list[tuple[int, str]]:
        """(tick, slot) of every slot that the program executes, in order."""
        return [(tick, slot) for tick in range(self.num_ticks) for slot in self.slots if self.runs[slot][tick]]

    @cached_property
    def in_flight(self) -> list[int]:
        """For each stage, the largest number of items (microbatches in a chunk) for which it must keep activations: those
        whose F has begun and whose last slot has not ended."""
        counts = np.zeros((self.num_ticks + 1, self.num_stages), int)
        stages = np.arange(self.num_stages * self.num_chunks)[:, None] % self.num_stages
        np.add.at(counts, (self.ticks_of["F"], stages), 1)
        np.add.at(counts, (self.ticks_of[list(self.slots)[-1]] + 1, stages), -1)
        return [int(n) for n in counts.cumsum(0).max(0)]

    @cached_property
    def buffers(self) -> BufferPlan:
        return plan_buffers(self.ticks_of, self.runs, self.num_stages)

    def slot_costs(
        self, forward_cost: float = 1.0, backward_cost: float = 1.0, weight_cost: float = 1.0
    ) -> dict[str, float]:
        """The time of each slot in use, if F, B and W of one microbatch on a whole stage take these times."""
        costs = {"F": forward_cost, "B": backward_cost, "W": weight_cost}
        if self.weight is None:
            costs["B"] += costs["W"]
        return {slot: costs[slot] / self.num_chunks for slot in self.slots}

    def slot_time(self, forward_cost: float = 1.0, backward_cost: float = 1.0, weight_cost: float = 1.0) -> float:
        """The time of the whole table, in the units of `slot_costs`. A slot costs an idle stage as much as a busy one."""
        costs = self.slot_costs(forward_cost, backward_cost, weight_cost)
        return float(sum(self.runs[slot].sum() * cost for slot, cost in costs.items()))

    def bubble_fraction(self, forward_cost: float = 1.0, backward_cost: float = 1.0, weight_cost: float = 1.0) -> float:
        """The share of its time in which a stage does nothing useful."""
        useful = sum(self.slot_costs(forward_cost, backward_cost, weight_cost).values()) * self.num_chunks
        return 1 - self.num_microbatches * useful / self.slot_time(forward_cost, backward_cost, weight_cost)


def gpipe(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """All forwards, then all backwards (Huang et al., 2019, arXiv:1811.06965); keeps every microbatch's activations."""
    return _waves("gpipe", num_stages, num_microbatches, num_chunks, all_forwards_first=True)


def one_forward_one_backward(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """1F1B (Narayanan et al., 2021, arXiv:2104.04473) in lock-step: the last stage does B of a microbatch right after F.

    Stage s keeps 2(P-1-s)+1 microbatches ("eager 1F1B"), whatever their number. The time is that of 1F1B: (M+P-1)(F+B).
    With V chunks it is the paper's interleaved schedule: the bubble is divided by V, and stage s keeps (V+1)P-2s-1 items,
    each with 1/V of a microbatch's activations on the stage, as in Megatron-LM.
    """
    return _waves("1f1b", num_stages, num_microbatches, num_chunks)


def zero_bubble(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """1F1B with the gradient of the weights put off (Qi et al., 2023, arXiv:2401.10241), in lock-step.

    Every stage does W of an item in the tick in which stage 0 does B of it, when no other stage waits for anything. The
    time is ((MV+P-1)(F+B) + MV * W)/V. If F = B = W, the bubble is 2/3 of 1F1B's with one chunk, and with two chunks that
    of the paper's ZB-H1, (P-1)(F+B-W).
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
    """The schedule of an evaluation."""
    return _waves("forward_only", num_stages, num_microbatches, num_chunks, backward=False)


def build_schedule(name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """Makes the table of a schedule.

    Args:
      name: a key of SCHEDULES.

    Raises:
      ScheduleError: there is no such schedule, a size is below 1, or one stage has several chunks.
    """
    if name not in SCHEDULES:
        raise ScheduleError(
            f"actor.model.pipeline_schedule: {name!r} is not a schedule: choose one of {', '.join(SCHEDULES)}"
        )
    if min(num_stages, num_microbatches, num_chunks) < 1:
        raise ScheduleError(
            f"a schedule needs at least one stage, microbatch and chunk, not {num_stages}, {num_microbatches} and "
            f"{num_chunks}"
        )
    if num_chunks > 1 and num_stages == 1:
        raise ScheduleError(
            f"{num_chunks} chunks need at least two stages: with one there is no pipeline to interleave"
        )
    return replace(SCHEDULES[name](num_stages, num_microbatches, num_chunks), name=name)


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
    """Stage s does its forwards one after the other from tick s on. The last stage does its backwards as early as it can,
    and each stage below does them one tick later."""
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
    """Groups of microbatches that go through one chunk before the next chunk's turn. A group has at least P of them, so
    that the first is back from the last stage by then. Fewer than P microbatches leave gaps (IDLE)."""
    if num_microbatches < num_stages:
        return [[*range(num_microbatches), *[IDLE] * (num_stages - num_microbatches)]]
    return [part.tolist() for part in np.array_split(np.arange(num_microbatches), num_microbatches // num_stages)]


def _order(groups: list[list[int]], num_microbatches: int, chunks: range) -> list[int]:
    items = [IDLE if m == IDLE else c * num_microbatches + m for group in groups for c in chunks for m in group]
    while items[-1] == IDLE:
        items.pop()
    return items


def _wave(start: np.ndarray, items: list[int]) -> np.ndarray:
    """A table in which stage s does `items`, one in each tick, from tick start[s] on."""
    table = np.full((start.max() + len(items), len(start)), IDLE)
    for stage, tick in enumerate(start):
        table[tick : tick + len(items), stage] = items
    return table


def _filled(used: np.ndarray) -> np.ndarray:
    """True from the first True to the last one."""
    return np.maximum.accumulate(used) & np.maximum.accumulate(used[::-1])[::-1]
