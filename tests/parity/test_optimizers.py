"""Optimizers of optax on a mesh: the same steps as on one device, with a checkpoint read on another layout; Muon's transfers."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import QUICKSTART, SMALL, layout, metrics
from support import DECODER, QUICK, SEQ, Step, collectives, equal_trees, random_params, relative_error, slow
from user_models import NoStack

import jaxpar
from jaxpar.checkpoint.checkpoints import Checkpoints
from jaxpar.measure.check import random_batch
from jaxpar.models import Decoder, FunctionalModel
from jaxpar.parallel.sharding import ParamLayout
from jaxpar.program import Program
from jaxpar.step.muon import left_to_adam, matrix_dims, muon
from jaxpar.step.opt_state import by_path, opt_state_specs
from jaxpar.step.optimizer import build_optimizer

OPTIMIZERS = {
    "muon": ["actor.optim.lr=1e-2", "actor.optim.optimizer_args={adam_learning_rate: 1e-3}"],
    "lion": ["actor.optim.lr=1e-4"],
    "adafactor": ["actor.optim.lr=1e-3", "actor.optim.optimizer_args={min_dim_size_to_factor: 8}"],
}
GROUPS = ("actor.optim.groups=[{match: layers/*/attention/*, lr_mult: 0.5, weight_decay: 0}]",)
NUM_STEPS = 10
AXES = ("tensor_model", "pipeline_model", "context")


class Run:
    """Ten steps of the quickstart's model with an optimizer on a layout."""

    def __init__(self, folder, name: str, where: str, *more: str):
        settings = [
            f"actor.optim.optimizer={name}",
            *OPTIMIZERS[name],
            "runner.max_steps=10",
            *SMALL,
            *layout(where),
            *more,
        ]
        self.config = jaxpar.load_config(QUICKSTART, [f"runner.output_dir={folder}", *settings])
        self.program = program = Program(self.config, jax.devices()[: self.config.num_configured_devices()])
        self.state = program.init.lower(None).compile(compiler_options=QUICK)(None)
        rows = program.batch_layout.own_rows(random_batch(program))
        self.batches = [
            program.batch_layout.put_on_mesh({key: np.roll(x, step, 0) for key, x in rows.items()})
            for step in range(NUM_STEPS)
        ]
        self.step = program.train_step.lower(self.state, self.batches[0]).compile(compiler_options=QUICK)

    def steps(self, first: int, last: int):
        for batch in self.batches[first:last]:
            self.state, _ = self.step(self.state, batch)
        return jax.device_get(self.state)


@functools.cache
def on_one_device(name: str, *more: str):
    run = Run("unused", name, "one", *more)
    return run.steps(0, 5), run.steps(5, NUM_STEPS)


def assert_near(state, expected) -> None:
    pairs = zip(jax.tree_util.tree_leaves_with_path(state["params"]), jax.tree.leaves(expected["params"]), strict=True)
    errors = {jax.tree_util.keystr(path): relative_error(x, y) for (path, x), y in pairs}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error < 1e-5}
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("muon", "two", "zero3"),
        *slow(
            ("lion", "two", "zero3"), ("adafactor", "two", "zero3"), ("muon", "all", "cp4"), ("lion", "all", "cp4"),
            ("adafactor", "all", "cp4"),
        ),
    ],
)  # fmt: skip
def test_five_steps_and_five_on_another_layout_are_ten_on_one_device(tmp_path, name, first, second):
    """With an average of the weights, which the checkpoint has too."""
    more = ("actor.optim.ema_decay=0.8",)
    halfway, expected = on_one_device(name, *more)
    run = Run(tmp_path, name, first, *more)
    assert_near(run.steps(0, 5), halfway)
    checkpoints = Checkpoints(run.config)
    checkpoints.save(5, run.state, {"batch": 5})
    checkpoints.wait()
    other = Run(tmp_path, name, second, *more)
    shapes, shardings = other.program.state_shapes, other.program.state_shardings
    other.state, _ = Checkpoints(other.config).restore(checkpoints.folder / "global_step_5", shapes, shardings)
    assert equal_trees(other.state, run.state)
    after = other.steps(5, NUM_STEPS)
    assert_near(after, expected)
    ema = {"params": after["opt_state"].ema}, {"params": expected["opt_state"].ema}
    assert_near(*ema)
    assert relative_error(ema[0]["params"]["head"]["weight"], after["params"]["head"]["weight"]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where", "more"),
    [*itertools.product(OPTIMIZERS, ["two", "zero3", "all"], [()]), ("muon", "two", GROUPS), ("lion", "all", GROUPS)],
)
def test_ten_steps_on_a_layout_are_those_on_one_device(name, where, more):
    assert_near(Run("unused", name, where, *more).steps(0, NUM_STEPS), on_one_device(name, *more)[1])


