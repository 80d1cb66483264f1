"""Every shipped objective, and users' own, against plain JAX written from the equations: loss, metrics and every gradient."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    DECODER,
    QUICK,
    ROOT,
    VOCAB,
    Step,
    assert_parity,
    make_batch,
    random_params,
    readme_example,
    reference_attention,
    relative_error,
    slow,
)
from user_models import GPT

import jaxpar
from jaxpar.config import ConfigError
from jaxpar.models import Decoder, FunctionalModel, TokenInfo
from jaxpar.models import decoder as decoder_module
from jaxpar.objectives import (
    Asked,
    Targets,
    as_objective,
    check_independence,
    check_objective,
    losses_and_metrics,
    token_statistics,
    weights_and_counts,
)
from jaxpar.objectives.actor import actor
from jaxpar.objectives.cross_entropy import cross_entropy
from jaxpar.objectives.distillation import distillation
from jaxpar.objectives.dpo import dpo
from jaxpar.objectives.fine_tuning import fine_tuning
from jaxpar.parallel.batch import BatchLayout, number_documents
from jaxpar.pipeline.loss import Loss
from jaxpar.step import build_loss_metrics_and_grads, build_statistics, loss_and_grads

ALL_AXES, ONE = (2, 2, 1, 2, 2), (1, 1, 1, 1, 1)
K = 4  # tokens of the teacher


@functools.cache
def full_batch() -> dict[str, np.ndarray]:
    """With what any objective takes besides. Pairs of documents that have trained tokens in both."""
    rng, batch = np.random.default_rng(11), dict(make_batch())
    shape = batch["tokens"].shape
    batch["completion_mask"] = (rng.random(shape) < 0.7).astype(np.float32)
    for name in ("old_log_probs", "ref_log_probs"):
        batch[name] = (-4 + rng.normal(size=shape)).astype(np.float32)
    batch["advantages"] = rng.normal(size=shape).astype(np.float32)
    batch["teacher_tokens"] = np.argsort(rng.random((*shape, VOCAB)), -1)[..., :K].astype(np.int32)
    batch["teacher_log_probs"] = np.log(rng.dirichlet(np.full(K + 1, 3), shape)[..., :K]).astype(np.float32)
    return batch


def plain_prompt_loss(logits: Any, batch: Any) -> Any:
    mask = batch["loss_mask"] * (1 - batch["completion_mask"])
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    return (losses * mask).sum() / mask.sum()


def by_document(batch: Any, values: Any) -> Any:
    """[row, document, token]: the values of each document, and 0 elsewhere."""
    ids = number_documents(np.asarray(batch["segment_ids"]))
    return jnp.where(ids[:, None, :] == np.arange(ids.max() + 1)[:, None], values[:, None, :], 0)


def plain_cross_entropy(logits: Any, batch: Any) -> Any:
    log_probs, mask = jax.nn.log_softmax(logits), batch["loss_mask"]
    at_target = jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    smooth = -0.9 * at_target - 0.1 * log_probs.mean(-1)
    return ((smooth + 1e-2 * jax.nn.logsumexp(logits, -1) ** 2) * mask).sum() / mask.sum()


def plain_fine_tuning(logits: Any, batch: Any) -> Any:
    mask = batch["loss_mask"] * batch["completion_mask"]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    sums, sizes = by_document(batch, losses * mask).sum(-1), by_document(batch, mask).sum(-1)
    return (sums / jnp.maximum(sizes, 1)).sum() / (sizes > 0).sum()


def plain_dpo(logits: Any, batch: Any) -> Any:
    mask = batch["loss_mask"] * batch["completion_mask"]
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    scores = by_document(batch, (log_probs - batch["ref_log_probs"]) * mask).sum(-1)
    sizes = by_document(batch, mask).sum(-1)
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2)))  # noqa: E731
    scores, sizes = even(scores), even(sizes)
    losses = jnp.log1p(jnp.exp(-0.3 * (scores[:, ::2] - scores[:, 1::2])))
    there = sizes[:, ::2] + sizes[:, 1::2] > 0
    return jnp.where(there, losses, 0).sum() / there.sum()


def plain_distillation(logits: Any, batch: Any) -> Any:
    log_p = jax.nn.log_softmax(logits / 2)
    q, p = batch["teacher_log_probs"], jnp.take_along_axis(log_p, batch["teacher_tokens"], -1)
    rest_q, rest_p = 1 - jnp.exp(q).sum(-1), 1 - jnp.exp(p).sum(-1)
    kl = (jnp.exp(q) * (q - p)).sum(-1) + rest_q * jnp.log(rest_q / rest_p)
    at_target = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    return ((0.75 * kl - 0.25 * at_target) * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


def plain_actor(logits: Any, batch: Any) -> Any:
    mask, a = batch["loss_mask"], batch["advantages"]
    log_p = jax.nn.log_softmax(logits / 1.5)
    at_target = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    r = jnp.exp(jnp.clip(at_target - batch["old_log_probs"], -2, 1.2))
    policy = jnp.maximum(-a * r, -a * jnp.clip(r, 0.8, 1.3))
    policy = jnp.minimum(policy, 3.0 * jnp.abs(a))
    kl = jnp.exp(batch["ref_log_probs"] - at_target) - (batch["ref_log_probs"] - at_target) - 1
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    losses = policy + 0.05 * jnp.clip(kl, -10, 10) - 0.02 * entropy
    sums, sizes = by_document(batch, losses * mask).sum(-1), by_document(batch, mask).sum(-1)
    return sums.sum() / (sizes > 0).sum()


def own(tokens: jaxpar.TokenStatistics, batch: Any) -> Any:
    """A loss of a user: each token's, times a weight that depends on all tokens before it in the row."""
    before = jnp.cumsum(tokens.log_probs * batch["loss_mask"], 1)
    return -tokens.log_probs * jax.nn.sigmoid(before / 50), {"deepest": jaxpar.Max(-before), "all": jaxpar.Sum(-before)}


