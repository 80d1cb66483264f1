"""Schedule tables: their properties for many sizes, run with labels in place of arrays, and what is said of a broken one."""

import functools

import numpy as np
import pytest
from support import random_schedule

from jaxpar.pipeline.schedule import IDLE, SCHEDULES, Schedule, ScheduleError, build_schedule, forward_only

SIZES = [(p, m, v) for p in (1, 2, 3, 4, 7) for m in (1, 2, 3, 5, 8, 12, 13) for v in (1, 2, 3, 4) if v == 1 or p > 1]
NAMES = ["gpipe", "1f1b", "zb1p"]  # the others are 1f1b, which a test says


@functools.cache
def table(name: str, stages: int, microbatches: int, chunks: int) -> Schedule:
    if name == "forward_only":
        return forward_only(stages, microbatches, chunks)
    return build_schedule(name, stages, microbatches, chunks)


for_each_size = pytest.mark.parametrize(("stages", "microbatches", "chunks"), SIZES)
for_each_name = pytest.mark.parametrize("name", NAMES)


def num_turns(stages: int, microbatches: int, chunks: int) -> int:
    """Slots from a stage's first item to its last: fewer microbatches than stages leave gaps between chunks."""
    return microbatches * chunks if microbatches >= stages else microbatches + (chunks - 1) * stages


# --- Running the table


class Places:
    """The engine's buffers on all stages, with labels in place of arrays. Remembers who wrote and read what."""

    def __init__(self, schedule: Schedule):
        self.buffers, self.labels, self.log = schedule.buffers, {}, []

    def put(self, kind: str, tick: int, stage: int, label: tuple | None) -> None:
        place = int(self.buffers.tables[f"{kind}_write"][tick, stage])
        assert 0 <= place < self.buffers.sizes[kind]
        self.labels[kind, stage, place] = label
        self.log.append((kind, stage, label, "write"))

    def take(self, kind: str, slot: str, tick: int, stage: int, label: tuple) -> None:
        place = int(self.buffers.tables[f"{kind}_read_{slot}"][tick, stage])
        found = self.labels.get((kind, stage, place))
        assert found == label, f"tick {tick}, stage {stage}, {slot}: {kind} {place} holds {found}, not {label}"
        self.log.append((kind, stage, label, "read"))

    def most_waiting(self, *, scribbles: bool) -> dict[tuple[str, int], int]:
        """For each kind and stage the most labels that wait to be read at one time, the one just written included. With
        `scribbles` a label that nobody reads counts too, at the moment in which it is written."""
        last_read = {entry[:3]: i for i, entry in enumerate(self.log) if entry[3] == "read"}
        waiting, most = {}, {}
        for i, (kind, stage, label, what) in enumerate(self.log):
            here = waiting.setdefault((kind, stage), set())
            if what == "read":
                here.difference_update({label} if last_read[kind, stage, label] == i else ())
                continue
            read_later = (kind, stage, label) in last_read
            most[kind, stage] = max(most.get((kind, stage), 0), len(here) + (read_later or scribbles))
            here.update({label} if read_later else ())
        return most


