"""What several tests share: a batch, weights, the engine on any mesh, a one-device reference, inspection of programs.

The reference of a parity test shares only the model's own layers with the engine: it loops over them on one device,
outside `shard_map`, with plain attention and jax's own cross-entropy.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from jaxpar.attention import AttentionSettings, reference_attention
from jaxpar.backward.recompute import Recompute
from jaxpar.config import Architecture, MeshSizes
from jaxpar.models import Decoder, FunctionalModel, TokenInfo
from jaxpar.models import decoder as decoder_module
from jaxpar.objectives import Asked
from jaxpar.parallel.batch import BatchLayout
from jaxpar.parallel.mesh import build_mesh
from jaxpar.parallel.sharding import BATCH_SPEC, layout_tree
from jaxpar.pipeline.schedule import IDLE, Schedule, build_schedule
from jaxpar.step import StepSetup, build_evaluate, build_loss_and_grads, build_statistics

ROOT = Path(__file__).parents[1]
SEQ, GLOBAL_BATCH = 32, 12
VOCAB, PADDED_VOCAB = 250, 256
TOLERANCE = 1e-5  # relative, float32
# Generating CPU machine code takes most of the compile time, and these tests do not look at it. So LLVM does not
# optimize it, and kernels are generated without MLIR (8.6 s of CPU time for a step on eight devices with it, 5.2 s
# without). XLA of jax 0.12 has no other way to generate them, and no such option.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
if jax.__version_info__ >= (0, 12):
    del QUICK["xla_cpu_use_fusion_emitters"]

# Grouped-query attention 8:4, with every feature of the Qwen models.
DECODER = Architecture("qwen3", VOCAB, PADDED_VOCAB, 64, 96, 4, 8, 4, 8, qk_norm=True, attention_bias=True)
# 8:2, so that a tensor group of 4 repeats kv heads; tied embeddings and a sliding window.
FEW_KV_HEADS = Architecture(
    "mistral", VOCAB, PADDED_VOCAB, 64, 96, 4, 8, 2, 8, tie_word_embeddings=True, sliding_window=11
)
# Only the matrix products and the norms, so that its collectives are easy to count.
PLAIN = Architecture("llama", VOCAB, PADDED_VOCAB, 64, 96, 4, 8, 4, 8)


def mesh_id(sizes: tuple[int, ...]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in zip(("dp", "pp", "tp", "sp", "cp"), sizes, strict=True))


def make_mesh(sizes: tuple[int, ...]) -> Mesh:
    """A mesh of the sizes (dp, pp, tp, sp, cp) over the first devices."""
    mesh_sizes = MeshSizes(*sizes)
    return build_mesh(mesh_sizes, jax.devices()[: mesh_sizes.num_devices])


def slow(*cases: Any) -> list[Any]:
    """Marks parameters of a test as `slow`. A tuple holds one value per argument, unless it is the sizes of a mesh."""
    several = lambda case: isinstance(case, tuple) and not all(isinstance(value, int) for value in case)  # noqa: E731
    return [pytest.param(*(case if several(case) else (case,)), marks=pytest.mark.slow) for case in cases]


def product_of(*values: Iterable[Any], rest: Any) -> list[Any]:
    """The product of lists of values, as parameters of a test. The cases without a mark cover every pair of values from
    different lists. The other cases have the mark `rest`: `pytest.mark.slow` or `pytest.mark.exhaustive`."""
    cases = list(itertools.product(*map(list, values)))
    pairs = {case: set(itertools.combinations(enumerate(map(repr, case)), 2)) for case in cases}
    missing, cover = set().union(*pairs.values()), []
    while missing:
        cover.append(max(cases, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[cover[-1]]
    return [case if case in cover else pytest.param(*case, marks=rest) for case in cases]


@functools.cache
def make_batch(rows: int = GLOBAL_BATCH, seq: int = SEQ) -> dict[str, np.ndarray]:
    """Packed documents. Valid tokens get denser along both dimensions, so that no two dp ranks, cp ranks or
    microbatches have the same number of them. Rows 4 and 5 (one microbatch of two rows) have none."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, VOCAB, (rows, seq + 1)).astype(np.int32)
    starts = rng.random((rows, seq)) < 0.08
    starts[:, 0] = True
    segment_ids = starts.cumsum(-1).astype(np.int32)
    index = np.arange(seq)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), -1)
    density = np.linspace(0.1, 1, rows)[:, None] * np.linspace(0.2, 1, seq)[None]
    loss_mask = (rng.random((rows, seq)) < density).astype(np.float32)
    loss_mask[4:6] = 0
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids,
        "positions": positions.astype(np.int32),
        "loss_mask": loss_mask,
    }