def decoder(sizes, *, whole=False, **kwargs):
    """`whole`: a model that is not a stack."""
    model = FunctionalModel(NoStack, SEQ) if whole else FunctionalModel(Decoder(DECODER))
    return model, Step(model, sizes, **kwargs)


def _three_updates(optimizer, params, grads):
    """Parameters after three updates by gradients that differ."""

    def update(params, state, shift):
        changes, state = optimizer.update(jax.tree.map(lambda g: jnp.roll(g, shift, -1), grads), state, params)
        return optax.apply_updates(params, changes), state

    update, state = jax.jit(update, compiler_options=QUICK), jax.jit(optimizer.init)(params)
    for shift in range(3):
        params, state = update(params, state, shift)
    return jax.device_get(params)


@pytest.mark.parametrize(("name", "args"), [("adafactor", "min_dim_size_to_factor: 4"), *slow(("lion", ""))])
def test_an_optimizer_s_state_lies_like_the_parameters_and_its_updates_are_optax_s(name, args):
    model, step = decoder((2, 2, 1, 2, 1), zero_stage=2)
    settings = [f"actor.optim.optimizer={name}", "actor.optim.lr=1e-2", f"actor.optim.optimizer_args={{{args}}}"]
    optimizer = build_optimizer(
        jaxpar.load_config(QUICKSTART, [*settings, "actor.lr_sched.lr_decay_style=constant"]), step.layouts
    )
    state = jax.eval_shape(optimizer.init, model.shapes)
    find, specs = by_path(step.layouts), opt_state_specs(state, step.layouts)
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(specs), strict=True):
        # Each dimension that it has is split as in the parameter.
        whole = {entry for entry in find(path).rest_spec if entry} if find(path) else set()
        lost = {entry for entry in whole if entry not in spec}
        assert not lost or leaf.shape != find(path).shape, f"{path}: {spec}"
        assert leaf.size < 256 or len(lost) <= 1, f"{path} {leaf.shape}: {spec}"
    params, grads = random_params(model), random_params(model, 5)
    expected = _three_updates(optimizer, params, grads)
    place = lambda tree: jax.device_put(tree, step.shardings)  # noqa: E731
    found = _three_updates(optimizer, place(params), place(grads))
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert relative_error(x, y) < 1e-5


def own_trainer(folder, **choices):
    settings = [
        f"runner.output_dir={folder}",
        "runner.max_steps=2",
        "actor.optim.ema_decay=0.5",
        *SMALL,
        *layout("one"),
    ]
    return jaxpar.Trainer(jaxpar.load_config(QUICKSTART, settings), **choices)


def test_a_trainer_takes_an_optimizer_or_a_schedule_of_one_s_own(tmp_path):
    optim, sched = own_trainer(tmp_path, optimizer=optax.lion(1e-2)).warnings
    assert optim.startswith("actor.optim: adam_beta1, ") and sched.startswith("actor.lr_sched: lr_decay_iters, ")
    settings = [
        "actor.optim.optimizer=muon",
        *(f"actor.model.{a}_parallel_size=1" for a in AXES),
        "cluster.num_gpus_per_node=1",
    ]
    config = jaxpar.load_config(QUICKSTART, [*settings, "actor.model.sequence_parallel=False", "runner.seq_length=32"])
    *_, muon_note = jaxpar.Trainer(config, lambda rngs: NoStack(rngs)).warnings
    assert muon_note.startswith("actor.optim.optimizer: muon leaves embed/embed/positions/embedding to Adam: ")
    rate, sched = own_trainer(tmp_path, learning_rate=optax.constant_schedule(1.0)).warnings
    assert rate.startswith("actor.optim.lr has no effect") and sched.startswith("actor.lr_sched: lr_decay_iters, ")


@pytest.mark.slow
def test_a_run_with_an_optimizer_of_one_s_own(tmp_path):
    trainer = own_trainer(tmp_path, optimizer=optax.chain(optax.clip(1.0), optax.lion(1e-2)))
    trainer.fit()
    assert [row["learning_rate"] for row in metrics(tmp_path)] == [None, None]
    tokens = np.arange(32)[None]
    average, last = (trainer.module(ema=ema)(tokens)[..., :258] for ema in (True, False))
    assert relative_error(average, last) > 1e-3
    with pytest.raises(jaxpar.ConfigError, match=r"all in opt_state: the parameters are the same"):
        own_trainer(tmp_path, optimizer=optax.lion(1e-2)).restore()


# --- Muon -------------------------------------------------------------------------------------------------------------


