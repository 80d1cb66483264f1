"""Schedule tables from outside jaxpar run in the engine: a user's, from the README, and random ones."""

import math

import pytest
from support import PLAIN, Step, check_step, collectives, decoder_case, random_schedule, readme_example

from jaxpar.models import Decoder, FunctionalModel
from jaxpar.pipeline.schedule import SCHEDULES, ScheduleError, build_schedule


@pytest.fixture
def depth_limited(monkeypatch):
    """The README's schedule, registered for one test."""
    monkeypatch.setitem(SCHEDULES, "depth_limited", None)
    exec(readme_example("SCHEDULES["), {})
    return SCHEDULES["depth_limited"]


def test_the_readmes_schedule_is_short_and_limits_depth(depth_limited):
    lines = readme_example("SCHEDULES[").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def "))
    assert 10 <= sum(bool(line) for line in lines[start:-1]) <= 20
    for stages in (1, 2, 4, 7):
        for microbatches in (1, 3, 4, 9, 20):
            schedule = build_schedule("depth_limited", stages, microbatches)
            assert max(schedule.in_flight) == min(4, microbatches, 2 * stages - 1)
            assert depth_limited(stages, microbatches, depth=1).in_flight == [1] * stages
    with pytest.raises(ScheduleError, match="depth_limited: has no chunks"):
        build_schedule("depth_limited", 2, 4, 2)


def test_the_readmes_schedule_has_the_gradients_of_one_device(depth_limited):
    check_step(decoder_case(PLAIN), (1, 4, 1, 1, 1), schedule="depth_limited")


@pytest.mark.slow
@pytest.mark.parametrize("split_weight", [False, True])
def test_any_table_has_the_gradients_of_one_device(monkeypatch, split_weight):
    """Messages wait in any order, W waits any time, and there is a ring over cp inside."""
    schedule = random_schedule(2, 6, 2, split_weight=split_weight, seed=1)
    assert schedule.buffers.sizes["from_below"] > 1 and schedule.buffers.sizes["outputs"] > 1
    monkeypatch.setitem(SCHEDULES, "random", lambda *sizes: schedule)
    check_step(decoder_case(PLAIN), (1, 2, 1, 1, 2), schedule="random", num_chunks=2)


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb1p", 2)])
def test_the_program_executes_the_slots_of_the_table(schedule, chunks):
    """Counted in the program: each executed F and each executed B sends one message, and the loops run over the ticks.
    With six microbatches, two stages and V chunks, that is 6 V + 2 - 1 of each."""
    step = Step(FunctionalModel(Decoder(PLAIN)), (1, 2, 1, 1, 1), schedule=schedule, num_chunks=chunks)
    table, found = step.schedule, collectives(step.jaxpr, step.mesh.shape)
    sent = [math.prod(c.loops) for c in found if c.kind == "permute" and c.axes == {"pp"}]
    assert sum(sent) == 2 * (6 * chunks + 1) == sum(slot in "FB" for _, slot in table.timeline)
    ticks = {c.body: c.loops for c in found if c.kind == "permute"}
    assert sum(ticks[body][0] for body in ticks) == table.num_ticks
