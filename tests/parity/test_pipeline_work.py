"""What a pipeline executes and holds, from the compiled program: slots, products, bytes, size of the program."""

import dataclasses
import functools
from unittest import mock

import jax.numpy as jnp
import pytest
from support import PLAIN, Step, make_mesh, slow

from jaxpar.backward import Pullback, Recompute, take_apart
from jaxpar.config import Architecture
from jaxpar.measure.hlo import count
from jaxpar.models import Decoder, FunctionalModel
from jaxpar.parallel.mesh import AXES
from jaxpar.pipeline import layers
from jaxpar.pipeline.tick_scope import taken_fraction

STAGES = 4
DEEP = dataclasses.replace(PLAIN, num_hidden_layers=8)
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb1p", 1), ("zb1p", 2)]


def with_schedules(*microbatches, soon):
    """Each schedule with each number of microbatches, if any are given. Cases that are not in `soon` are slow."""
    names = ("schedule", "chunks", "microbatches") if microbatches else ("schedule", "chunks")
    cases = [(*schedule, *more) for schedule in SCHEDULES for more in ([(m,) for m in microbatches] or [()])]
    return pytest.mark.parametrize(names, [case if case in soon else slow(case)[0] for case in cases])


# Each of these compiles another program with 64 microbatches, and another one with 16 layers.
FEW = [("gpipe", 1), ("1f1b", 1), ("zb1p", 2)]

# Numbers that a layer of PLAIN has for each token: 8 heads and 4 key-value heads of 8, a feed-forward of 96.
EMBED, QKV, ATTENTION, GATE_AND_UP = 64, 64 + 2 * 32, 64 + 8, 2 * 96


@functools.cache
def build(schedule="1f1b", chunks=1, microbatches=8, stages=STAGES, arch=DEEP, recompute=Recompute()):  # noqa: B008
    options = {"schedule": schedule, "num_chunks": chunks, "num_microbatches": microbatches, "recompute": recompute}
    return Step(FunctionalModel(Decoder(arch)), (1, stages, 1, 1, 1), rows=2 * microbatches, **options)


@functools.cache
def counted(*args, **options):
    step = build(*args, **options)
    grid = make_mesh((1, options.get("stages", STAGES), 1, 1, 1)).devices
    return count(step.compiled.as_text(), grid, AXES, taken=taken_fraction)


def temporaries(*args, **options):
    return build(*args, **options).compiled.memory_analysis().temp_size_in_bytes


@with_schedules(3, 8, soon=[("interleaved_1f1b", 2, 3), ("zb1p", 2, 3), *((*schedule, 8) for schedule in SCHEDULES)])
def test_executed_slots(schedule, chunks, microbatches):
    """Each executed F slot sends activations once and each B slot sends gradients once: MV + P - 1 of each."""
    sent = [
        c
        for c in counted(schedule, chunks, microbatches).collectives
        if (c.kind, c.axes) == ("collective-permute", ("pp",))
    ]
    # With fewer microbatches than stages, every chunk but the first waits for the first microbatch to come back from
    # the last stage.
    slots = (chunks - 1) * max(microbatches, STAGES) + microbatches + STAGES - 1
    assert sum(c.count for c in sent) == 2 * slots


@with_schedules(8, 16, soon=[("gpipe", 1, 16), ("1f1b", 1, 16), *((*schedule, 8) for schedule in SCHEDULES)])
def test_executed_products(schedule, chunks, microbatches):
    """At most (MV + P - 1) / MV times the ideal share of a stage, and less where W has slots of its own."""
    whole = counted(stages=1).flops / 8
    share = counted(schedule, chunks, microbatches).flops / microbatches / (whole / STAGES)
    items = microbatches * chunks
    bound = (items + STAGES - 1) / items
    assert 0.97 * bound < share < 1.005 * bound or (schedule == "zb1p" and share < bound)
    if schedule == "zb1p":
        # Weight gradients, a third of the products in a layer, run without a bubble. Attention has no weight gradients.
        assert share < 1 + 0.75 * (bound - 1)