def play(schedule: Schedule) -> Places:
    """The engine's rules, tick by tick: which label it computes, sends, puts where and takes from where.

    ("x", m, v) is the input of microbatch m to virtual stage v, ("dx", m, v) the gradient by it.
    """
    stages, chunks = schedule.num_stages, schedule.num_chunks
    last, virtual = stages - 1, stages * chunks
    places, done = Places(schedule), []

    def work(slot, tick):
        """(stage, microbatch, virtual stage, both None where idle) of each stage."""
        for stage, item in enumerate(schedule.slots[slot][tick].tolist()):
            chunk, microbatch = divmod(item, schedule.num_microbatches)
            yield (stage, None, None) if item == IDLE else (stage, microbatch, chunk * stages + stage)
            if item != IDLE:
                done.append((slot, microbatch, chunk * stages + stage))

    def send(kind, tick, labels, step):
        for stage in range(stages if virtual > 1 else 0):
            source = stage - step
            wraps = not 0 <= source < stages
            places.put(kind, tick, stage, None if wraps and chunks == 1 else labels[source % stages])

    def forward(tick):
        outputs = []
        for stage, m, v in work("F", tick):
            if v == 0:
                assert schedule.runs["embed"][tick]
            elif v is not None:
                places.take("from_below", "F", tick, stage, ("x", m, v))
            outputs.append(None if v is None else ("x", m, v + 1))
            if trains:
                places.put("kept", tick, stage, None if v is None else ("kept", m, v))
            if v == virtual - 1 and not trains:
                assert schedule.runs["head"][tick]
        if trains:
            places.put("outputs", tick, last, outputs[last])
        send("from_below", tick, outputs, 1)

    def backward(tick):
        x_grads = []
        for stage, m, v in work("B", tick):
            if v == 0:
                assert schedule.runs["embed_grad"][tick]
            if v == virtual - 1:
                assert schedule.runs["head"][tick]
                places.take("outputs", "B", tick, last, ("x", m, virtual))
            elif v is not None:
                places.take("from_above", "B", tick, stage, ("dx", m, v + 1))
            if v is not None:
                places.take("kept", "B", tick, stage, ("kept", m, v))
            if "W" in schedule.slots:
                places.put("pending", tick, stage, None if v is None else ("pending", m, v))
            x_grads.append(None if v is None else ("dx", m, v))
        send("from_above", tick, x_grads, -1)

    def weight(tick):
        for stage, m, v in work("W", tick):
            if v is not None:
                places.take("kept", "W", tick, stage, ("kept", m, v))
                places.take("pending", "W", tick, stage, ("pending", m, v))

    trains = "B" in schedule.slots
    for segment in schedule.segments:
        for tick in range(schedule.num_ticks)[segment.ticks]:
            for runs, slot in ((segment.forward, forward), (segment.backward, backward), (segment.weight, weight)):
                if runs:
                    slot(tick)
    expected = {(s, m, v) for s in schedule.slots for m in range(schedule.num_microbatches) for v in range(virtual)}
    assert len(done) == len(expected) and set(done) == expected
    return places


def check_played(schedule: Schedule) -> None:
    """What is read is right, and no buffer has a place more than it must: at some moment all others wait to be read."""
    places = play(schedule)
    least = dict.fromkeys(schedule.buffers.sizes, 1)
    for (kind, _), most in places.most_waiting(scribbles=True).items():
        least[kind] = max(least[kind], most)
    assert schedule.buffers.sizes == least
    if "B" in schedule.slots:
        kept = {stage: n for (kind, stage), n in places.most_waiting(scribbles=False).items() if kind == "kept"}
        assert schedule.in_flight == [kept[stage] for stage in range(schedule.num_stages)]


@for_each_size
@pytest.mark.parametrize("name", [*NAMES, "forward_only"])
def test_running_the_table(name, stages, microbatches, chunks):
    check_played(table(name, stages, microbatches, chunks))


@pytest.mark.parametrize("seed", range(60))
def test_running_any_table(seed):
    """Tables that no rule made: messages wait long, and in any order."""
    rng = np.random.default_rng(seed)
    stages, microbatches, chunks = int(rng.integers(2, 5)), int(rng.integers(1, 9)), int(rng.integers(1, 4))
    check_played(random_schedule(stages, microbatches, chunks, split_weight=bool(seed % 2), seed=seed))


def test_random_tables_are_harder_than_ours():
    sizes = [random_schedule(3, 8, 2, split_weight=True, seed=seed).buffers.sizes for seed in range(5)]
    for kind in ("from_below", "from_above", "outputs", "pending"):
        assert max(size[kind] for size in sizes) > 2


# --- Time and memory


