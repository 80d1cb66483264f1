"""Pipeline schedules as data: who does what in each tick. No jax here.

A tick has two slots, F (forward) then B (gradient); in a slot each stage works on one microbatch or on none. All stages
run the slots of a tick in step, and after each slot activations go one stage up and gradients one stage down, so what
a stage sends in one tick its neighbour works on in the next. A new schedule is one function that returns a table,
and an entry in SCHEDULES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

IDLE = -1  # instead of a microbatch


class ScheduleError(ValueError):
    """A table that cannot be run; the message points at tick, slot and stage."""


@dataclass(frozen=True)
class Segment:
    """A run of ticks in which the same slots are used by any stage, so that one loop body serves them all."""

    ticks: slice
    forward: bool
    backward: bool
    head: bool  # the last stage has a backward, so the loss is computed


@dataclass(frozen=True, eq=False)
class Schedule:
    """A pipeline schedule.

    Attributes:
      name: its name in YAML.
      forward, backward: int arrays [ticks, stages], the microbatch that each stage works on, or IDLE.

    Raises:
      ScheduleError: on creation, where the table is not runnable.
    """

    name: str
    forward: np.ndarray
    backward: np.ndarray

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_ticks(self) -> int:
        return self.forward.shape[0]

    @property
    def num_stages(self) -> int:
        return self.forward.shape[1]

    @property
    def num_microbatches(self) -> int:
        return int(self.forward.max()) + 1

    @cached_property
    def in_flight(self) -> list[int]:
        """For each stage, the most microbatches whose forward is done and whose backward is not, the one in work
        included: what it must keep activations for."""
        tables = zip(self.forward.T, self.backward.T, strict=True)
        return [int(((f != IDLE).cumsum() - np.append(0, (b != IDLE).cumsum()[:-1])).max()) for f, b in tables]

    @cached_property
    def buffers(self) -> tuple[np.ndarray, np.ndarray]:
        """Activation buffer that each forward writes and each backward reads, int arrays [ticks, stages].

        The fewest that fit: a forward takes the lowest free one, its backward frees it. An idle forward slot runs too
        (all stages run one program), and scribbles on a free buffer.
        """
        writes, reads = np.zeros_like(self.forward), np.zeros_like(self.backward)
        for stage in range(self.num_stages):
            held: dict[int, int] = {}
            for tick in range(self.num_ticks):
                m, done = self.forward[tick, stage], self.backward[tick, stage]
                if (self.forward[tick] != IDLE).any():
                    free = next(i for i in range(len(held) + 1) if i not in held.values())
                    writes[tick, stage] = free
                    if m != IDLE:
                        held[m] = free
                if done != IDLE:
                    reads[tick, stage] = held.pop(done)
        return writes, reads

    @property
    def num_buffers(self) -> int:
        """Activation buffers a stage, the same on all because all run one program."""
        return int(self.buffers[0].max()) + 1

    @property
    def num_output_buffers(self) -> int:
        """Buffers for the last stage's output, which waits for its backward slot to enter the head."""
        return int(self.buffers[0][:, -1].max()) + 1

    @property
    def keeps_nothing(self) -> bool:
        """Every microbatch's backward follows its forward in the same tick: no buffer is needed."""
        return bool((self.forward == self.backward).all())

    @property
    def turns_at_once(self) -> bool:
        """On the last stage every backward follows its forward in the same tick: its outputs need not wait."""
        return bool((self.forward[:, -1] == self.backward[:, -1]).all())

    @property
    def segments(self) -> list[Segment]:
        used = (
            ((f != IDLE).any(), (b != IDLE).any(), b[-1] != IDLE)
            for f, b in zip(self.forward, self.backward, strict=True)
        )
        segments, start = [], 0
        for flags, ticks in groupby(used):
            stop = start + len(list(ticks))
            segments.append(Segment(slice(start, stop), *map(bool, flags)))
            start = stop
        return segments

    def slot_time(self, forward_cost: float = 1.0, backward_cost: float = 2.0) -> float:
        """Time of the whole table: a slot costs the same to all as soon as one stage uses it."""
        return sum(
            (s.ticks.stop - s.ticks.start) * (forward_cost * s.forward + backward_cost * s.backward)
            for s in self.segments
        )

    def bubble_fraction(self, forward_cost: float = 1.0, backward_cost: float = 2.0) -> float:
        """Share of a stage's time in which it does nothing useful."""
        useful = self.num_microbatches * (forward_cost + backward_cost)
        return 1 - useful / self.slot_time(forward_cost, backward_cost)


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., 2019, arXiv:1811.06965); keeps every microbatch's activations."""
    ticks, stages = num_microbatches + num_stages - 1, np.arange(num_stages)
    forward = _wave(2 * ticks, stages, num_microbatches)
    backward = _wave(2 * ticks, ticks + stages[::-1], num_microbatches)
    return Schedule("gpipe", forward, backward)