def test_what_is_a_matrix():
    _, step = decoder((1, 1, 1, 1, 1))
    found = {x.name.removeprefix("layers/"): matrix_dims(x) for x in jax.tree.leaves(step.layouts)}
    matrices = {name: dims for name, dims in found.items() if dims}
    assert matrices == {
        **dict.fromkeys(("attention/query", "attention/key", "attention/value"), ((1,), (2, 3))),
        "attention/output": ((1, 2), (3,)),
        **dict.fromkeys(("mlp/gate", "mlp/up", "mlp/down"), ((1,), (2,))),
    }
    _, step = decoder((1, 1, 1, 1, 1), whole=True)
    names = {x.name.removesuffix("/kernel") for x in jax.tree.leaves(step.layouts) if matrix_dims(x)}
    block = {f"embed/block/{name}" for name in ("query", "key", "value", "out", "up", "down")}
    assert names == {*block, "embed/gate", "embed/mix"}
    assert left_to_adam(step.layouts) == ["embed/embed/positions/embedding"]
    stacked = ParamLayout("qkv", (4, 3, 8, 2, 4), ("layers", None, "embed", "heads", "head_dim"), *[None] * 5)
    assert matrix_dims(stacked) == ((2,), (3, 4))
    assert matrix_dims(dataclasses.replace(stacked, dims=("layers", None, "heads", "mlp", "head_dim"))) is None


@pytest.mark.parametrize(
    ("sizes", "kwargs"),
    [
        ((2, 1, 2, 1, 2), {"zero_stage": 3}),
        *slow(
            ((2, 2, 1, 2, 1), {}),
            ((1, 2, 4, 1, 1), {"num_chunks": 2, "schedule": "interleaved_1f1b"}),
            ((2, 1, 1, 4, 1), {"zero_stage": 0}),
            ((8, 1, 1, 1, 1), {"zero_stage": 2}),
            ((2, 1, 2, 1, 2), {"zero_stage": 2, "whole": True}),
        ),
    ],
)
@pytest.mark.parametrize("more", [{}, *slow(({"nesterov": False, "beta": 0.8, "consistent_rms": 0.2},))])
def test_muon_is_optax_s(sizes, kwargs, more):
    model, step = decoder(sizes, **kwargs)
    params, grads = random_params(model), random_params(model, 5)
    find = by_path(step.layouts)

    def dims(params):
        def of(path, _):
            found = matrix_dims(find(path))
            return found and optax.contrib.MuonDimensionNumbers(*found)

        return jax.tree_util.tree_map_with_path(of, params)

    plain = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=dims, **more)
    own = muon(lambda _: 1e-2, param_layouts=step.layouts, mesh=step.mesh, **more)
    expected = _three_updates(plain, params, grads)
    found = _three_updates(own, *(jax.device_put(x, step.shardings) for x in (params, grads)))
    changes = (jax.tree.map(np.subtract, x, params) for x in (found, expected))
    for x, y in zip(*map(jax.tree.leaves, changes), strict=True):
        assert relative_error(x, y) < 1e-5


def test_muon_sends_each_shard_there_and_back_once():
    """And nothing else: no product is split over devices."""
    model, step = decoder((2, 2, 2, 1, 1), zero_stage=3)
    optimizer = muon(lambda _: 1e-2, param_layouts=step.layouts, mesh=step.mesh)
    state = jax.eval_shape(optimizer.init, model.shapes)
    specs = opt_state_specs(state, step.layouts)
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(step.mesh, spec))  # noqa: E731
    state = jax.tree.map(place, state, specs)
    arguments = step.shapes[0], state, step.shapes[0]
    sent = collectives(jax.make_jaxpr(optimizer.update)(*arguments), step.mesh.shape)
    assert {x.kind for x in sent} == {"all-to-all"} and not any(x.loops for x in sent)
    total = 0
    for one in jax.tree.leaves(step.layouts):
        if dims := matrix_dims(one):
            split = [one.rest_spec[i] for i in dims.rows + dims.columns if i < len(one.rest_spec)]
            split = [entry for entry in split if any(step.mesh.shape[axis] > 1 for axis in np.ravel(entry) if axis)]
            # 2 layers a stage, and 4 devices that share them: half of what is exchanged is padding.
            total += 2 * len(split) * one.bytes_per_device(step.mesh.shape) * 2
    assert sum(4 * x.size for x in sent) == total > 0
    compiled = jax.jit(optimizer.update).lower(*arguments).compile(compiler_options=QUICK)
    kinds = r"\b(all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start)?\("
    assert set(re.findall(kinds, compiled.as_text())) == {"all-to-all"}
