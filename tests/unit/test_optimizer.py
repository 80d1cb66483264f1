"""Learning rate, weight decay and clipping; an optimizer step is the same on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import DECODER, GLOBAL_BATCH, QUICK, SEQ, Step, decoder_case, make_batch, relative_error

from jaxpar.config import config_from_dict
from jaxpar.models import Decoder, FunctionalModel
from jaxpar.parallel.batch import BatchLayout
from jaxpar.step.optimizer import build_optimizer, learning_rate_schedule
from jaxpar.step.train_step import build_train_step, init_state, state_shardings


def config(max_steps=100, lr=1e-3, sched=(), **optim):
    return config_from_dict(
        {"runner": {"max_steps": max_steps}, "actor": {"optim": {"lr": lr, **optim}, "lr_sched": dict(sched)}}
    )


def rates(steps, **sched):
    schedule = learning_rate_schedule(config(sched=sched))
    return [float(schedule(step)) for step in steps]


def test_constant():
    assert rates([0, 50, 100, 1000], lr_decay_style="constant") == pytest.approx([1e-3] * 4)


def test_warm_up_is_linear():
    found = rates([0, 1, 5, 9, 10, 11], lr_decay_style="constant", lr_warmup_iters=10)
    assert found == pytest.approx([0, 1e-4, 5e-4, 9e-4, 1e-3, 1e-3])
    found = rates([0, 5, 10], lr_decay_style="constant", lr_warmup_iters=10, lr_warmup_init=2e-4)
    assert found == pytest.approx([2e-4, 6e-4, 1e-3])


def test_linear():
    found = rates([0, 10, 55, 100, 200], lr_decay_style="linear", lr_warmup_iters=10, min_lr=1e-4)
    assert found == pytest.approx([0, 1e-3, 5.5e-4, 1e-4, 1e-4])


def test_cosine():
    found = rates([0, 10, 32.5, 55, 100, 200], lr_decay_style="cosine", lr_warmup_iters=10, min_lr=1e-4)
    quarter = 1e-4 + 9e-4 * (1 + np.cos(np.pi / 4)) / 2
    assert found == pytest.approx([0, 1e-3, quarter, 5.5e-4, 1e-4, 1e-4])


def test_the_decay_ends_at_lr_decay_iters():
    found = rates([20, 40, 41, 99], lr_decay_style="linear", lr_decay_iters=40)
    assert found == pytest.approx([5e-4, 0, 0, 0])


def test_warm_up_as_a_fraction_of_the_decay():
    found = rates([0, 4, 8], lr_decay_style="constant", lr_warmup_fraction=0.2, lr_decay_iters=40)
    assert found == pytest.approx([0, 5e-4, 1e-3])


# --- one step ---------------------------------------------------------------------------------------------------------


def decoder():
    model = FunctionalModel(Decoder(DECODER))
    return model, Step(model, (1, 1, 1, 1, 1), num_microbatches=1).layouts


def test_weight_decay_leaves_out_biases_and_norm_scales():
    model, layouts = decoder()
    optimizer = build_optimizer(config(weight_decay=0.5), layouts)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), model.shapes)
    advance = lambda params: optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)  # noqa: E731
    updates, _ = jax.jit(advance, compiler_options=QUICK)(params)
    decayed, kept = set(), set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert len(np.unique(update)) == 1
        (kept if float(update.max()) == 0 else decayed).add(jax.tree_util.keystr(path[-1:], simple=True))
        assert float(update.max()) == pytest.approx(0, abs=1e-12) or float(update.max()) == pytest.approx(-1e-3 * 0.5)
    assert decayed == {"table", "weight", "query", "key", "value", "output", "gate", "up", "down"}
    assert kept == {"scale", "query_bias", "key_bias", "value_bias"}


def test_adam_s_first_steps():
    """Kingma and Ba, 2015, algorithm 1, plus the weight decay of AdamW."""
    _, layouts = decoder()
    layout = layouts["head"]["weight"]
    settings = dict(adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-3, weight_decay=0.1, clip_grad=0)
    optimizer = build_optimizer(config(**settings), {"w": layout})
    w, rng = np.array([[1.0, -2.0], [0.5, 0.0]]), np.random.default_rng(0)
    params, (m, v) = {"w": jnp.asarray(w, jnp.float32)}, (0.0, 0.0)
    state = optimizer.init(params)
    for step in range(1, 4):
        g = rng.normal(size=w.shape)
        updates, state = optimizer.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        w = w - 1e-3 * (m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-3) + 0.1 * w)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5, atol=1e-8)


@functools.cache
def train(sizes, num_steps=2, **optim):
    """Metrics of each step, and the parameters after the last step, all in numpy."""
    case = decoder_case(DECODER)
    step = Step(case.model, sizes)
    # A large epsilon. Otherwise Adam's first step is ±lr for any gradient, and clipping would have no visible effect.
    settings = config(adam_eps=0.1, lr=0.05, sched={"lr_decay_style": "linear"}, **optim)
    optimizer = build_optimizer(settings, step.layouts)
    _, shardings = state_shardings(case.model, optimizer, step.layouts, step.mesh)

    def loss_auxiliary_and_grads(params, batch, *_):
        loss, grads = step.function(params, batch)
        return loss, {}, grads

    advance = jax.jit(
        build_train_step(loss_auxiliary_and_grads, optimizer, learning_rate_schedule(settings)),
        out_shardings=(shardings, None),
        compiler_options=QUICK,
    )
    state = jax.jit(lambda: init_state(case.model, optimizer, 0), out_shardings=shardings, compiler_options=QUICK)()
    state = {**state, "params": jax.device_put(case.params, step.shardings)}
    batch, metrics = BatchLayout(GLOBAL_BATCH, SEQ, step.mesh).put_on_mesh(make_batch()), []
    for _ in range(num_steps):
        state, found = advance(state, batch)
        metrics.append({name: float(value) for name, value in found.items()})
    assert int(state["step"]) == num_steps
    return metrics, jax.device_get(state["params"]), state


@pytest.fixture(scope="module")
def on_one_device():
    return train((1, 1, 1, 1, 1), clip_grad=0.5)


def test_metrics_of_a_step(on_one_device):
    (first, second), params, _ = on_one_device
    case = decoder_case(DECODER)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(case.grads)))
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.5  # before clipping
    assert first["loss"] == pytest.approx(float(case.loss), rel=1e-5) and second["loss"] < first["loss"]
    assert first["tokens"] == case.batch["loss_mask"].sum()
    assert first["learning_rate"] == pytest.approx(0.05) and second["learning_rate"] == pytest.approx(0.05 * 0.99)


def test_clipping_scales_by_the_global_norm(on_one_device):
    """The update of the step is computed again from the gradients of the reference."""
    _, params, _ = train((1, 1, 1, 1, 1), num_steps=1, clip_grad=0.5, weight_decay=0.0)
    case = decoder_case(DECODER)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(case.grads)))
    for after, before, grad in zip(*map(jax.tree.leaves, (params, case.params, case.grads)), strict=True):
        clipped = grad * (0.5 / norm)
        expected = before - 0.05 * clipped / (np.abs(clipped) + 0.1)
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2, 1), (2, 1, 2, 1, 2)])
def test_steps_on_eight_devices_are_those_on_one(on_one_device, sizes):
    metrics, params, state = train(sizes, clip_grad=0.5)
    for found, expected in zip(metrics, on_one_device[0], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(on_one_device[1]), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_moments_lie_like_their_parameters():
    *_, state = train((2, 2, 1, 2, 1), clip_grad=0.5)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(state["params"])]
    (adam,) = [s for s in jax.tree.leaves(state["opt_state"], is_leaf=_is_adam) if _is_adam(s)]
    for moments in (adam.mu, adam.nu):
        assert [leaf.sharding for leaf in jax.tree.leaves(moments)] == shardings
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(moments))
    shard_sizes = [leaf.addressable_shards[0].data.size * 16 // leaf.size for leaf in jax.tree.leaves(adam.mu)]
    assert min(shard_sizes) == 2 and sum(size == 2 for size in shard_sizes) > len(shard_sizes) / 2


def _is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)
