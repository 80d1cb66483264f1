"""The actor of reinforcement learning on real meshes."""

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from support import relative_error

import jaxpar
from jaxpar.examples import grpo
from jaxpar.models.hugging_face import save_params

RNG = np.random.default_rng(1)


def config_of(model=None, algorithm=None, runner=None, **actor):
    base = grpo.CONFIG
    return jaxpar.config_from_dict(
        {
            **base,
            "runner": {**base["runner"], **(runner or {})},
            "algorithm": {**base["algorithm"], "n_minibatches": 1, **(algorithm or {})},
            "actor": {**base["actor"], **actor, "model": {**base["actor"]["model"], **(model or {})}},
        }
    )


def make_rollouts(count=32, **more):
    lengths = RNG.integers(2, 13, count)
    return [
        jaxpar.Rollout(RNG.integers(0, 16, 4 + n), 4, float(RNG.normal()), **{k: f(n) for k, f in more.items()})
        for n in lengths
    ]


ONE_DEVICE = {"pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 1}
ALL_AXES = {"context_parallel_size": 2, "sequence_parallel": True}  # beside pp 2, tp 2


@pytest.mark.slow
def test_reward_rises_and_two_layouts_agree(capsys):
    """One in four by chance. Sampling, log-probabilities, advantages and steps on pp2·tp2·dp2, and on cp2·sp2·dp2."""
    rewards, losses = grpo.train(7)
    assert rewards[0] < 0.35 and max(rewards) > 0.5
    other, other_losses = grpo.train(2, {**ALL_AXES, "pipeline_model_parallel_size": 1})
    assert other == rewards[:2]  # the same tokens were sampled
    np.testing.assert_allclose(other_losses, losses[:4], atol=1e-5)  # of terms of about 1, whose sum is about 0


@pytest.mark.slow
def test_packed_rollouts_are_those_in_rows_of_their_own():
    """Dynamic batches on dp2·pp2·cp2: other rows, the same log-probabilities, loss and parameters."""
    rollouts = make_rollouts()
    optimizer = optax.sgd(
        0.1
    )  # Adam's first step divides each gradient by its size, and so shows the rounding of those near 0
    alone = jaxpar.Trainer(config_of(), optimizer=optimizer)
    layout = {"tensor_model_parallel_size": 1, "context_parallel_size": 2}
    dynamic = {"enable_dynamic_batch_size": True, "max_tokens_per_mbs": 16}
    packed = jaxpar.Trainer(config_of(layout, runner=dynamic), optimizer=optimizer)
    ((metrics, (step,)), (of_packed, (packed_step,))) = [jaxpar.Actor(t).train(rollouts) for t in (alone, packed)]
    assert metrics == pytest.approx(of_packed, rel=1e-6) and metrics["rollout/prompt_length"] == 4
    assert step == pytest.approx(packed_step, rel=1e-5, abs=1e-6)
    assert step["actor/ratio_abs"] < 1e-5 and step["tokens"] == sum(r.answer_length for r in rollouts)
    for a, b in zip(*(jax.tree.leaves(t.state["params"]) for t in (alone, packed)), strict=True):
        assert relative_error(a, b) < 1e-5


def test_reference_and_minibatches():
    """Two minibatches: the second step's ratio is no longer 1, and the reference stays what the weights were."""
    trainer = jaxpar.Trainer(config_of(algorithm={"n_minibatches": 2, "shuffle_rollout": True}))
    actor = jaxpar.Actor(trainer)
    before = jax.tree.map(np.asarray, trainer.state["params"])
    _, (first, second) = actor.train(make_rollouts(64))
    assert first["actor/kl_loss"] == pytest.approx(0, abs=1e-6) and second["actor/kl_loss"] > 1e-4
    assert first["actor/ratio_abs"] < 1e-5 < 1e-3 < second["actor/ratio_abs"]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, actor.reference), before)
    assert jax.tree.leaves(actor.reference)[0].sharding == jax.tree.leaves(trainer.state["params"])[0].sharding


def test_given_weights_that_are_gone_are_no_reference(tmp_path):
    """fit gives up a second copy of the weights. What would be left is random numbers."""
    config = config_of(runner={"output_dir": str(tmp_path), "max_steps": 1})
    params = jax.tree.map(np.asarray, jaxpar.Trainer(config).state["params"])
    trainer = jaxpar.Trainer(config, params=params, objective=lambda tokens, batch: -tokens.log_probs)
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b), trainer.reference_params(), params)
    assert all(jax.tree.leaves(equal))
    tokens = np.ones((32, 16), int)
    trainer.fit([{"tokens": tokens, "targets": tokens}])
    with pytest.raises(jaxpar.ConfigError, match="reference_params: the weights that were given are gone"):
        trainer.reference_params()


def test_log_probs_of_the_engine():
    trainer = jaxpar.Trainer(config_of(algorithm={"recompute_logprobs": False, "kl_beta": 0.0}))
    actor = jaxpar.Actor(trainer)
    assert actor.reference is None
    with pytest.raises(jaxpar.ConfigError, match="number 0 has no log_probs: .*recompute_logprobs: True"):
        actor.train(make_rollouts())
    with pytest.raises(jaxpar.ConfigError, match="rollouts: 31, expected .* = 1 \\* 32 = 32"):
        actor.train(make_rollouts(31))
    _, (step,) = actor.train(make_rollouts(log_probs=lambda n: np.full(n, -20.0)))
    assert step["actor/ratio"] > 1e3


def test_buckets_have_what_a_hugging_face_folder_has(tmp_path):
    trainer = jaxpar.Trainer(config_of(ALL_AXES))
    buckets = list(trainer.export_params("float32", bucket_bytes=20_000))
    found = {name: np.asarray(x) for bucket in buckets for name, x in bucket.items()}
    save_params(tmp_path, trainer.state["params"], trainer.program.blueprint.architecture, "float32")
    stored = load_file(tmp_path / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(found[name], array)
    assert len(buckets) > 2 and all(sum(x.nbytes for x in b.values()) <= 20_000 for b in buckets)
    assert all(x.is_fully_replicated for x in buckets[0].values())


def test_a_batch_with_fewer_rows():
    dynamic = {"enable_dynamic_batch_size": True, "max_tokens_per_mbs": 16}
    trainer = jaxpar.Trainer(config_of(runner=dynamic))
    tokens = np.ones((6, 16), int)
    assert trainer.log_probs({"tokens": tokens, "targets": tokens}).shape == (6, 16)
    with pytest.raises(ValueError, match="tokens is \\(5, 16\\).*or fewer rows, a multiple of dp: 2"):
        trainer.log_probs({"tokens": tokens[:5], "targets": tokens[:5]})


def test_an_actor_needs_its_loss():
    with pytest.raises(jaxpar.ConfigError, match="loss_type: sft, but an actor trains with loss_type: actor"):
        jaxpar.Actor(jaxpar.Trainer(config_of(algorithm={"loss_type": "sft"})))
