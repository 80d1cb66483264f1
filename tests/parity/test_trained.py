"""Training a part of the parameters: the same gradients and steps as on one device, and nothing for the frozen ones."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import user_models
from flax import nnx
from runs import QUICKSTART, SMALL, fit, layout
from support import DECODER, Step, assert_parity, decoder_case, relative_error, slow

import jaxpar
from jaxpar.models import FunctionalModel
from jaxpar.models.trainable import trained_mask
from jaxpar.models.weights import named_params
from jaxpar.parallel.trained import partition

FP32 = ["actor.model.precision=fp32", "actor.lr_sched.lr_warmup_fraction=0"]
LORA = ["actor.model.is_lora=True", "actor.model.lora_rank=4", "actor.model.lora_alpha=8"]
HEAD = ["actor.optim.trainable=head/*"]


def trainer(*overrides: str, **options: object) -> jaxpar.Trainer:
    return jaxpar.Trainer(
        jaxpar.load_config(QUICKSTART, ["runner.resume_dir=null", *SMALL, *FP32, *overrides]), **options
    )


def batch(step: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(step).integers(0, 258, (16, 33))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def like(model: FunctionalModel, patterns: list[str]) -> tuple[object, object]:
    """(the mask, a tree with None at frozen parameters)."""
    mask = trained_mask(model, patterns, "test")
    return mask, jax.tree.map(lambda is_trained: is_trained or None, mask)


@pytest.mark.parametrize(
    ("sizes", "options", "patterns"),
    [
        ((2, 2, 1, 2, 2), dict(schedule="zb1p", zero_stage=3), ["layers/*/query", "*/norm/scale", "embed/*"]),
        *slow(
            ((2, 1, 2, 1, 1), dict(zero_stage=2), ["layers/mlp/down", "head/weight"]),
            ((1, 2, 2, 1, 2), dict(num_chunks=2, schedule="interleaved_1f1b"), ["layers/attention/*"]),
            ((2, 2, 2, 1, 1), dict(zero_stage=0), ["head/*"]),
            ((2, 1, 1, 2, 2), dict(zero_stage=3), ["head/norm/*"]),
        ),
    ],
)
def test_gradients_of_some_parameters(sizes, options, patterns):
    case = decoder_case(DECODER)
    mask, some = like(case.model, patterns)
    step = Step(case.model, sizes, trained=mask, **options)
    loss, grads = step(case.params, case.batch)
    assert jax.tree.structure(grads) == jax.tree.structure(some)
    assert_parity(loss, grads, case.loss, partition(case.grads, some)[0])


def products(step: Step) -> int:
    """Matrix products in the program's text, counted once in a loop."""
    return str(step.jaxpr).count("dot_general[")


def test_frozen_weights_have_no_products_of_their_own():
    model, sizes, options = decoder_case(DECODER).model, (1, 2, 1, 1, 1), dict(schedule="zb1p")
    matrices = 7  # of a layer: query, key, value, output, gate, up, down
    all_of_them = products(Step(model, sizes, **options))
    mask, _ = like(model, ["layers/*norm/scale", "head/*", "embed/*"])
    assert products(Step(model, sizes, trained=mask, **options)) == all_of_them - matrices
    # Nothing goes back through the layers if only the head is trained.
    head, _ = like(model, ["head/*"])
    names = [str(Step(model, sizes, trained=which, **options).jaxpr) for which in (mask, head)]
    assert names[1].count("dot_general[") < names[0].count("dot_general[") - 2 * matrices


@pytest.fixture(scope="module", params=["lora", "head"])
def one_device(request) -> tuple[list[str], np.ndarray, dict]:
    """Settings, and ten steps of one device: loss and norm of gradients of each, and the parameters."""
    settings = {"lora": LORA, "head": HEAD}[request.param]
    return settings, *ten_steps(trainer(*layout("one"), *settings))


