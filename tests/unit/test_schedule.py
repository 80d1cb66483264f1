"""Schedule tables: their properties for many sizes. They are executed with labels in place of arrays."""

import functools

import numpy as np
import pytest
from support import random_schedule

from jaxpar.pipeline.schedule import IDLE, Schedule, build_schedule, forward_only

SIZES = [(p, m, v) for p in (1, 2, 3, 4, 7) for m in (1, 2, 3, 5, 8, 12, 13) for v in (1, 2, 3, 4) if v == 1 or p > 1]
NAMES = ["gpipe", "1f1b", "zb1p"]  # the other names mean 1f1b: see test_names


@functools.cache
def table(name: str, stages: int, microbatches: int, chunks: int) -> Schedule:
    if name == "forward_only":
        return forward_only(stages, microbatches, chunks)
    return build_schedule(name, stages, microbatches, chunks)


for_each_size = pytest.mark.parametrize(("stages", "microbatches", "chunks"), SIZES)
for_each_name = pytest.mark.parametrize("name", NAMES)


def num_turns(stages: int, microbatches: int, chunks: int) -> int:
    """Slots from a stage's first item to its last. Fewer microbatches than stages leave gaps between chunks."""
    return microbatches * chunks if microbatches >= stages else microbatches + (chunks - 1) * stages


# --- Executing the table


class Places:
    """The engine's buffers on all stages, with labels in place of arrays. Logs every write and read."""

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
        """For each kind and stage, the largest number of labels that wait to be read at one time, including the one
        just written. With `scribbles`, a label that is never read counts too, at the moment when it is written."""
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
    """Follows the engine's rules, tick by tick: which label is computed, sent, written and read, and where.

    ("x", m, v) is the input of virtual stage v for microbatch m, and ("dx", m, v) is its gradient.
    """
    stages, chunks = schedule.num_stages, schedule.num_chunks
    last, virtual = stages - 1, stages * chunks
    places, done = Places(schedule), []

    def work(slot, tick):
        """Yields (stage, microbatch, virtual stage) for each stage, the last two None where it is idle."""
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
    """Every read gets the right label, and each buffer is as small as possible: at some moment all of it is in use."""
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
    """Random tables, in which messages wait long and in any order."""
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
    """Counted in executed slots: (M+P-1)(F+B+W) with one chunk. More chunks divide the P-1 part by their number."""
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
    """If F = B = W, zero bubble has 2/3 of the bubble of 1F1B, and from two chunks on at most ZB-H1's (P-1)(F+B-W)."""
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