def plain_own(logits: Any, batch: Any) -> Any:
    at_target = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    before = jnp.cumsum(at_target * batch["loss_mask"], 1)
    return (-at_target * jax.nn.sigmoid(before / 50) * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


OBJECTIVES = {
    "cross_entropy": (cross_entropy(1e-2, 0.1), plain_cross_entropy),
    "sft": (fine_tuning("seq-mean-token-mean"), plain_fine_tuning),
    "dpo": (dpo(0.3), plain_dpo),
    "distillation": (distillation(K, 0.75, 2.0), plain_distillation),
    "actor": (
        actor(
            clip_ratio_high=0.3, clip_ratio_c=3.0, clip_log_ratio_min=-2, clip_log_ratio_max=1.2, kl_beta=0.05,
            calculate_entropy=True, entropy_bonus=0.02, loss_agg_func="seq-mean-token-sum", temperature=1.5,
        ),
        plain_actor,
    ),
    "own": (jaxpar.Objective(own, whole_rows=True), plain_own),
}  # fmt: skip


@functools.cache
def decoder() -> tuple[FunctionalModel, Any]:
    model = FunctionalModel(Decoder(DECODER))
    return model, random_params(model)


def plain_logits(model: FunctionalModel, params: Any, batch: Any, vocab: int | None = VOCAB) -> jax.Array:
    info = TokenInfo(batch["positions"], batch["segment_ids"])
    x = model.embed(params, batch["tokens"], info)
    for index in range(model.num_layers):
        x = model.block(jax.tree.map(lambda p, i=index: p[i], params["layers"]), x, info)
    return model.head(params, x)[..., :vocab]


@functools.cache
def expected(name: str) -> Any:
    model, params = decoder()
    with mock.patch.object(decoder_module, "attention", reference_attention):
        function = jax.value_and_grad(
            lambda params: OBJECTIVES[name][1](plain_logits(model, params, full_batch()), full_batch())
        )
        return jax.tree.map(np.asarray, jax.jit(function, compiler_options=QUICK)(params))


def loss_of(objective: Any, model: FunctionalModel) -> Loss:
    return Loss(objective, check_objective(objective, set(), model.outputs))


def run(objective: Any, sizes: tuple[int, ...], case: Any = None, batch: Any = None, **options: Any) -> Any:
    """(loss, metrics, grads) on a mesh."""
    model, params = case or decoder()
    step = Step(model, sizes, loss=loss_of(objective, model), **options)
    batch = batch or full_batch()
    layout = BatchLayout(*batch["tokens"].shape, step.mesh, inputs=objective.inputs)
    needed = {key: batch[key] for key in [*make_batch(), *objective.inputs]}
    function = jax.jit(build_loss_metrics_and_grads(step.setup), compiler_options=QUICK)
    placed = jax.device_put(params, step.shardings), layout.put_on_mesh(needed)
    return jax.tree.map(np.asarray, function(*placed))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_the_logits(name):
    objective, plain = OBJECTIVES[name]
    batch = full_batch()
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(*batch["tokens"].shape, VOCAB)), jnp.float32)
    of = Targets(batch["targets"], batch[objective.candidates] if objective.candidates else None)
    numbered = {**batch, "segment_ids": number_documents(batch["segment_ids"])}
    weights, counts = weights_and_counts(objective, numbered)

    def loss(logits: jax.Array) -> jax.Array:
        statistics = token_statistics(logits, jnp.arange(VOCAB), of, objective.asked)
        losses, _ = losses_and_metrics(objective, statistics, numbered)
        return (losses * weights).sum() / counts.sum()

    found = jax.jit(jax.value_and_grad(loss))(logits)
    wanted = jax.jit(jax.value_and_grad(lambda logits: plain(logits, batch)))(logits)
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_device(name):
    """The equations in float32 are themselves up to 2e-6 away from float64, and single layers more, so the gradients of parameters
    are not asked to be nearer than that. Those of the logits are, above."""
    loss, _, grads = run(OBJECTIVES[name][0], ONE, num_microbatches=1)
    expected_loss, expected_grads = expected(name)
    assert relative_error(loss, expected_loss) < 1e-6
    assert_parity(loss, grads, expected_loss, expected_grads, tolerance=5e-6)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cross_entropy", "whole"),
        ("sft", "whole"),
        ("dpo", "parts of the tokens"),
        ("distillation", "parts of the vocabulary"),
        ("actor", "whole"),
        ("own", "parts of the tokens"),
        *slow(
            *((name, "parts of the tokens") for name in ("cross_entropy", "sft", "distillation", "actor")),
            *((name, "parts of the vocabulary") for name in ("cross_entropy", "sft", "dpo", "actor", "own")),
            *((name, "whole") for name in ("dpo", "distillation", "own")),
        ),
    ],
)
def test_all_axes(name, parts, monkeypatch):
    options: dict[str, Any] = {}
    if parts == "parts of the tokens":
        monkeypatch.setattr(loss_and_grads, "MAX_LOGITS_BYTES", 4096)
    if parts == "parts of the vocabulary":
        monkeypatch.setattr(loss_and_grads, "MAX_VOCABULARY_BYTES", 4096)
        options |= {"zero_stage": 3, "schedule": "zb1p"}
    loss, metrics, grads = run(OBJECTIVES[name][0], ALL_AXES, **options)
    assert_parity(loss, grads, *expected(name))
    alone = run(OBJECTIVES[name][0], ONE, num_microbatches=1)[1]
    assert metrics.keys() == alone.keys()
    for key, value in metrics.items():
        assert value == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(
    ("name", "logits_bytes", "stages"),
    [("dpo", 4096, 3), ("distillation", 2**29, 2), *slow(("actor", 4096, 2), ("own", 2**29, 3))],
)
def test_a_model_whose_tensor_collectives_xla_places(name, logits_bytes, stages, monkeypatch):
    """Its stages each compute the head for a share of the tokens."""
    monkeypatch.setattr(loss_and_grads, "MAX_LOGITS_BYTES", logits_bytes)
    model = FunctionalModel(GPT())
    objective, plain = OBJECTIVES[name]
    params = random_params(model)
    alone = FunctionalModel(GPT(reference_attention))
    function = jax.value_and_grad(lambda params: plain(plain_logits(alone, params, full_batch(), None), full_batch()))
    found = jax.tree.map(np.asarray, jax.jit(function, compiler_options=QUICK)(params))
    loss, _, grads = run(objective, (2, stages, 1, 1, 2), case=(model, params))
    assert_parity(loss, grads, *found)