@for_each_size
@for_each_name
def test_slot_time(name, stages, microbatches, chunks):
    """Counted in executed slots. (M+P-1)(F+B+W) with one chunk; the part of P-1 is divided by the number of chunks."""
    turns, costs = num_turns(stages, microbatches, chunks), (3.0, 5.0, 7.0)
    weight = turns if name == "zb1p" else turns + stages - 1
    expected = ((turns + stages - 1) * (3 + 5) + weight * 7) / chunks
    schedule = table(name, stages, microbatches, chunks)
    assert schedule.slot_time(*costs) == pytest.approx(expected)
    assert schedule.bubble_fraction(*costs) == pytest.approx(1 - microbatches * 15 / expected)
    executed = {slot: sum(slot == s for _, s in schedule.timeline) for slot in schedule.slots}
    assert sum(schedule.slot_costs(*costs)[slot] * n for slot, n in executed.items()) == pytest.approx(expected)


@for_each_size
def test_bubbles_of_the_papers(stages, microbatches, chunks):
    """Where F = B = W: zero bubble is at 2/3 of 1F1B's, and with two chunks at ZB-H1's (P-1)(F+B-W)."""
    if microbatches < stages:
        return

    def bubble(name):
        return table(name, stages, microbatches, chunks).slot_time() - 3 * microbatches

    assert bubble("1f1b") == pytest.approx(3 * (stages - 1) / chunks)
    assert bubble("zb1p") == pytest.approx(2 / 3 * bubble("1f1b"))
    if chunks >= 2:
        assert bubble("zb1p") <= stages - 1 + 1e-9


@for_each_size
def test_in_flight(stages, microbatches, chunks):
    items = microbatches * chunks
    assert table("gpipe", stages, microbatches, chunks).in_flight == [items] * stages
    if chunks > 1 and microbatches % stages:
        return
    every = range(stages)
    expected = [min(items, (chunks + 1) * stages - 2 * s - 1) for s in every]
    assert table("1f1b", stages, microbatches, chunks).in_flight == expected
    expected = [min(items, (chunks + 1) * stages - s - 1) for s in every]
    assert table("zb1p", stages, microbatches, chunks).in_flight == expected


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("name", [*NAMES, "forward_only"])
def test_program_and_memory_do_not_grow_with_microbatches(name, stages, chunks):
    if stages == 1 and chunks > 1:
        return
    for more in (0, stages // 2):
        few, many = (table(name, stages, groups * stages + more, chunks) for groups in (6, 30))
        assert len(few.segments) == len(many.segments) <= 5
        if name != "gpipe" and (more == 0 or chunks == 1):
            assert few.buffers.sizes == many.buffers.sizes


def test_names():
    for name in ("eager_1f1b", "interleaved_1f1b"):
        schedule = build_schedule(name, 4, 8, 2)
        assert schedule.name == name
        assert all((schedule.slots[slot] == t).all() for slot, t in table("1f1b", 4, 8, 2).slots.items())


@for_each_size
def test_forward_only(stages, microbatches, chunks):
    schedule = table("forward_only", stages, microbatches, chunks)
    assert list(schedule.slots) == ["F"] and list(schedule.buffers.sizes) == ["from_below"]
    losses_of = schedule.forward[schedule.runs["head"], -1] - (chunks - 1) * microbatches
    assert sorted(losses_of) == list(range(microbatches))
    assert schedule.slot_time(2, 100, 100) == pytest.approx(
        2 * (num_turns(stages, microbatches, chunks) + stages - 1) / chunks
    )


# --- What is said of a broken table


def broken(change, name="1f1b", stages=3, microbatches=4, chunks=1) -> str:
    """The message for a good table after `change(forward, backward, weight)`."""
    good = table(name, stages, microbatches, chunks)
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
    assert broken(lambda f, b: (f, b[:-1])) == "mine: tables F and B of shapes (8, 3) and (7, 3) do not match"
    assert broken(lambda f, b: (f, b * 1.0)) == "mine: table B is of float64, not of integers"
    assert broken(lambda f, b: (f[:0], b[:0])) == (
        "mine: needs at least one tick, stage, microbatch and chunk: a table of shape (0, 3) for 4 microbatches in 1 chunks"
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
        (("1f2b", 2, 2), f"'1f2b' is none of: {', '.join(SCHEDULES)}"),
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
