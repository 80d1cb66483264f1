"""Which collectives a step has, how often, and what grows with the number of microbatches and layers."""

import collections
import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import user_models
from support import DECODER, FEW_KV_HEADS, PLAIN, REDUCTIONS, SEQ, Step, array_shapes, mesh_id, product_of, slow
from support import collectives as collectives_of

from jaxpar.attention import blockwise
from jaxpar.backward.recompute import Recompute
from jaxpar.models import Decoder, FunctionalModel

ROWS = 2  # sequences per microbatch and dp rank


@functools.cache
def build(model, sizes, num_microbatches=6, **options) -> Step:
    """The step of a model, given as an Architecture or as the class of a user model."""
    model = FunctionalModel(Decoder(model) if dataclasses.is_dataclass(model) else model())
    rows = ROWS * num_microbatches * sizes[0]
    return Step(model, sizes, num_microbatches=num_microbatches, rows=rows, **options)


def collectives(*args, **options):
    step = build(*args, **options)
    return collectives_of(step.jaxpr, step.mesh.shape)


# --- the tensor group -------------------------------------------------------------------------------------------------


def in_layers(found, axis, layers):
    """For each loop over layers, forward before backward: how often each kind of collective runs over the tensor group,
    on arrays of the size of the activations."""
    by_body = collections.defaultdict(collections.Counter)
    smallest = ROWS * SEQ * 64 // 4  # activations that sp and cp split
    for c in found:
        if axis in c.axes and len(c.loops) > 1 and c.loops[1] == layers and c.size >= smallest:
            by_body[c.body][c.kind] += 1
    return list(by_body.values())


@pytest.mark.parametrize("arch", [PLAIN, DECODER], ids=["plain", "biases and norms"])
@pytest.mark.parametrize("sizes", [(1, 1, 2, 1, 1), (2, 1, 2, 1, 2), (1, 1, 4, 1, 1)], ids=mesh_id)
def test_two_all_reduces_a_layer_forward_and_two_backward(arch, sizes):
    assert in_layers(collectives(arch, sizes), "tp", layers=4) == [{"all-reduce": 2}] * 2


@pytest.mark.parametrize("arch", [PLAIN, DECODER], ids=["plain", "biases and norms"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2, 1), (2, 1, 1, 2, 2), (1, 1, 1, 4, 1)], ids=mesh_id)
def test_with_sequence_parallelism_their_twins(arch, sizes):
    """The weight gradients of the products need the gathered sequences. They are not kept but gathered again in the
    backward pass, as in Megatron-LM (Korthikanti et al., 2022, section 4.2.2)."""
    forward, backward = in_layers(collectives(arch, sizes), "sp", layers=4)
    assert forward == {"all-gather": 2, "reduce-scatter": 2}
    assert backward == {"all-gather": 2 + 2, "reduce-scatter": 2}