def test_the_loss_of_prompts_is_reported():
    batch, (model, params) = full_batch(), decoder()
    metrics = run(fine_tuning(), ONE, num_microbatches=1)[1]
    with mock.patch.object(decoder_module, "attention", reference_attention):
        logits = plain_logits(model, params, batch)
    assert metrics["prompt_loss"] == pytest.approx(float(plain_prompt_loss(logits, batch)), rel=1e-5)
    assert metrics["completion_tokens"] == (batch["loss_mask"] * batch["completion_mask"]).sum()


def test_statistics_of_all_axes():
    model, params = decoder()
    step, batch = Step(model, ALL_AXES), full_batch()
    placed = (
        jax.device_put(params, step.shardings),
        BatchLayout(*batch["tokens"].shape, step.mesh).put_on_mesh(make_batch()),
    )
    found = jax.jit(build_statistics(step.setup, Asked(entropy=True, temperature=0.7)), compiler_options=QUICK)(*placed)
    with mock.patch.object(decoder_module, "attention", reference_attention):
        log_p = jax.nn.log_softmax(plain_logits(model, params, batch) / 0.7)
    assert relative_error(found.log_probs, jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]) < 1e-5
    assert relative_error(found.entropy, -(jnp.exp(log_p) * log_p).sum(-1)) < 1e-5


