"""Schedule tables: their properties for many sizes, and what is said of a broken one."""

import numpy as np
import pytest

from jaxpar.pipeline.schedule import IDLE, SCHEDULES, Schedule, ScheduleError, build_schedule

SIZES = [(p, m) for p in (1, 2, 3, 4, 7, 8, 16) for m in (1, 2, 3, 5, 8, 16, 33)]


@pytest.fixture(params=SCHEDULES)
def name(request):
    return request.param


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_each_microbatch_once_in_each_slot_of_each_stage(name, stages, microbatches):
    schedule = build_schedule(name, stages, microbatches)
    assert (schedule.num_stages, schedule.num_microbatches) == (stages, microbatches)
    for table in (schedule.forward, schedule.backward):
        for stage in range(stages):
            assert sorted(m for m in table[:, stage] if m != IDLE) == list(range(microbatches))


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_bubble(name, stages, microbatches):
    schedule = build_schedule(name, stages, microbatches)
    assert schedule.bubble_fraction() == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert schedule.slot_time(3, 5) == pytest.approx((microbatches + stages - 1) * (3 + 5))


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_microbatches_in_flight(stages, microbatches):
    one = build_schedule("1f1b", stages, microbatches)
    assert one.in_flight == [min(microbatches, 2 * (stages - 1 - s) + 1) for s in range(stages)]
    assert (
        one.num_buffers == min(microbatches + (stages > 1), 2 * (stages - 1) + 1) or one.num_buffers == one.in_flight[0]
    )
    assert build_schedule("gpipe", stages, microbatches).in_flight == [microbatches] * stages


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_running_the_table(name, stages, microbatches):
    """The engine's rules, played with labels: what arrives, what is kept, and what comes out must be the right ones."""
    schedule = build_schedule(name, stages, microbatches)
    writes, reads = schedule.buffers
    from_below, from_above = [None] * stages, [None] * stages
    buffers = [[None] * schedule.num_buffers for _ in range(stages)]
    outputs = [None] * schedule.num_output_buffers
    in_use: list[dict[int, int]] = [{} for _ in range(stages)]  # buffer → microbatch that waits in it for its backward
    done = []
    for segment in schedule.segments:
        for tick in range(schedule.num_ticks)[segment.ticks]:
            if segment.forward:
                sent = [None] * stages
                for stage, m in enumerate(schedule.forward[tick]):
                    arrived = ("x", m, 0) if stage == 0 else from_below[stage]
                    assert m == IDLE or arrived == ("x", m, stage), f"tick {tick} stage {stage}"
                    buffer = writes[tick, stage]
                    assert buffer not in in_use[stage], f"tick {tick} stage {stage}: overwrites {in_use[stage][buffer]}"
                    if m != IDLE:
                        in_use[stage][buffer] = m
                    sent[stage] = ("x", m, stage + 1) if m != IDLE else "rubbish"
                    buffers[stage][buffer] = ("kept", m, stage)
                outputs[writes[tick, -1]] = sent[-1]
                from_below = [None, *sent[:-1]]
            else:
                assert (schedule.forward[tick] == IDLE).all()
            if segment.head:
                m = schedule.backward[tick, -1]
                assert outputs[reads[tick, -1]] == ("x", m, stages), f"tick {tick}: the head has another microbatch"
            else:
                assert schedule.backward[tick, -1] == IDLE
            if segment.backward:
                sent = [None] * stages
                for stage, m in enumerate(schedule.backward[tick]):
                    if m == IDLE:
                        continue
                    assert stage == stages - 1 or from_above[stage] == ("dy", m, stage), f"tick {tick} stage {stage}"
                    buffer = reads[tick, stage]
                    assert buffers[stage][buffer] == ("kept", m, stage), f"tick {tick} stage {stage}"
                    assert in_use[stage].pop(buffer) == m
                    sent[stage] = ("dy", m, stage - 1)
                    done.append((m, stage))
                from_above = [*sent[1:], None]
            else:
                assert (schedule.backward[tick] == IDLE).all()
    assert len(done) == stages * microbatches == len(set(done))
    assert not any(in_use)


def test_special_cases_of_the_engine():
    assert build_schedule("1f1b", 1, 8).keeps_nothing and not build_schedule("1f1b", 2, 8).keeps_nothing
    assert build_schedule("1f1b", 4, 8).turns_at_once and not build_schedule("gpipe", 4, 8).turns_at_once
    flags = [(s.forward, s.backward, s.head) for s in build_schedule("1f1b", 4, 16).segments]
    assert flags[0] == (True, False, False) and flags[-1] == (False, True, False) and (True, True, True) in flags
    # A handful of loop bodies, however many microbatches.
    assert len(build_schedule("1f1b", 4, 16).segments) == len(build_schedule("1f1b", 4, 160).segments) <= 5
    assert len(build_schedule("gpipe", 4, 16).segments) == 3


def broken(change, stages=3, microbatches=4):
    """The message for a 1F1B table after `change(forward, backward)`."""
    good = build_schedule("1f1b", stages, microbatches)
    forward, backward = good.forward.copy(), good.backward.copy()
    result = change(forward, backward) or (forward, backward)
    with pytest.raises(ScheduleError) as caught:
        Schedule("mine", *result)
    return str(caught.value)


def test_tables_of_different_shapes():
    assert "mine: tables of shapes (8, 3) and (7, 3) do not match" in broken(lambda f, b: (f, b[:-1]))


def test_a_microbatch_twice_or_never():
    def twice(forward, backward):
        forward[2, 1] = 0

    message = broken(twice)
    assert "stage 1 does F of microbatches [0, 0, 2, 3], not of each of 0 to 3 once" in message

    def never(forward, backward):
        backward[backward[:, 2] == 3, 2] = IDLE

    assert "stage 2 does B of microbatches [0, 1, 2], not of each of 0 to 3 once" in broken(never)


def test_a_microbatch_before_it_has_arrived():
    def swap(forward, backward):
        forward[[1, 2], 1] = forward[[2, 1], 1]

    message = broken(swap)
    assert "mine: tick 2, stage 1: F of microbatch 0 needs F of stage 0, which is in tick 0" in message
    assert "in the tick before" in message


def test_a_gradient_before_it_has_arrived():
    def swap(forward, backward):
        row = np.flatnonzero(backward[:, 0] == 0)[0]
        backward[[row, row + 1], 0] = backward[[row + 1, row], 0]

    assert "stage 0: B of microbatch 0 needs B of stage 1, which is in tick 3" in broken(swap)


def test_backward_before_forward():
    forward, backward = np.array([[IDLE], [0]]), np.array([[0], [IDLE]])
    with pytest.raises(
        ScheduleError, match="tick 0, stage 0: B of microbatch 0 needs F of stage 0, which is in tick 1"
    ):
        Schedule("mine", forward, backward)


def test_unknown_name():
    with pytest.raises(ScheduleError) as caught:
        build_schedule("1f2b", 2, 2)
    assert "1f2b" in str(caught.value) and all(name in str(caught.value) for name in SCHEDULES)
