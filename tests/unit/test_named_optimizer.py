"""Optimizers by name and as objects: their arguments, groups of parameters, the average of the weights, notes and errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support import QUICK

from jaxpar.blueprint import Blueprint
from jaxpar.config import ConfigError, config_from_dict
from jaxpar.parallel.sharding import ParamLayout, layout_tree
from jaxpar.step.ema import ema_params, with_ema
from jaxpar.step.named_optimizer import optimizer_names
from jaxpar.step.opt_state import opt_state_specs
from jaxpar.step.optimizer import build_optimizer, check_update, unused_settings
from jaxpar.step.train_step import build_train_step

SETTINGS = {
    "runner": {"max_steps": 5, "seq_length": 8},
    "actor": {
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "model": {
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 8, "precision": "fp32",
        },
    },
}  # fmt: skip

DIMS = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {
        "attention": {"query": ("layers", "embed", "heads", "head_dim"), "query_bias": ("layers", "heads", "head_dim")},
        "mlp": {"up": ("layers", "embed", "mlp")},
        "norm": {"scale": ("layers", "embed")},
    },
}
SIZES = {"vocab": 8, "embed": 4, "layers": 2, "heads": 4, "head_dim": 2, "mlp": 6}
SHAPES = jax.tree.map(
    lambda dims: jax.ShapeDtypeStruct(tuple(SIZES[dim] for dim in dims), jnp.float32),
    DIMS,
    is_leaf=lambda x: isinstance(x, tuple),
)


def layouts(dp=2, tp=2):
    mesh = jax.sharding.AbstractMesh((dp, 1, tp, 1, 1), ("dp", "pp", "tp", "sp", "cp"))
    return layout_tree(SHAPES, DIMS, mesh, explicit=True, zero_stage=1)


def config(optimizer="adam", **optim):
    return config_from_dict({"actor": {"optim": {"lr": 0.1, "clip_grad": 0, "optimizer": optimizer, **optim}}})


def ones(value=1.0):
    return jax.tree.map(lambda x: jnp.full(x.shape, value), SHAPES)


def first_update(optimizer, grad=0.0):
    """name → the update of parameters of 1."""
    updates, _ = jax.jit(lambda: optimizer.update(ones(grad), optimizer.init(ones()), ones()), compiler_options=QUICK)()
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.unique(x).item()
        for path, x in jax.tree_util.tree_leaves_with_path(updates)
    }


def test_every_name_builds_an_optimizer_whose_weight_decay_is_the_config_s():
    needs = {"dpsgd": {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "seed": 0}, "noisy_sgd": {"key": 0}}
    no_schedule = {"optimistic_adam", "rprop", "sm3"}
    names = optimizer_names()
    assert {"adamw", "lion", "muon", "sgd", "adafactor", "lamb", "ademamix", "prodigy"} <= set(names)
    for name in names:
        own = config(name, optimizer_args=needs.get(name, {}))
        if name in no_schedule:
            with pytest.raises(ConfigError, match=r"actor.optim.optimizer_args: \w+ refuses|update\(.*fails"):
                check_update(build_optimizer(own, layouts()), SHAPES)
        elif name not in needs:
            check_update(build_optimizer(own, layouts()), SHAPES)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "lamb"])
def test_biases_and_norms_have_no_weight_decay(name):
    updates = first_update(build_optimizer(config(name, weight_decay=0.5), layouts()))
    decayed = {key for key, update in updates.items() if update}
    assert decayed == {"embed/table", "layers/attention/query", "layers/mlp/up"}
    assert name == "lamb" or updates["embed/table"] == pytest.approx(-0.05)


def test_arguments_are_optax_s():
    own = config("lion", optimizer_args={"b1": 0.5, "b2": "1e-1"}, weight_decay=0)
    plain = optax.lion(0.1, b1=0.5, b2=0.1, weight_decay=0.0)
    state, plain_state = build_optimizer(own, layouts()).init(ones()), plain.init(ones())
    for grad in (0.3, -0.2, 0.1):
        updates, state = build_optimizer(own, layouts()).update(ones(grad), state, ones())
        expected, plain_state = plain.update(ones(grad), plain_state, ones())
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_a_rate_for_muon_s_other_parameters_follows_the_schedule():
    own = config("muon", optimizer_args={"adam_learning_rate": 0.01, "nesterov": False}, weight_decay=0)
    updates = first_update(build_optimizer(own, layouts(), lambda step: 0.2), grad=1.0)  # twice the peak of 0.1
    assert updates["embed/table"] == updates["layers/norm/scale"] == pytest.approx(-0.02, rel=1e-4)


def test_groups_have_rates_and_weight_decay_of_their_own():
    groups = [
        {"match": "layers/*/attention/*", "lr_mult": 0.5, "weight_decay": 1.0},
        {"match": "*", "weight_decay": 0.0},
    ]
    updates = first_update(build_optimizer(config("sgd", groups=[{**groups[0], "weight_decay": None}]), layouts()), 1.0)
    assert {key for key, update in updates.items() if update == pytest.approx(-0.05)} == {
        "layers/attention/query", "layers/attention/query_bias"
    }  # fmt: skip
    updates = first_update(build_optimizer(config(groups=groups, weight_decay=9.0), layouts()))
    assert {key: update for key, update in updates.items() if update} == {
        "layers/attention/query": pytest.approx(-0.05)
    }


def test_the_average_of_the_weights():
    optimizer = with_ema(optax.sgd(0.1), 0.75)
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.full(3, 2.0)}
    state, expected = optimizer.init(params), 1.0
    for _ in range(3):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected = 0.75 * expected + 0.25 * float(params["w"][0])
    np.testing.assert_allclose(ema_params(state)["w"], expected, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"actor\.optim\.ema_decay: not given"):
        ema_params(optax.sgd(0.1).init(params))


# --- the state --------------------------------------------------------------------------------------------------------


def test_a_state_lies_like_the_dimensions_that_it_has():
    layout = ParamLayout("w", (2, 4, 8), (None, "embed", "mlp"), P(), P("pp", None, ("tp", "dp")), None, None, None)
    shapes = {
        "v": (2, 4, 8),
        "row": (2, 4),
        "column": (2, 8),
        "last": (8,),
        "history": (5, 2, 4, 8),
        "other": (3,),
        "one": (),
    }
    state = {name: {"w": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}
    specs = opt_state_specs({**state, "count": jax.ShapeDtypeStruct((), jnp.int32)}, {"w": layout})
    assert specs == {
        "v": {"w": P("pp", None, ("tp", "dp"))},
        "row": {"w": P("pp", None)},
        "column": {"w": P("pp", ("tp", "dp"))},
        "last": {"w": P(("tp", "dp"))},
        "history": {"w": P(None, "pp", None, ("tp", "dp"))},
        "other": {"w": P()},
        "one": {"w": P()},
        "count": P(),
    }


def test_a_state_that_lies_whole_is_said_to():
    model = {**SETTINGS["actor"]["model"], "hidden_size": 256, "intermediate_size": 512}
    own = config_from_dict({**SETTINGS, "actor": {**SETTINGS["actor"], "global_batch_size": 2, "model": model}})
    (warning,) = Blueprint(own, 2, optimizer=optax.flatten(optax.adam(1e-3))).training_warnings
    assert re.fullmatch(r"optimizer: 6 MiB of its state lie whole on every device: the shapes are not .*", warning)
    assert Blueprint(own, 2, optimizer=optax.adafactor(1e-3)).training_warnings == []


def test_parameters_without_a_gradient_have_no_state():
    """Their leaves are None in the trees that the optimizer sees; the layouts have them all."""
    some = {"embed": {"table": None}, "layers": ones()["layers"]}
    for name in ("adamw", "muon", "lion", "adafactor"):
        optimizer = with_ema(build_optimizer(config(name, groups=[{"match": "embed/*", "lr_mult": 2}]), layouts()), 0.9)
        state = jax.eval_shape(optimizer.init, some)
        specs = opt_state_specs(state, layouts())
        assert jax.tree.structure(specs) == jax.tree.structure(state)
        assert not any("table" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
        updates, _ = jax.eval_shape(lambda x, o=optimizer: o.update(x, o.init(x), x), some)
        assert jax.tree.structure(updates) == jax.tree.structure(some)


@pytest.mark.parametrize("learning_rate", [None, lambda step: 0.5 + step])
def test_a_step_with_an_optimizer_without_a_count_and_a_step_that_is_skipped(learning_rate):
    optimizer = optax.chain(optax.trace(0.9), optax.scale(-0.1))
    step = jax.jit(build_train_step(lambda params, batch, *_: (batch["loss"], {}, params), optimizer, learning_rate))
    params = {"w": jnp.ones(2)}
    state = {
        "step": jnp.int32(0),
        "params": params,
        "opt_state": optimizer.init(params),
        "rng": jnp.zeros(2, jnp.uint32),
    }
    for number, loss in enumerate((1.0, np.nan, 1.0)):
        before = state
        state, metrics = step(state, {"loss": jnp.float32(loss), "loss_mask": jnp.ones(1)})
        assert metrics["skipped"] == np.isnan(loss) and state["step"] == number + 1
        assert ("learning_rate" in metrics) == (learning_rate is not None)
        assert learning_rate is None or metrics["learning_rate"] == 0.5 + number
        same = jax.tree.map(
            lambda x, y: bool((x == y).all()), *[(s["params"], s["opt_state"]) for s in (state, before)]
        )
        assert all(jax.tree.leaves(same)) == np.isnan(loss)


def test_an_optimizer_that_asks_for_the_loss_gets_it():
    optimizer = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    step = build_train_step(lambda params, batch, *_: (jnp.float32(1.0), {}, params), optimizer, None)
    params = {"w": jnp.ones(2)}
    state = {
        "step": jnp.int32(0),
        "params": params,
        "opt_state": optimizer.init(params),
        "rng": jnp.zeros(2, jnp.uint32),
    }
    for _ in range(4):
        state, _ = step(state, {"loss_mask": jnp.ones(1)})
    assert state["opt_state"][-1].scale < 1


# --- errors and notes -------------------------------------------------------------------------------------------------

MISTAKES = {
    "name": (
        config("lionn"),
        "actor.optim.optimizer: lionn is not an optimizer of optax (did you mean lion?): choose one of acprop, ",
    ),
    "not supported": (
        config("sophia"),
        "actor.optim.optimizer: sophia is not supported: its estimate of the Hessian needs the loss as a function",
    ),
    "argument": (
        config("lion", optimizer_args={"bb1": 0.9}),
        "actor.optim.optimizer_args.bb1: lion has no such argument (did you mean b1?): it has b1, b2, mu_dtype",
    ),
    "argument with a setting": (
        config("muon", optimizer_args={"adam_b1": 0.9}),
        "actor.optim.optimizer_args.adam_b1: actor.optim.adam_beta1 gives it: set that",
    ),
    "argument of jaxpar's": (
        config("lion", optimizer_args={"mask": True}),
        "actor.optim.optimizer_args.mask: jaxpar gives it, from the names of dimensions: remove it",
    ),
    "missing argument": (
        config("dpsgd", optimizer_args={"seed": 0}),
        "actor.optim.optimizer_args: dpsgd needs l2_norm_clip, noise_multiplier: give them",
    ),
    "pattern": (
        config(groups=[{"match": "layers/3/*"}]),
        "actor.optim.groups[0].match: layers/3/*: matches no parameter: the parameters are embed/table, ",
    ),
    "second pattern": (
        config(groups=[{"match": "layers/*"}, {"match": "*/mlp/*"}]),
        "actor.optim.groups[1].match: */mlp/*: earlier groups have all that it matches: the parameters are ",
    ),
    "decay of norms": (
        config(groups=[{"match": "*/scale", "weight_decay": 0.5}]),
        "actor.optim.groups[0].weight_decay: 0.5, but it matches biases and norms only, which have none: set 0",
    ),
    "decay of an optimizer without": (
        config("sgd", groups=[{"match": "*", "weight_decay": 0.5}]),
        "actor.optim.groups[0].weight_decay: 0.5, but sgd has no weight decay: remove it",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    own, expected = MISTAKES[case]
    with pytest.raises(ConfigError) as error:
        build_optimizer(own, layouts())
    assert str(error.value).startswith(expected)


def notes(own, **kwargs):
    return list(unused_settings(own, **{"own_optimizer": False, "own_rate": False, **kwargs}))


def test_settings_without_effect_are_noted():
    assert notes(config(adam_beta1=0.9, weight_decay=0.1)) == notes(config("muon", adam_beta1=0.9)) == []
    assert notes(config("sgd", adam_beta1=0.9, weight_decay=0.1)) == [
        "actor.optim: adam_beta1, weight_decay: no effect with optimizer sgd; in optimizer_args, it takes momentum, nesterov, "
        "accumulator_dtype"
    ]
    assert notes(config(), own_optimizer=True, own_rate=True) == [
        "actor.optim: clip_grad, lr, optimizer: no effect with Trainer(…, optimizer=…)"
    ]
    assert notes(config(), own_rate=True) == ["actor.optim.lr has no effect with Trainer(…, learning_rate=…)"]
    assert "applies it to biases and norms too" in notes(config("novograd"))[0]


def test_an_optimizer_of_one_s_own():
    own = config_from_dict(SETTINGS)
    with pytest.raises(ConfigError, match=r"actor\.optim\.lr: not given"):
        Blueprint(own, 1).check()
    lion = optax.lion(1e-3)
    blueprint = Blueprint(own, 1, optimizer=lion)
    blueprint.check()
    assert blueprint.optimizer is lion and blueprint.learning_rate is None and blueprint.training_warnings == []
    rate = optax.constant_schedule(0.5)
    blueprint = Blueprint(own, 1, learning_rate=rate)
    blueprint.check()
    assert blueprint.learning_rate is rate
    with pytest.raises(ConfigError, match="learning_rate: an optimizer that is given has its own: give one of the two"):
        Blueprint(own, 1, optimizer=lion, learning_rate=rate).check()
    broken = optax.GradientTransformation(lion.init, lambda grads, state, params: (grads["nothing"], state))
    with pytest.raises(ConfigError, match=r"optimizer: update\(gradients, state, params, value=loss\) fails: KeyError"):
        Blueprint(own, 1, optimizer=broken).check()