@with_schedules(soon=FEW)
def test_memory_does_not_grow_with_the_number_of_microbatches(schedule, chunks):
    few, many = temporaries(schedule, chunks, 8), temporaries(schedule, chunks, 64)
    if schedule == "gpipe":
        assert many > 3 * few
    else:
        assert many < 1.02 * few


def test_memory_in_flight_is_what_the_table_says():
    """If two programs differ only in the number of microbatches in flight, these make up the difference in bytes."""
    step = build("gpipe", 1, 16)
    per_microbatch = (temporaries("gpipe", 1, 16) - temporaries("gpipe", 1, 8)) / 8
    table = {name: build(name, 1, 16).schedule for name in ("gpipe", "1f1b")}
    places = {name: schedule.buffers.sizes["kept"] for name, schedule in table.items()}
    outputs = {name: schedule.buffers.sizes["outputs"] for name, schedule in table.items()}
    assert places["1f1b"] == max(table["1f1b"].in_flight) == 2 * STAGES - 1
    saved = temporaries("gpipe", 1, 16) - temporaries("1f1b", 1, 16)
    assert saved == pytest.approx((places["gpipe"] - places["1f1b"]) * per_microbatch, rel=0.15), outputs
    assert step.schedule.in_flight == [16] * STAGES


@with_schedules(soon=FEW)
def test_size_of_the_program_does_not_grow(schedule, chunks):
    few, many = (len(build(schedule, chunks, m).compiled.as_text()) for m in (8, 64))
    assert many < 1.1 * few
    deeper = dataclasses.replace(PLAIN, num_hidden_layers=16)
    assert len(build(schedule, chunks, 8, arch=deeper).compiled.as_text()) < 1.1 * few