def random_params(model: FunctionalModel, seed: int = 3) -> Any:
    """Weights with which every part of the model matters: sharp attention, biases other than 0, scales other than 1."""
    rng = np.random.default_rng(seed)

    def one(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name, value = jax.tree_util.keystr(path, simple=True, separator="/"), rng.normal(size=shape.shape)
        if name.endswith("scale"):
            value = 1 + 0.2 * value
        else:
            value = value * (0.2 if "bias" in name else 0.125)
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, model.shapes)


def readmes() -> list[Path]:
    """All READMEs of the project, the one in the root folder first."""
    # Not of all folders: a newcomer's virtual environment may stand beside these.
    folders = (ROOT / name for name in ("jaxpar", "configs", "tests", "tpu_gpu_scripts"))
    found = sorted(file for folder in folders for file in folder.rglob("README.md"))
    return [ROOT / "README.md", *found, ROOT / ".github/CONTRIBUTING.md"]


def readme_example(word: str) -> str:
    """The Python example in the READMEs that contains `word`."""
    codes = [code for file in readmes() for code in re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL)]
    (code,) = (code for code in codes if word in code)
    return code


# --- one device -------------------------------------------------------------------------------------------------------


def reference_loss(model: FunctionalModel, params: Any, batch: Any, vocab: int = VOCAB, table: Any = None) -> jax.Array:
    """Mean loss of the valid tokens, by its definition. `table` replaces the embedding module by a plain lookup."""
    info = TokenInfo(batch["positions"], batch["segment_ids"])
    x = table(params)[batch["tokens"]] if table else model.embed(params, batch["tokens"], info)
    for index in range(model.num_layers):
        x = model.block(jax.tree.map(lambda p, i=index: p[i], params["layers"]), x, info)
    log_probs = jax.nn.log_softmax(model.head(params, x)[..., :vocab])
    losses = -jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    return (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


def reference(model: FunctionalModel, params: Any, batch: Any, **kwargs: Any) -> tuple[np.ndarray, Any]:
    function = jax.value_and_grad(lambda params: reference_loss(model, params, batch, **kwargs))
    step = jax.jit(function, compiler_options=QUICK)
    return jax.tree.map(np.asarray, step(params))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its weights, a batch, and the loss and gradients on one device."""

    model: FunctionalModel
    params: Any
    batch: dict[str, np.ndarray]
    loss: np.ndarray
    grads: Any


@functools.cache
def decoder_case(arch: Architecture) -> Case:
    model = FunctionalModel(Decoder(arch))
    params, batch = random_params(model), make_batch()
    with mock.patch.object(decoder_module, "attention", reference_attention):
        loss, grads = reference(model, params, batch, table=lambda params: params["embed"]["table"])
    return Case(model, params, batch, loss, grads)


def assert_parity(loss: Any, grads: Any, expected_loss: Any, expected_grads: Any, tolerance: float = TOLERANCE) -> None:
    """Norm of difference over norm of reference, for the loss, each parameter, each layer of a stacked parameter."""
    errors = {"loss": relative_error(loss, expected_loss)}
    leaves, expected_leaves = (
        jax.tree_util.tree_leaves_with_path(grads),
        jax.tree_util.tree_leaves_with_path(expected_grads),
    )
    assert [path for path, _ in leaves] == [path for path, _ in expected_leaves]
    for (path, grad), (_, expected) in zip(leaves, expected_leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert grad.shape == expected.shape and grad.dtype == np.float32, f"{name}: {grad.dtype}{grad.shape}"
        errors[name] = relative_error(grad, expected)
        if name.startswith("layers/"):
            pairs = enumerate(zip(grad, expected, strict=True))
            errors |= {f"{name}[{i}]": relative_error(one, expected_one) for i, (one, expected_one) in pairs}
    wrong = {name: f"{error:.2e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{len(wrong)} of {len(errors)} differ by more than {tolerance}: {wrong}"


def relative_error(actual: Any, expected: Any) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert np.linalg.norm(expected) > 0, "a reference of zero shows nothing"
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# --- the engine on a mesh ---------------------------------------------------------------------------------------------


class Step:
    """Loss and gradients of a model on a mesh, computed by jaxpar."""

    def __init__(
        self,
        model: FunctionalModel,
        sizes: tuple[int, ...],
        *,
        num_microbatches: int = 6,
        schedule: str = "1f1b",
        recompute: Recompute = Recompute(),  # noqa: B008 (frozen)
        num_chunks: int = 1,
        zero_stage: int = 1,
        compute_dtype: Any = jnp.float32,
        rows: int = GLOBAL_BATCH,
        seq: int = SEQ,
        trained: Any = None,
        **setup: Any,
    ):
        self.mesh = make_mesh(sizes)
        self.layouts = layout_tree(
            model.shapes,
            model.dims,
            self.mesh,
            explicit=model.explicit,
            zero_stage=zero_stage,
            num_chunks=num_chunks,
            num_layers=model.num_layers,
            trained=trained,
            frozen_dtype=compute_dtype,
        )
        self.shardings = jax.tree.map(lambda layout: NamedSharding(self.mesh, layout.rest_spec), self.layouts)
        self.schedule = build_schedule(schedule, sizes[1], num_microbatches, num_chunks)
        self.setup = StepSetup(
            model,
            self.mesh,
            self.layouts,
            lambda rows: self.schedule,
            compute_dtype=compute_dtype,
            recompute=recompute,
            zero_stage=zero_stage,
            **setup,
        )
        self.function = build_loss_and_grads(self.setup)
        shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        batch_sharding = NamedSharding(self.mesh, BATCH_SPEC)
        self.shapes = (
            jax.tree.map(shape, model.shapes, self.shardings),
            jax.tree.map(lambda x: shape(x, batch_sharding), make_batch(rows, seq)),
        )

    @functools.cached_property
    def jaxpr(self) -> Any:
        return jax.make_jaxpr(self.function)(*self.shapes)

    @functools.cached_property
    def compiled(self) -> Any:
        shapes = (
            (*self.shapes, None, jax.ShapeDtypeStruct((2,), np.uint32)) if self.setup.model.is_random else self.shapes
        )
        return jax.jit(self.function).lower(*shapes).compile(compiler_options=QUICK)

    def initial_params(self, model: FunctionalModel, seed: int) -> Any:
        # Compiled as for a user: with other options the last bits differ, though they still agree between meshes.
        return jax.jit(model.init, static_argnums=0, out_shardings=self.shardings)(seed)

    def evaluate(self, params: Any, batch: Any) -> dict[str, np.ndarray]:
        placed = self._placed(params, batch)
        losses = jax.jit(build_evaluate(self.setup), compiler_options=QUICK)(*placed)
        statistics = jax.jit(build_statistics(self.setup, Asked()), compiler_options=QUICK)(*placed)
        return jax.tree.map(np.asarray, {**losses, "token_losses": -statistics.log_probs})

    def __call__(self, params: Any, batch: Any, seed: Any = None) -> tuple[np.ndarray, Any]:
        more = () if seed is None else (None, seed)
        return jax.tree.map(np.asarray, self.compiled(*self._placed(params, batch), *more))

    def _placed(self, params: Any, batch: Any) -> tuple[Any, Any]:
        return jax.device_put(params, self.shardings), BatchLayout(*batch["tokens"].shape, self.mesh).put_on_mesh(batch)


def check_step(
    case: Case,
    sizes: tuple[int, ...],
    attention: AttentionSettings = AttentionSettings(),  # noqa: B008 (frozen)
    **kwargs: Any,
) -> None:
    """A whole parity test: the step on a mesh against one device."""
    loss, grads = Step(case.model, sizes, attention=attention, **kwargs)(case.params, case.batch)
    assert_parity(loss, grads, case.loss, case.grads)


def random_schedule(
    num_stages: int, num_microbatches: int, num_chunks: int, *, split_weight: bool, seed: int
) -> Schedule:
    """A random valid table: in each slot, every stage does one of the items that it could do, or none."""
    rng, items = np.random.default_rng(seed), num_chunks * num_microbatches
    slots, num_virtual = "FBW" if split_weight else "FB", num_stages * num_chunks
    done: dict[tuple[str, int, int], int] = {}  # (slot, virtual stage, microbatch) → tick
    rows: dict[str, list[list[int]]] = {slot: [] for slot in slots}

    def ready(slot: str, virtual: int, microbatch: int, tick: int) -> bool:
        needs = {
            "F": [("F", virtual - 1, 1)] * (virtual > 0),
            "B": [("F", virtual, 0)] + [("B", virtual + 1, 1)] * (virtual < num_virtual - 1),
            "W": [("B", virtual, 0)],
        }
        return (slot, virtual, microbatch) not in done and all(
            done.get((source, needed, microbatch), tick + 1) + delay <= tick for source, needed, delay in needs[slot]
        )

    for tick in itertools.count():
        if len(done) == len(slots) * num_stages * items:
            tables = [np.array(rows[slot]) for slot in slots]
            return Schedule("random", num_chunks, num_microbatches, *tables)
        for slot in slots:
            row = []
            for stage in range(num_stages):
                works = [divmod(item, num_microbatches) for item in range(items)]
                can = [(c, m) for c, m in works if ready(slot, c * num_stages + stage, m, tick)]
                chunk, microbatch = can[rng.integers(len(can))] if can and rng.random() < 0.7 else (None, None)
                row.append(IDLE if chunk is None else chunk * num_microbatches + microbatch)
                if chunk is not None:
                    done[slot, chunk * num_stages + stage, microbatch] = tick
            rows[slot].append(row)
    raise AssertionError


# --- inspection of programs -------------------------------------------------------------------------------------------

REDUCTIONS = ("all-reduce", "reduce-scatter")
_KINDS = {"psum": "all-reduce", "reduce_scatter": "reduce-scatter", "all_gather": "all-gather",
          "ppermute": "permute", "pmax": "max", "all_to_all": "all-to-all"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation, on one array, over axes of more than one device.

    Attributes:
      loops: trip counts of the scans around it, the outermost first.
      body: number of the innermost of these scans, in program order; -1 outside all scans.
    """

    kind: str
    axes: frozenset[str]
    dtype: str
    shape: tuple[int, ...]
    loops: tuple[int, ...]
    body: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def collectives(program: Any, axis_sizes: Any) -> list[Collective]:
    """The collectives of a program, in program order. They are read from its jaxpr, where the axes have names.

    Collectives over axes of size 1 are left out, and so are the operations that jax itself inserts on one device to
    mark replication.
    """
    numbers, found = itertools.count(), []

    def visit(jaxpr: Any, loops: tuple[int, ...], body: int) -> None:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        for equation in jaxpr.eqns:
            is_loop = equation.primitive.name == "scan"
            inside = ((*loops, equation.params["length"]), next(numbers)) if is_loop else (loops, body)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    visit(inner, *inside)
            if kind := _KINDS.get(equation.primitive.name.removesuffix("_invariant")):
                names = equation.params.get("axes", equation.params.get("axis_name"))
                axes = frozenset(a for a in ((names,) if isinstance(names, str) else names) if axis_sizes[a] > 1)
                arrays = [x.aval for x in equation.invars] if axes else []
                found.extend(Collective(kind, axes, str(x.dtype), x.shape, loops, body) for x in arrays)

    visit(program, (), -1)
    return found


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def array_shapes(text: str) -> set[tuple[int, ...]]:
    """The shape of every array in a compiled program's text."""
    shapes = re.findall(r"\b(?:pred|bf16|f16|f32|f64|[su]\d+)\[([\d,]*)\]", text)
    return {tuple(int(n) for n in shape.split(",") if n) for shape in shapes}


def equal_trees(a: Any, b: Any) -> bool:
    """Whether two trees of arrays are bitwise equal."""
    same: Callable = lambda x, y: x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()  # noqa: E731
    return jax.tree.all(jax.tree.map(same, jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b)))