def ten_steps(run: jaxpar.Trainer) -> tuple[np.ndarray, dict]:
    before = jax.tree.map(np.asarray, run.state["params"])
    metrics = [run.train_step(batch(step)) for step in range(10)]
    after = named_params(jax.tree.map(np.asarray, run.state["params"]))
    trained = named_params(partition(run.state["params"], run.state["opt_state"][1][0].mu)[0])
    for name, x in named_params(before).items():
        assert np.array_equal(x, after[name]) == (name not in trained), name
    return np.array([[float(m["loss"]), float(m["grad_norm"])] for m in metrics]), after


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("two", "actor.optim.zero_stage=3"),
        *slow(("all", "actor.optim.zero_stage=1"), ("pp4-tp2", "actor.model.pipeline_schedule=zb1p")),
    ],
)
def test_ten_steps_equal_one_device(one_device, where, more):
    settings, expected, expected_params = one_device
    found, params = ten_steps(trainer(*layout(where), more, *settings))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    errors = {name: relative_error(x, expected_params[name]) for name, x in params.items()}
    assert max(errors.values()) < 1e-5, errors


RESUME = ["runner.resume_dir=auto", "runner.save_interval=5", "actor.lr_sched.lr_decay_iters=10", *SMALL, *LORA]


@pytest.mark.parametrize("precision", ["bf16", *slow("fp32")])
def test_a_run_goes_on_on_another_layout(tmp_path, precision):
    """Five and five steps are ten steps. In bf16, frozen parameters are saved in bf16, and keep their bits."""
    run = [*RESUME, f"actor.model.precision={precision}"]
    first = fit(tmp_path, "runner.max_steps=5", *run, *layout("zero3"))
    kept = {name: np.asarray(x) for name, x in named_params(first.state["params"]).items()}
    manifest = json.loads((tmp_path / "quickstart/checkpoints/global_step_5/manifest.json").read_text())
    frozen = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    assert manifest["tree"]["params/layers/mlp/up"] == f"{frozen}[4,32,48]"
    assert manifest["tree"]["params/layers/mlp/lora/up/a"] == "float32[4,32,4]"
    moments = [name for name in manifest["tree"] if name.startswith("opt_state") and "/mu/" in name]
    assert moments and all("/lora/" in name for name in moments)
    second = fit(tmp_path, "runner.max_steps=10", *run, *layout("pp4-tp2"))
    params = named_params(second.state["params"])
    for name, x in kept.items():
        assert ("/lora/" in name) != np.array_equal(x, np.asarray(params[name])), name
    if precision == "fp32":
        whole = fit(tmp_path / "whole", "runner.max_steps=10", *run, *layout("zero3"))
        errors = {name: relative_error(params[name], x) for name, x in named_params(whole.state["params"]).items()}
        assert max(errors.values()) < 1e-5, errors