def one_forward_one_backward(num_stages: int, num_microbatches: int) -> Schedule:
    """1F1B (Narayanan et al., 2021, arXiv:2104.04473) in lock-step: the last stage turns each microbatch round at once.

    Stage s keeps 2(P-1-s)+1 microbatches ("eager 1F1B"), whatever their number, and the time is that of 1F1B:
    (M+P-1)(F+B).
    """
    stages = np.arange(num_stages)
    ticks = num_microbatches + 2 * (num_stages - 1)
    forward = _wave(ticks, stages, num_microbatches)
    backward = _wave(ticks, 2 * (num_stages - 1) - stages, num_microbatches)
    return Schedule("1f1b", forward, backward)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def build_schedule(name: str, num_stages: int, num_microbatches: int) -> Schedule:
    """The table called `name` (a key of SCHEDULES).

    Raises:
      ScheduleError: no such schedule, or a size below 1.
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"actor.model.pipeline_schedule: {name!r} is none of: {', '.join(SCHEDULES)}")
    if num_stages < 1 or num_microbatches < 1:
        raise ScheduleError(
            f"a schedule needs at least one stage and one microbatch, not {num_stages} and {num_microbatches}"
        )
    return SCHEDULES[name](num_stages, num_microbatches)


def _wave(num_ticks: int, start: np.ndarray, num_microbatches: int) -> np.ndarray:
    """A table in which stage s does microbatch 0, 1, 2, … from tick start[s] on."""
    microbatch = np.arange(num_ticks)[:, None] - start[None, :]
    return np.where((microbatch >= 0) & (microbatch < num_microbatches), microbatch, IDLE)


def _check(schedule: Schedule) -> None:
    """Each microbatch once in each slot of each stage, each when what it needs has just arrived."""
    forward, backward = schedule.forward, schedule.backward
    if forward.shape != backward.shape or forward.ndim != 2:
        raise ScheduleError(f"{schedule.name}: tables of shapes {forward.shape} and {backward.shape} do not match")
    ticks = {"F": _ticks(schedule, "F", forward), "B": _ticks(schedule, "B", backward)}
    last = schedule.num_stages - 1
    for stage in range(schedule.num_stages):
        needs = [("B", stage, "F", stage, 0)]
        if stage > 0:
            needs.append(("F", stage, "F", stage - 1, 1))
        if stage < last:
            needs.append(("B", stage, "B", stage + 1, 1))
        for slot, s, source, t, delay in needs:
            gaps = ticks[slot][s] - ticks[source][t]
            # Messages are kept for one tick only; what a stage itself produced stays in its buffers.
            bad = np.flatnonzero(gaps != 1 if delay else gaps < 0)
            if bad.size:
                m = int(bad[0])
                raise ScheduleError(
                    f"{schedule.name}: tick {ticks[slot][s][m]}, stage {s}: {slot} of microbatch {m} needs {source} of "
                    f"stage {t}, which is in tick {ticks[source][t][m]}; it must be "
                    f"{'in the tick before' if delay else 'in the same tick or earlier'}"
                )


def _ticks(schedule: Schedule, slot: str, table: np.ndarray) -> np.ndarray:
    """[stages, microbatches]: the tick in which each is done."""
    result = np.full((schedule.num_stages, schedule.num_microbatches), IDLE)
    for stage in range(schedule.num_stages):
        done = table[:, stage]
        microbatches, counts = np.unique(done[done != IDLE], return_counts=True)
        if list(microbatches) != list(range(schedule.num_microbatches)) or (counts != 1).any():
            raise ScheduleError(
                f"{schedule.name}: stage {stage} does {slot} of microbatches {done[done != IDLE].tolist()}, "
                f"not of each of 0 to {schedule.num_microbatches - 1} once"
            )
        result[stage, microbatches] = [int(np.flatnonzero(done == m)[0]) for m in microbatches]
    return result
