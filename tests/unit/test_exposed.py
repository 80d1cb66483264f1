"""Which transfers hide behind work, in programs whose answer is known. Times are microseconds on an H100."""

import random
from fractions import Fraction

import pytest

from jaxpar.hardware import GPUS
from jaxpar.measure.exposed import LINKS, Transfers
from jaxpar.measure.hlo.groups import MeshAxes
from jaxpar.measure.roofline import roofline

H100 = GPUS["h100"]
BANDWIDTH = {"nvlink": H100.nvlink_bandwidth, "network": H100.network_bandwidth}
PAIR = {"nvlink": "{0,1}", "network": "{0,8}"}
PERMUTE = "collective-permute"


def instructions(*steps: str) -> str:
    """HLO of steps: "work 4", "start a nvlink 10" and "done a", "sync a nvlink 10", "wrapped a nvlink 10" (an
    `async-start`), "loop 7 NAME" and "branch NAME". Every transfer is a permute between two devices."""
    lines = ["%p = pred[] parameter(0)", "%t = (s32[]) parameter(1)"]
    starts: dict[str, str] = {}
    for number, step in enumerate(steps):
        what, *words = step.split()
        if what == "work":
            size = round(float(words[0]) * 1e-6 * H100.memory_bandwidth)
            lines.append(f'%w{number} = u8[{size}]{{0}} custom-call(), custom_call_target="work"')
        elif what == "loop":
            trips = f'backend_config={{"known_trip_count":{{"n":"{words[0]}"}}}}'
            lines.append(f"%l{number} = (s32[]) while(%t), condition=%condition, body=%{words[1]}, {trips}")
        elif what == "branch":
            lines.append(f"%c{number} = s32[] conditional(%p, %t, %t), branch_computations={{%nothing, %{words[0]}}}")
        elif what == "done":
            lines.append(f"%{words[0]}.done = u8[8]{{0}} {starts[words[0]]}-done(%{words[0]})")
        else:
            name, link, time = words
            array = f"u8[{round(float(time) * 1e-6 * BANDWIDTH[link])}]{{0}}"
            opcode = {"start": f"{PERMUTE}-start", "sync": PERMUTE, "wrapped": "async-start"}[what]
            starts[name] = opcode.removesuffix("-start")
            pairs = f"channel_id=1, source_target_pairs={{{PAIR[link]}}}"
            lines.append(f"%{name}.x = {array} parameter(2)")
            lines.append(f"%{name} = {array} {opcode}(%{name}.x), {'calls=%inside' if what == 'wrapped' else pairs}")
    return "\n".join(f"  {line}" for line in lines)


def read(*steps: str, computations: dict[str, tuple[str, ...]] | None = None, **options):
    """The roofline of a program on two nodes of 8; its links and exposed seconds in microseconds."""
    array = f"u8[{round(10e-6 * H100.nvlink_bandwidth)}]{{0}}"
    inside = (
        f"  %x = {array} parameter(0)\n  ROOT %y = {array} {PERMUTE}(%x), source_target_pairs={{{{0,1}}}}, channel_id=1"
    )
    texts = {
        "inside": inside,
        "condition": "  ROOT %no = pred[] constant(false)",
        "nothing": "  ROOT %z = s32[] constant(0)",
    }
    texts |= {name: instructions(*body) for name, body in (computations or {}).items()}
    parts = [f"%{name} (x: f32[]) -> f32[] {{\n{text}\n}}" for name, text in texts.items()]
    parts.append(f"ENTRY %main (x: f32[]) -> f32[] {{\n{instructions(*steps)}\n}}")
    head = "HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=16\n\n"
    found = roofline(head + "\n\n".join(parts) + "\n", H100, range(16), 8, **options)
    assert found.seconds == pytest.approx(found.chip_seconds + sum(found.exposed.values()))
    assert all(found.links[link] <= found.seconds * (1 + 1e-9) for link in LINKS)
    return found


def microseconds(seconds: dict[str, float]) -> tuple[float, float]:
    return tuple(pytest.approx(seconds[link] * 1e6, rel=1e-5, abs=1e-5) for link in LINKS)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("steps", "nvlink"),
    [
        (["start a nvlink 10", "work 30", "done a"], 0),
        (["start a nvlink 10", "work 10", "done a"], 0),
        (["start a nvlink 10", "work 3", "work 1", "done a"], 6),
        (["start a nvlink 10", "done a"], 10),
        (["work 30", "start a nvlink 10", "work 4", "done a", "work 30"], 6),
        (["work 30", "sync a nvlink 10", "work 30"], 10),
        (["wrapped a nvlink 10", "work 4", "done a"], 6),
        (["wrapped a nvlink 10", "work 30", "done a"], 0),
    ],
)
def test_work_between_start_and_done_hides_a_transfer(steps, nvlink):
    found = read(*steps)
    assert microseconds(found.exposed) == (nvlink, 0)
    assert microseconds(found.links) == (10, 0)