class LoraBlock(user_models.Block):
    """A user's block with adapters of nnx beside the MLP."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        named = lambda *dims: dict(out_sharding=dims)  # noqa: E731
        self.lora_up = nnx.LoRA(
            user_models.EMBED, 4, user_models.MLP, rngs=rngs, b_initializer=nnx.initializers.normal(0.1),
            a_metadata=named("embed", None), b_metadata=named(None, "mlp"),
        )  # fmt: skip

    def __call__(self, x, info):
        y = self.norm1(x)
        y = self.attention(self.query(y), self.key(y), self.value(y), segment_ids=info.segment_ids)
        x, y = x + self.out(y), self.norm2(x)
        return x + self.down(nnx.gelu(self.up(y) + self.lora_up(y)))


class LoraGPT(user_models.GPT):
    def block(self, rngs: nnx.Rngs):
        return LoraBlock(rngs)


def test_lora_of_nnx_in_a_users_model():
    results = []
    for where in ("one", "two"):
        run = trainer(*layout(where), model=LoraGPT(), trainable=nnx.LoRAParam)
        loss, grads = run.loss_and_grads({key: x % 256 for key, x in batch(0).items()})
        assert set(named_params(grads)) == {"layers/lora_up/lora_a", "layers/lora_up/lora_b"}
        results.append(jax.tree.map(np.asarray, (loss, grads)))
    assert_parity(*results[1], *results[0])


def test_merged_parameters_are_those_of_a_model_without_adapters(tmp_path):
    run, plain = trainer(*layout("dp4"), *LORA), trainer(*layout("dp4"))
    for name, x in named_params(plain.state["params"]).items():  # the other weights do not know of adapters
        np.testing.assert_array_equal(x, named_params(run.state["params"])[name], err_msg=name)
    for step in range(3):
        run.train_step(batch(step))
    given = run.merged_params()
    merged = trainer(*layout("dp4"), params=given)
    assert relative_error(merged.log_probs(batch(9)), run.log_probs(batch(9))) < 1e-5
    assert relative_error(plain.log_probs(batch(9)), run.log_probs(batch(9))) > 1e-4
    run.train_step(batch(3))
    assert not any(x.is_deleted() for x in jax.tree.leaves(given))  # copies


def test_adapters_in_the_format_of_peft(tmp_path: Path):
    """Written, read by its definition, W + B A · alpha / r, and by another run."""
    from safetensors.numpy import load_file

    from jaxpar.models.peft import save_adapters

    run = trainer(*layout("dp4"), *LORA, "actor.model.lora_target_modules=[o_proj,k_proj,up_proj]")
    run.train_step(batch(0))
    blueprint = run.program.blueprint
    save_adapters(tmp_path, run.state["params"], blueprint.architecture, blueprint.lora)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "k_proj",
        "o_proj",
        "up_proj",
    ]
    before, after = (named_params(p) for p in (trainer(*layout("dp4")).state["params"], run.merged_params()))
    for name, stored in (
        ("attention/output", "self_attn.o_proj"),
        ("attention/key", "self_attn.k_proj"),
        ("mlp/up", "mlp.up_proj"),
    ):
        prefix = f"base_model.model.model.layers.2.{stored}"
        a, b = (tensors[f"{prefix}.lora_{letter}.weight"] for letter in "AB")
        change = np.asarray(after[f"layers/{name}"] - before[f"layers/{name}"])[2]
        inputs = a.shape[1]
        assert a.shape[0] == b.shape[1] == 4 and relative_error(change.reshape(inputs, -1).T, b @ a * 2) < 1e-4
    other = trainer(*layout("two"), "actor.model.is_lora=True", f"actor.model.lora_path={tmp_path}")
    assert other.program.blueprint.lora == blueprint.lora
    for name, x in named_params(run.state["params"]).items():
        np.testing.assert_array_equal(x, named_params(other.state["params"])[name], err_msg=name)
    with pytest.raises(jaxpar.ConfigError, match=r"lora_rank: 8, but .* has r 4: remove the key"):
        trainer("actor.model.is_lora=True", f"actor.model.lora_path={tmp_path}", "actor.model.lora_rank=8")


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("haed/*", r"trainable: 'haed/\*' fits no parameter.*: there are embed/table, "),
        (["head/*", "layers/3/*"], r"trainable: 'layers/3/\*' fits no parameter"),
        (
            nnx.LoRAParam,
            "trainable: .*LoRAParam.* selects no parameter, so nothing would be trained: there are embed/table",
        ),
        ([], r"trainable: \[\] selects no parameter"),
    ],
)
def test_what_selects_nothing_is_an_error(trainable, message):
    with pytest.raises(jaxpar.ConfigError, match=message):
        trainer(*layout("one"), trainable=trainable)


def test_filters_of_nnx():
    model = FunctionalModel(LoraGPT())
    chosen = lambda which: {n for n, is_on in named_params(trained_mask(model, which, "test")).items() if is_on}  # noqa: E731
    assert chosen(nnx.Not(nnx.PathContains("layers"))) == {n for n in named_params(model.shapes) if n[:6] != "layers"}
    assert chosen(lambda path, variable: isinstance(variable, nnx.LoRAParam) and path[-1] == "lora_a") == {
        "layers/lora_up/lora_a"
    }
    assert chosen("*lora_?") == {"layers/lora_up/lora_a", "layers/lora_up/lora_b"}