@pytest.mark.parametrize("sizes", [ALL_AXES, (2, 3, 1, 1, 2)], ids=str)
def test_metrics_are_reduced_as_declared(sizes):
    """16 tokens of a cp rank do not divide by three stages, each of which has the head compute a share of them."""
    batch = full_batch()
    model = decoder()[0] if sizes == ALL_AXES else FunctionalModel(GPT())
    params = random_params(model)

    def loss(tokens, batch):
        p = tokens.log_probs
        own = batch["advantages"] ** 2 + 1
        return -p, {"mean": p, "own": jaxpar.Mean(p, own), "sum": jaxpar.Sum(p), "max": jaxpar.Max(p)}

    inputs = {"advantages": jax.ShapeDtypeStruct((), np.float32)}
    _, metrics, _ = run(jaxpar.Objective(loss, inputs=inputs), sizes, case=(model, params))
    alone = model if sizes == ALL_AXES else FunctionalModel(GPT(reference_attention))
    with mock.patch.object(decoder_module, "attention", reference_attention):
        log_p = jax.nn.log_softmax(plain_logits(alone, params, batch, VOCAB if sizes == ALL_AXES else None))
    p = np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], -1)[..., 0]
    mask = batch["loss_mask"]
    own = (batch["advantages"] ** 2 + 1) * (mask > 0)
    wanted = {
        "mean": (p * mask).sum() / mask.sum(),
        "own": (p * own).sum() / own.sum(),
        "sum": p[mask > 0].sum(),
        "max": p[mask > 0].max(),
    }
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


LOGITS = jax.ShapeDtypeStruct((VOCAB,), np.float32)
ONE_NUMBER = jax.ShapeDtypeStruct((), np.float32)


@pytest.mark.parametrize(("objective", "message"), [
    (lambda tokens, batch: tokens.log_probs.mean(), "its losses have the shape \\[\\]"),
    (lambda tokens, batch: tokens.log_probs * batch["rewards"], "it reads batch\\['rewards'\\], which batches do not have"),
    (lambda tokens, batch: (tokens.log_probs, {"loss": tokens.log_probs}), "'loss' is the name of another metric"),
    (lambda tokens, batch: (tokens.log_probs, {"x": tokens.log_probs.sum()}), "the metric 'x' has the shape \\[\\]"),
    (lambda tokens, batch: tokens.log_probs.cumsum(1), "depends on other tokens of its row.*whole_rows=True"),
    (lambda tokens, batch: tokens.log_probs - tokens.log_probs.mean(0), "depends on another row"),
    (jaxpar.Objective(lambda tokens, batch: tokens.log_probs, inputs={"tokens": ONE_NUMBER}), "'tokens' is an array that every"),
    (jaxpar.Objective(lambda tokens, batch: tokens.log_probs, candidates="ids"), "'ids' is not among its inputs"),
    (3, "a int is no objective"),
])  # fmt: skip
def test_mistakes_are_one_line(objective, message):
    with pytest.raises(ConfigError, match=message):
        check_objective(as_objective(objective), {"loss"}, LOGITS)
        check_independence(as_objective(objective), LOGITS)


def test_outputs_as_they_are():
    """A regression: the model's outputs are no logits."""
    model = FunctionalModel(GPT())
    wanted = jax.ShapeDtypeStruct((model.vocab_size,), np.float32)
    objective = jaxpar.Objective(
        lambda outputs, batch: ((outputs - batch["wanted"]) ** 2).mean(-1), inputs={"wanted": wanted}, of_outputs=True
    )
    batch, params = dict(make_batch()), random_params(model)
    batch["wanted"] = (
        np.random.default_rng(2).normal(size=(*batch["tokens"].shape, model.vocab_size)).astype(np.float32)
    )

    def plain(params):
        outputs = plain_logits(FunctionalModel(GPT(reference_attention)), params, batch, None)
        return (((outputs - batch["wanted"]) ** 2).mean(-1) * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    expected = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(plain), compiler_options=QUICK)(params))
    loss, _, grads = run(objective, (2, 2, 1, 1, 2), case=(model, params), batch=batch)
    assert_parity(loss, grads, *expected)