@pytest.mark.parametrize(
    ("steps", "nvlink", "network"),
    [
        # On one link they share the work …
        (["start a nvlink 10", "start b nvlink 10", "work 12", "done a", "done b"], 8, 0),
        (["start a nvlink 10", "work 6", "start b nvlink 10", "work 6", "done a", "work 1", "done b"], 7, 0),
        # … and that which is needed first goes first, or b would wait here for nothing.
        (["start a nvlink 10", "start b nvlink 1", "work 1", "done b", "work 10", "done a"], 0, 0),
        # Two links do not share.
        (["start a nvlink 10", "start b network 10", "work 12", "done a", "done b"], 0, 0),
        # While the chip waits for one transfer, another link goes on; the same link does not.
        (["start a network 10", "sync b nvlink 4", "done a"], 4, 6),
        (["start a nvlink 10", "sync b nvlink 4", "work 7", "done a"], 7, 0),
    ],
)
def test_transfers_in_flight_together(steps, nvlink, network):
    assert microseconds(read(*steps).exposed) == (nvlink, network)


@pytest.mark.parametrize(
    ("steps", "body", "nvlink"),
    [
        (["loop 7 body"], ("start a nvlink 10", "work 4", "done a"), 7 * 6),
        (["loop 7 body"], ("start a nvlink 10", "work 40", "done a"), 0),
        (["loop 7 body"], ("work 40", "sync a nvlink 10"), 7 * 10),
        # A loop hides a transfer that flies past it, in the time in which its own transfers leave the link idle.
        (["start b nvlink 10", "loop 3 body", "done b"], ("work 4",), 0),
        (["start b nvlink 10", "loop 3 body", "done b"], ("start a nvlink 3", "work 4", "done a"), 7),
        (["start b nvlink 10", "loop 3 body", "done b"], ("work 4", "sync a nvlink 3"), 3 * 3),
        (["start b nvlink 20", "loop 3 body", "done b"], ("work 4", "sync a nvlink 3"), 3 * 3 + 8),
    ],
)
def test_a_loop_multiplies_and_hides(steps, body, nvlink):
    assert microseconds(read(*steps, computations={"body": body}).exposed) == (nvlink, 0)


@pytest.mark.parametrize(("fraction", "times"), [(None, 1), (Fraction(1, 4), 0.25)])
def test_a_conditional_waits_as_often_as_it_is_taken(fraction, times):
    costly = {"costly": ("work 4", "start a nvlink 10", "work 4", "done a")}
    found = read("branch costly", computations=costly, taken=lambda name: fraction)
    assert microseconds(found.exposed) == (times * 6, 0)
    assert found.seconds == pytest.approx(times * 14e-6, rel=1e-5)


def test_transfers_have_their_kind_and_axes():
    steps = ["start a nvlink 10", "work 4", "done a", "sync b nvlink 1", "sync c network 5"]
    mesh = MeshAxes((2, 8), ("dp", "tp"))
    assert read(*steps, mesh=mesh).transfers == [
        Transfers(PERMUTE, ("tp",), "nvlink", pytest.approx(11e-6, rel=1e-5), pytest.approx(7e-6, rel=1e-5)),
        Transfers(PERMUTE, ("dp",), "network", pytest.approx(5e-6, rel=1e-5), pytest.approx(5e-6, rel=1e-5)),
    ]
    assert {found.axes for found in read(*steps).transfers} == {()}


def in_ticks(steps: list[str]) -> tuple[int, int, int]:
    """What `read` finds, played a microsecond at a time: the seconds in all, and of them those that a link is waited for."""
    left: dict[str, int] = {}
    link_of: dict[str, str] = {}
    waited, now = dict.fromkeys(LINKS, 0), 0
    needed = {step.split()[1]: i for i, step in enumerate(steps) if not step.startswith(("work", "start"))}

    def tick() -> None:
        nonlocal now
        now += 1
        for link in LINKS:
            flying = [name for name in left if link_of[name] == link and left[name]]
            if flying:
                left[min(flying, key=lambda name: needed[name])] -= 1

    for step in steps:
        what, *words = step.split()
        if what == "work":
            for _ in range(int(words[0])):
                tick()
            continue
        name = words[0]
        if what in ("start", "sync"):
            link_of[name], left[name] = words[1], int(words[2])
        if what in ("done", "sync"):
            while left[name]:
                waited[link_of[name]] += 1
                tick()
    return now, waited["nvlink"], waited["network"]


@pytest.mark.parametrize("seed", range(30))
def test_the_same_as_a_link_at_work_microsecond_by_microsecond(seed):
    rng = random.Random(seed)
    steps, flying = [], []
    for number in range(30):
        what = rng.choice(["work", "work", "start", "start", "done", "sync"])
        if what == "work":
            steps.append(f"work {rng.randrange(1, 9)}")
        elif what == "done" and flying:
            steps.append(f"done {flying.pop(rng.randrange(len(flying)))}")
        elif what != "done":
            steps.append(f"{what} t{number} {rng.choice(LINKS)} {rng.randrange(1, 15)}")
            flying += [f"t{number}"] * (what == "start")
    steps += [f"done {name}" for name in flying]
    found = read(*steps)
    now, *waited = in_ticks(steps)
    assert microseconds(found.exposed) == tuple(waited)
    assert now == pytest.approx(found.seconds * 1e6, rel=1e-5)
