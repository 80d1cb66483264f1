"""The errors for tables that cannot be executed, and where in the table they point."""

import numpy as np
import pytest

from jaxpar.pipeline.schedule import IDLE, SCHEDULES, Schedule, ScheduleError, build_schedule


def broken(change, name="1f1b", stages=3, microbatches=4, chunks=1) -> str:
    """The error message for a valid table after `change(forward, backward, weight)`."""
    good = build_schedule(name, stages, microbatches, chunks)
    tables = [t.copy() for t in (good.forward, good.backward, good.weight) if t is not None]
    with pytest.raises(ScheduleError) as caught:
        Schedule("mine", chunks, microbatches, *(change(*tables) or tables))
    return str(caught.value)


def test_an_item_twice():
    def change(forward, backward):
        forward[2, 1] = 0

    assert broken(change) == (
        "mine: tick 2, stage 1: F of microbatch 0 for the second time, after tick 1\n"
        "  tick     0      1      2      3      4      5      6\n"
        "  stage 0  F0 .   F1 .   F2 .   F3 .   . B0   . B1   . B2\n"
        "  stage 1  . .    F0 .   F0! .  F2 B0  F3 B1  . B2   . B3\n"
        "  stage 2  . .    . .    F0 B0  F1 B1  F2 B2  F3 B3  . ."
    )


def test_an_item_never():
    def change(forward, backward, weight):
        weight[weight[:, 2] == 7, 2] = IDLE

    message = broken(change, "zb1p", chunks=2)
    assert message.startswith("mine: stage 2 never does W of microbatch 3 in chunk 1\n  tick ")
    assert "W3b" in message


def test_an_item_that_is_none():
    message = broken(lambda f, b: (np.where(f == 3, 4, f), b))
    assert message.startswith("mine: tick 3, stage 0: F of item 4, but items are 0 to 3 (chunk x 4 + microbatch)\n")
    assert "F[4]!" in message


def test_a_microbatch_before_it_has_arrived():
    def change(forward, backward):
        forward[[1, 2], 1] = forward[[2, 1], 1]

    message = broken(change)
    assert message.startswith(
        "mine: tick 1, stage 1: F of microbatch 1 needs F of stage 0, which is in tick 1; it must be in an earlier tick\n"
    )
    assert "  stage 1  . .    F1! .  F0 .   F2 B0  F3 B1  . B2" in message


def test_a_chunk_before_the_one_below():
    forward = np.array([[0, IDLE], [1, 0], [IDLE, 1]])
    with pytest.raises(ScheduleError) as caught:
        Schedule("mine", 2, 1, forward, np.full_like(forward, IDLE))
    message = str(caught.value)
    assert "stage 0: F of microbatch 0 in chunk 1 needs F of stage 1 in chunk 0, which is in tick 1" in message
    assert "F0b!" in message


def test_a_gradient_before_it_has_arrived():
    def change(forward, backward):
        rows = [np.flatnonzero(backward[:, 0] == item)[0] for item in (0, 1)]
        backward[rows, 0] = backward[rows[::-1], 0]

    assert "tick 4, stage 0: B of microbatch 1 needs B of stage 1, which is in tick 4" in broken(change)


def test_backward_before_forward():
    forward, backward = np.array([[IDLE], [0]]), np.array([[0], [IDLE]])
    with pytest.raises(ScheduleError) as caught:
        Schedule("mine", 1, 1, forward, backward)
    assert str(caught.value).startswith(
        "mine: tick 0, stage 0: B of microbatch 0 needs F of stage 0, which is in tick 1; it must be in the same tick or "
        "earlier\n"
    )


def test_weights_before_backward_or_never():
    def early(forward, backward, weight):
        weight[[3, 4]] = weight[[4, 3]]

    assert "stage 0: W of microbatch 0 needs B of stage 0, which is in tick 4; it must be in the same tick" in broken(
        early, "zb1p"
    )
    assert "mine: stage 0 never does W of microbatch 0\n" in broken(
        lambda f, b, w: (f, b, np.full_like(w, IDLE)), "zb1p"
    )
    assert "mine: stage 0 never does B of microbatch 0\n" in broken(
        lambda f, b, w: (f, np.full_like(b, IDLE), w), "zb1p"
    )


def test_tables_that_are_none():
    assert broken(lambda f, b: (f, b[:-1])) == "mine: tables F and B have different shapes, (8, 3) and (7, 3)"
    assert broken(lambda f, b: (f, b * 1.0)) == "mine: table B holds float64, not integers"
    assert broken(lambda f, b: (f[:0], b[:0])) == (
        "mine: a table needs at least one tick, stage, microbatch and chunk, but this one has the shape (0, 3) for 4 microbatches in 1 chunks"
    )


def test_only_the_neighbourhood_of_a_large_table_is_drawn():
    def change(forward, backward):
        forward[60, 20] = forward[59, 20]

    lines = broken(change, stages=32, microbatches=64).splitlines()
    assert (
        len(lines) == 2 + 5
        and lines[4].startswith("  stage 20")
        and lines[1].split()[1:] == list(map(str, range(56, 65)))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f2b", 2, 2), f"'1f2b' is not a schedule: choose one of {', '.join(SCHEDULES)}"),
        (("1f1b", 0, 2), "at least one stage, microbatch and chunk, not 0, 2 and 1"),
        (("1f1b", 2, 0), "not 2, 0 and 1"),
        (("1f1b", 2, 2, 0), "not 2, 2 and 0"),
        (("1f1b", 1, 2, 3), "3 chunks need at least two stages"),
    ],
)
def test_sizes_that_make_no_table(arguments, message):
    with pytest.raises(ScheduleError) as caught:
        build_schedule(*arguments)
    assert message in str(caught.value)