def test_what_is_kept_of_a_layer():
    """A layer keeps its input, the input of its second norm, and the rms of both norms; q, k, v, the output of
    attention and its log-sum-exp; gate and up. Megatron-LM keeps the same with fused norms, rotary embedding and
    SwiGLU. Sequence parallelism splits the first group too."""
    rows, seq, embed, heads, mlp = 2, 32, 64, 8, 96

    def kept(sizes, recompute=Recompute()):  # noqa: B008
        step = Step(FunctionalModel(Decoder(PLAIN)), sizes, num_microbatches=1, rows=2, recompute=recompute)
        return kept_bytes(step)

    split = rows * seq * (8 * heads + 2 * 8 * heads // 2 + 8 * heads + heads + 2 * mlp) * 4
    whole = rows * seq * (2 * embed + 2) * 4
    assert kept((1, 1, 1, 1, 1)) == whole + split
    assert kept((1, 1, 4, 1, 1)) == whole + split // 4
    assert kept((1, 1, 1, 4, 1)) == whole // 4 + split // 4
    attention = rows * seq * (8 * heads + heads) * 4
    assert kept((1, 1, 1, 1, 1), Recompute("selective")) == whole + split - attention
    assert kept((1, 1, 1, 1, 1), Recompute("full", "uniform", 1)) == rows * seq * embed * 4


ALL_BUT_ATTENTION = ("layernorm", "linear_qkv", "linear_proj", "mlp")


@pytest.mark.parametrize("tensor", [(1, 1), (4, 1), (1, 4)], ids=str)
@pytest.mark.parametrize(
    ("modules", "split", "whole"),
    [
        # Numbers for each token that sequence parallelism splits over the tensor group, and others.
        (("mlp",), QKV + ATTENTION, 2 * EMBED + 2),
        (("linear_qkv",), ATTENTION + GATE_AND_UP, 2 * EMBED + 2),
        (("linear_proj",), QKV + ATTENTION + GATE_AND_UP, EMBED + 2),
        (("layernorm",), QKV + ATTENTION + GATE_AND_UP, 2 * EMBED),
        (("core_attn", "mlp"), QKV, 2 * EMBED + 2),
        (("linear_qkv", "mlp"), ATTENTION, 2 * EMBED + 2),
        (ALL_BUT_ATTENTION, ATTENTION, EMBED),
        (("core_attn", *ALL_BUT_ATTENTION), 0, EMBED),
    ],
    ids=str,
)
def test_what_is_kept_with_recompute_modules(modules, split, whole, tensor):
    recompute = Recompute("selective", modules=modules)
    step = Step(FunctionalModel(Decoder(PLAIN)), (1, 1, *tensor, 1), num_microbatches=1, rows=2, recompute=recompute)
    assert kept_bytes(step) == 2 * 32 * 4 * split // (tensor[0] * tensor[1]) + 2 * 32 * 4 * whole // tensor[1]


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p"])
def test_attention_does_not_run_again_unless_it_is_named(schedule):
    """Products of a step, in those of one microbatch's forward pass through what is named."""

    def flops(*modules):
        recompute = Recompute("selective", modules=modules) if modules else Recompute()
        step = Step(
            FunctionalModel(Decoder(PLAIN)),
            (1, 1, 1, 1, 1),
            num_microbatches=1,
            rows=2,
            recompute=recompute,
            schedule=schedule,
        )
        return count(step.compiled.as_text(), make_mesh((1, 1, 1, 1, 1)).devices, AXES).flops

    token_products = 2 * 64 * PLAIN.num_hidden_layers * 2 * 32 * 2  # each output of a product from 64 numbers
    assert flops("mlp") - flops() == GATE_AND_UP * token_products // 2
    assert flops(*ALL_BUT_ATTENTION) - flops() == (GATE_AND_UP + QKV + EMBED) * token_products // 2


def test_sequence_parallelism_saves_half_of_the_activations():
    """Llama-3-8B with TP 8 and 8,192 tokens in bfloat16: what all layers keep, and the output of the last layer."""
    arch = Architecture("llama", 128256, 128256, 4096, 14336, 32, 32, 8, 128)

    def saved(sizes):
        model = FunctionalModel(Decoder(arch))
        step = Step(model, sizes, num_microbatches=1, rows=1, seq=8192, compute_dtype=jnp.bfloat16)
        return arch.num_hidden_layers * kept_bytes(step) + 8192 * arch.hidden_size * 2 // sizes[3]

    assert saved((1, 1, 1, 8, 1)) <= 0.45 * saved((1, 1, 8, 1, 1))


@pytest.mark.parametrize(
    "recompute",
    [
        Recompute(),
        Recompute("selective"),
        Recompute("selective", modules=ALL_BUT_ATTENTION),
        Recompute("full", "uniform", 1),
    ],
    ids=str,
)
def test_tp_comm_overlap_keeps_nothing_more(recompute):
    """Neither for the backward pass nor, with zb1p, for the gradients of the weights."""

    def held(overlap):
        model = FunctionalModel(Decoder(PLAIN, tp_comm_overlap=overlap))
        step = Step(model, (1, 1, 1, 4, 1), num_microbatches=1, rows=2, recompute=recompute, schedule="zb1p")
        pullback = pullback_of(step)
        return nbytes(pullback.kept), nbytes(pullback.pending)

    assert held(True) == held(False)


def kept_bytes(step) -> int:
    """Bytes that one layer keeps for one microbatch, as the engine allocates them."""
    return nbytes(pullback_of(step).kept)


def pullback_of(step) -> Pullback:
    """The backward pass of the first layers, as the engine takes it apart."""
    found = []

    def watched(*args, **options):
        found.append(take_apart(*args, **options))
        return found[-1]

    with mock.patch.object(layers, "take_apart", watched):
        assert step.jaxpr
    return found[0]


def nbytes(avals) -> int:
    return sum(aval.size * aval.dtype.itemsize for aval in avals)