def config_of(*overrides: str) -> jaxpar.Config:
    small = [
        "runner.seq_length=32",
        "actor.global_batch_size=16",
        "runner.resume_dir=null",
        "actor.model.num_hidden_layers=4",
    ]
    return jaxpar.load_config(ROOT / "configs/quickstart.yaml", [*small, *overrides])


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    """A batch for the quickstart's decoder: two documents of 16 tokens in each row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (16, 33))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.tile(np.repeat([3, 7], 16), (16, 1)),
        "positions": np.tile(np.arange(16), (16, 2)),
    }


@pytest.mark.slow
def test_dpo_from_yaml_prefers_the_preferred():
    trainer = jaxpar.Trainer(config_of("algorithm.loss_type=dpo", "algorithm.dpo_beta=0.5"))
    batch = rows()
    batch["completion_mask"] = (batch["positions"] >= 8).astype(np.float32)
    batch["ref_log_probs"] = np.asarray(trainer.log_probs(batch))
    metrics = [jax.device_get(trainer.train_step(batch)) for _ in range(6)]
    assert metrics[0]["loss"] == pytest.approx(np.log(2), rel=1e-5) and metrics[0]["dpo/margin"] == pytest.approx(
        0, abs=1e-4
    )
    assert metrics[-1]["loss"] < 0.6 and metrics[-1]["dpo/accuracy"] > 0.9
    lonely = {**batch, "completion_mask": batch["completion_mask"] * (batch["segment_ids"] == 3)}
    with pytest.raises(ValueError, match="row 0: document 0 of the row.*its partner 1 has none"):
        trainer.train_step(lonely)
    with pytest.raises(ValueError, match="nothing would be trained on"):
        trainer.train_step({**batch, "completion_mask": 0 * batch["completion_mask"]})
    with pytest.raises(ValueError, match="ref_log_probs missing"):
        trainer.train_step({key: x for key, x in batch.items() if key != "ref_log_probs"})


@pytest.mark.slow
def test_the_actor_from_yaml_follows_its_advantages():
    """A rise of the rewarded tokens' probability, none beyond the clip, and the check of the layout with this objective."""
    trainer = jaxpar.Trainer(
        config_of(
            "algorithm.loss_type=actor", "algorithm.calculate_entropy=true", "algorithm.sampling_params.temperature=0.8"
        )
    )
    batch = rows()
    found = trainer.statistics(batch, entropy=True)
    before, entropy = np.asarray(found.log_probs), np.asarray(found.entropy)
    batch |= {"old_log_probs": before, "advantages": np.where(batch["segment_ids"] == 3, 1.0, -1.0)}
    first = jax.device_get(trainer.train_step(batch))
    assert first["actor/ratio"] == pytest.approx(1, abs=1e-3) and first["actor/clip_fraction"] == 0
    assert first["actor/entropy_loss"] == pytest.approx(entropy.mean(), rel=1e-3)
    for _ in range(4):
        trainer.train_step(batch)
    gain = np.asarray(trainer.log_probs(batch)) - before
    assert gain[batch["segment_ids"] == 3].mean() > 0 > gain[batch["segment_ids"] == 7].mean()
    assert trainer.check().passed


def test_the_example_of_the_readme():
    names: dict[str, Any] = {"jaxpar": jaxpar, "jnp": jnp, "config": config_of()}
    exec(readme_example("def focal"), names)
    metrics = jax.device_get(names["trainer"].train_step(rows()))
    assert 0 < metrics["confidence"] < metrics["surest"] < 1


def test_a_config_whose_data_lack_what_the_objective_takes(tmp_path):
    trainer = jaxpar.Trainer(config_of("algorithm.loss_type=dpo", f"runner.output_dir={tmp_path}"))
    with pytest.raises(ConfigError, match="gives tokens, but the model or the objective also takes ref_log_probs"):
        trainer.fit()


@pytest.mark.parametrize(("overrides", "message"), [
    (["algorithm.loss_type=actor_critic"], "loss_type: actor_critic is not supported: choose one of cross_entropy"),
    (["algorithm.loss_type=actor", "algorithm.entropy_bonus=0.1"], "entropy_bonus: 0.1 has no effect while"),
    (["algorithm.kl_penalty_type=full"], "kl_penalty_type"),
])  # fmt: skip
def test_mistakes_in_yaml(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config_of(*overrides).prepare_train(16)


def test_settings_of_another_loss_are_noted():
    notes = config_of("algorithm.loss_type=sft", "algorithm.kl_beta=0.1", "algorithm.z_loss=0.1").notes
    assert "algorithm: kl_beta, z_loss have no effect with loss_type sft" in notes
    assert not any("no effect" in note for note in config_of().notes)


@pytest.mark.parametrize("build", [lambda: actor(kl_penalty_type="full"), lambda: fine_tuning("mean")])
def test_unknown_names_from_python(build):
    with pytest.raises(ConfigError, match="is unknown: choose one of"):
        build()