@pytest.mark.parametrize("sizes", [(1, 1, 1, 2, 1), (2, 1, 1, 4, 1)], ids=mesh_id)
def test_tp_comm_overlap_cuts_them_into_pieces(sizes):
    """In the forward pass. The backward pass has the same as without, none of them in pieces."""
    model = FunctionalModel(Decoder(PLAIN, tp_comm_overlap=True))
    step, by_body = Step(model, sizes, rows=ROWS * 6 * sizes[0]), collections.defaultdict(collections.Counter)
    for c in collectives_of(step.jaxpr, step.mesh.shape):
        if c.axes == {"sp"} and len(c.loops) > 1 and c.loops[1] == 4:
            by_body[c.body][c.kind, c.shape[1:]] += 1
    forward, backward = by_body.values()
    sent = SEQ // sizes[3]
    assert forward == {("all-gather", (sent // 4, 64)): 2 * 4, ("reduce-scatter", (SEQ // 4, 64)): 2 * 4}
    assert backward == {("all-gather", (sent, 64)): 2 + 2, ("reduce-scatter", (SEQ, 64)): 2}


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (1, 1, 2, 1, 1)], ids=mesh_id)
def test_without_sequence_parallelism_tp_comm_overlap_changes_nothing(sizes):
    def program(overlap):
        step = Step(FunctionalModel(Decoder(PLAIN, tp_comm_overlap=overlap)), sizes)
        return jax.jit(step.function).lower(*step.shapes).as_text()

    assert program(True) == program(False)


def test_no_other_tensor_collective_in_a_layer():
    for sizes, axis in (((1, 1, 2, 1, 1), "tp"), ((1, 1, 1, 2, 1), "sp")):
        for c in collectives(PLAIN, sizes):
            assert c.axes == {axis}
            assert len(c.loops) < 2 or c.size >= ROWS * SEQ * 64 // 2, c


# --- gradients --------------------------------------------------------------------------------------------------------


MODELS = {"few kv heads": FEW_KV_HEADS, "decoder": DECODER, "user": user_models.GPT}


@pytest.mark.parametrize(
    ("model", "sizes", "zero_stage", "compute_dtype"),
    product_of(
        MODELS,
        [(2, 2, 1, 2, 2), (2, 1, 2, 1, 2), (4, 1, 1, 1, 1)],
        [1, 0],
        ["float32", "bfloat16"],
        rest=pytest.mark.slow,
    ),
    ids=str,
)
def test_each_gradient_is_reduced_once_a_step_in_float32(model, sizes, zero_stage, compute_dtype):
    model, compute_dtype = MODELS[model], jnp.dtype(compute_dtype)
    replicas = {axis for axis, size in zip(("dp", "cp"), (sizes[0], sizes[4]), strict=True) if size > 1}
    step = build(model, sizes, zero_stage=zero_stage, compute_dtype=compute_dtype)
    reductions = [c for c in collectives_of(step.jaxpr, step.mesh.shape) if c.kind in REDUCTIONS and c.axes & replicas]
    assert not [c for c in reductions if c.loops], "inside the loop over microbatches"
    gradients = [c for c in reductions if c.shape]  # the loss and the number of tokens are scalars
    assert {c.dtype for c in reductions} == {"float32"}
    assert len(gradients) == len(jax.tree.leaves(step.shapes[0]))
    assert all(c.axes >= replicas for c in gradients)
    assert {c.kind for c in gradients} == {"reduce-scatter" if zero_stage else "all-reduce"}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("sizes", [(2, 1, 1, 1, 1), (2, 2, 1, 1, 2)], ids=mesh_id)
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_gathers_a_layer_twice_a_microbatch_and_reduces_it_once(zero_stage, sizes, overlap):
    """Overlap adds no collective. In a tick where a stage is idle, it still takes part, to no effect."""
    arch = dataclasses.replace(PLAIN, num_hidden_layers=10)
    options = {"overlap_param_gather": overlap, "overlap_grad_reduce": overlap}
    step = build(arch, sizes, zero_stage=zero_stage, num_microbatches=3, compute_dtype=jnp.bfloat16, **options)
    replicas = {axis for axis, size in zip(("dp", "cp"), (sizes[0], sizes[4]), strict=True) if size > 1}
    times: dict[tuple[str, str], int] = {}
    for c in collectives_of(step.jaxpr, step.mesh.shape):
        if c.axes == replicas and c.loops and c.shape[:1] == (1,):  # of a layer
            times[c.kind, c.dtype] = times.get((c.kind, c.dtype), 0) + math.prod(c.loops)
    leaves = len(jax.tree.leaves(step.shapes[0]["layers"])) * 10 // sizes[1]
    forward, backward = (int(step.schedule.runs[slot].sum()) for slot in "FB")
    wanted = {("reduce-scatter", "float32"): leaves * backward}
    if zero_stage == 3:
        wanted["all-gather", "bfloat16"] = leaves * (forward + backward)
    assert times == wanted


@pytest.mark.parametrize("model", [DECODER, user_models.GPT], ids=["decoder", "user"])
def test_gradients_do_not_travel_between_stages_for_each_microbatch(model):
    step = build(model, (1, 2, 1, 1, 1))
    outer = {x.shape for part in ("embed", "head") for x in jax.tree.leaves(step.shapes[0][part])}
    outer |= {(x[0] // 2, *x[1:]) for x in outer if x[0] == 256} | {
        (*x[:-1], x[-1] // 2) for x in outer if x[-1] == 256
    }
    found = [c for c in collectives_of(step.jaxpr, step.mesh.shape) if c.kind in REDUCTIONS and c.loops]
    assert found and not [c for c in found if c.shape in outer]


def test_parameters_are_gathered_once_a_step_in_the_compute_dtype():
    step = build(DECODER, (2, 2, 1, 2, 2), compute_dtype=jnp.bfloat16)
    num_params = len(jax.tree.leaves(step.shapes[0]))
    gathered = [c for c in collectives_of(step.jaxpr, step.mesh.shape) if c.kind == "all-gather" and not c.loops]
    assert sum(c.dtype == "bfloat16" for c in gathered) == num_params
    # The float32 gathers exist only to be transposed into the reduction of the gradients, and never run. (The program
    # for CPUs does not show which of the two it kept, because it has no collectives in bfloat16.)
    lines = [line for line in step.compiled.as_text().splitlines() if " all-gather(" in line and "/while/" not in line]
    assert len(lines) == num_params


MESHES = [(2, 4, 1, 1, 2), (2, 2, 1, 2, 2), (2, 2, 2, 1, 2)]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("sizes", MESHES, ids=mesh_id)
def test_the_number_of_collectives_does_not_depend_on_the_number_of_microbatches(sizes, schedule):
    few, many = (collectives(PLAIN, sizes, m, schedule=schedule) for m in (6, 12))
    what = lambda c: (c.kind, c.axes, c.dtype, c.shape, len(c.loops), c.body)  # noqa: E731
    assert few and list(map(what, few)) == list(map(what, many))


def test_the_compiled_program_has_no_more_collectives_with_more_microbatches():
    counts = []
    for m in (4, 16):
        text = build(PLAIN, (1, 2, 1, 2, 2), m).compiled.as_text()
        kinds = r"all-reduce|reduce-scatter|all-gather|collective-permute|all-to-all"
        counts.append(collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", text)))
    assert counts[0] and counts[0] == counts[1]


# --- memory and size of the program -----------------------------------------------------------------------------------


def temporaries(schedule, num_microbatches):
    return (
        build(PLAIN, (1, 4, 1, 1, 1), num_microbatches, schedule=schedule).compiled.memory_analysis().temp_size_in_bytes
    )


@pytest.mark.slow  # in the default selection, parity/test_pipeline_work.py compares 8 with 64
def test_memory_of_1f1b_does_not_grow_with_the_number_of_microbatches():
    assert temporaries("1f1b", 16) < 1.02 * temporaries(
        "1f1b", 7
    )  # from 7 on, stage 0 has its largest number in flight
    assert temporaries("1f1b", 64) < 1.02 * temporaries("1f1b", 16)


@pytest.mark.slow
def test_memory_of_gpipe_does():
    assert temporaries("gpipe", 16) > 2 * temporaries("gpipe", 4)
    assert temporaries("gpipe", 16) > 1.8 * temporaries("1f1b", 16)


@pytest.mark.parametrize("recompute", [Recompute(), Recompute("full", "uniform", 1)], ids=str)
def test_a_step_keeps_no_scores_and_no_masks(monkeypatch, recompute):
    monkeypatch.setattr(blockwise, "MAX_TILE", 64)
    tile, seq = 64, 512  # tokens per rank, more than any other size
    model = FunctionalModel(Decoder(PLAIN))
    step = Step(model, (1, 1, 1, 1, 2), num_microbatches=2, rows=2, seq=2 * seq, recompute=recompute)
    shapes = array_shapes(step.compiled.as_text())
    assert (1, seq, 64) in shapes
    assert not [shape for shape in shapes if sum(n >= seq for n in shape) > 1]
    # Stacked tiles of scores or masks, over a row of tiles or over layers, would be larger arrays of [..., tile, tile].
    assert max(math.prod(shape) for shape in shapes if shape[-2:] == (tile, tile)) <= 8 * tile * tile


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_program_does_not_grow_with_the_number_of_microbatches(schedule):
    few, many = (len(build(PLAIN, (1, 4, 1, 1, 1), m, schedule=schedule).compiled.as_text()) for m in (4, 16))
    assert many < 1.1 * few


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), *slow((1, 2, 1, 1, 1))], ids=mesh_id)
def test_the_program_does_not_grow_with_the_number_of_layers(sizes):
    deep = dataclasses.replace(PLAIN, num_hidden_layers=16)
    assert len(build(deep, sizes).compiled.as_text()) < 1.1 * len(build(PLAIN, sizes).compiled.as_text())


PROGRAM = """
import jax, support
step = support.Step(support.FunctionalModel(support.Decoder(support.DECODER)), (2, 2, 1, 2, 2), schedule="zb1p", zero_stage=3)
print(jax.jit(step.function).lower(*step.shapes).as_text())
"""


def test_all_processes_compile_the_same_program():
    """Whatever the iteration order of Python's sets of strings, which differs between processes."""
    folder = Path(__file__).parents[1]
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", "import conftest; conftest.use_simulated_devices()\n" + PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(folder)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 5)  # with these, the mesh axes had two different orders
    ]
    first, second = (process.communicate(timeout=300)[0] for process in programs)
    assert "all_gather" in first
    assert first == second
