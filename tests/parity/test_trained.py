"""Training a part of the parameters: the same gradients and steps as on one device, and nothing for the frozen ones."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import user_models
from flax import nnx
from runs import QUICKSTART, SMALL, fit, layout
from safetensors.numpy import load_file
from support import (
    DECODER,
    QUICK,
    VOCAB,
    Case,
    Step,
    assert_parity,
    equal_trees,
    make_batch,
    random_params,
    reference,
    relative_error,
    slow,
)

import jaxpar
from jaxpar.attention import reference_attention
from jaxpar.checkpoint.checkpoints import Checkpoints
from jaxpar.config.lora import Lora
from jaxpar.models import Decoder, FunctionalModel, TokenInfo
from jaxpar.models.hugging_face import save_params
from jaxpar.models.lora import merged
from jaxpar.models.peft import save_adapters
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


@functools.cache
def lora_case() -> Case:
    """The decoder with adapters of all matrices, none of which is zero."""
    model = FunctionalModel(Decoder(DECODER, Lora(4, 8.0)))
    params, rows = random_params(model), make_batch()
    return Case(model, params, rows, *reference(model, params, rows))


@pytest.mark.parametrize(
    ("sizes", "options", "patterns"),
    [
        ((2, 2, 1, 2, 2), dict(schedule="zb1p", zero_stage=3), ["*/lora/*", "*/norm/scale", "embed/*"]),
        *slow(
            ((2, 1, 2, 2, 1), dict(zero_stage=1), ["*/lora/*"]),
            ((2, 1, 2, 1, 1), dict(zero_stage=2), ["layers/mlp/down", "head/weight", "*/a"]),
            ((1, 2, 2, 1, 2), dict(num_chunks=2, schedule="interleaved_1f1b"), ["layers/attention/*"]),
            ((2, 2, 2, 1, 1), dict(zero_stage=0), ["head/*"]),
            ((2, 1, 1, 2, 2), dict(zero_stage=3), ["head/norm/*"]),
            ((1, 1, 8, 1, 1), dict(zero_stage=0), ["*/lora/*"]),  # kv heads are repeated
        ),
    ],
)
def test_gradients_of_some_parameters(sizes, options, patterns):
    case = lora_case()
    mask, some = like(case.model, patterns)
    step = Step(case.model, sizes, trained=mask, **options)
    loss, grads = step(case.params, case.batch)
    assert jax.tree.structure(grads) == jax.tree.structure(some)
    assert_parity(loss, grads, case.loss, partition(case.grads, some)[0])


def test_frozen_weights_have_no_products_of_their_own():
    model = FunctionalModel(Decoder(DECODER))

    def products(*patterns: str) -> int:
        """In the program's text, where those of a loop stand once."""
        mask, _ = like(model, list(patterns))
        return str(Step(model, (1, 1, 1, 1, 1), trained=mask).jaxpr).count("dot_general[")

    matrices = 7  # of a layer: query, key, value, output, gate, up, down
    assert products("layers/*norm/scale", "head/*", "embed/*") == products("*") - matrices
    # Nothing goes back through the layers if only the head is trained.
    assert products("head/*") < products("*") - 2 * matrices


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("two", "actor.optim.zero_stage=3"),
        ("all", "actor.optim.zero_stage=1"),
        ("pp4-tp2", "actor.model.pipeline_schedule=zb1p"),
    ],
)
def test_ten_steps_equal_one_device(one_device, where, more):
    settings, expected, expected_params = one_device
    found, params = ten_steps(trainer(*layout(where), more, *settings))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    errors = {name: relative_error(x, expected_params[name]) for name, x in params.items()}
    assert max(errors.values()) < 1e-5, errors


RESUME = ["runner.resume_dir=auto", "runner.save_interval=5", "actor.lr_sched.lr_decay_iters=10", *SMALL, *LORA]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
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

    def __init__(self, rngs: nnx.Rngs, attention: Any):
        super().__init__(rngs, attention)
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
        return LoraBlock(rngs, self.attention)


@pytest.mark.parametrize("sizes", [(2, 1, 2, 1, 1), *slow((1, 2, 2, 2, 2))])
def test_lora_of_nnx_in_a_users_model(sizes):
    model, rows = FunctionalModel(LoraGPT()), make_batch()
    params = random_params(model)
    mask = trained_mask(model, nnx.LoRAParam, "test")
    loss, grads = Step(model, sizes, trained=mask)(params, rows)
    assert set(named_params(grads)) == {"layers/lora_up/lora_a", "layers/lora_up/lora_b"}
    expected_loss, expected = reference(
        FunctionalModel(LoraGPT(reference_attention)), params, rows, vocab=user_models.VOCAB
    )
    assert_parity(loss, grads, expected_loss, partition(expected, grads)[0])


@pytest.mark.slow
def test_a_checkpoint_with_frozen_parameters(tmp_path):
    """They are saved in bf16, moments are those of the adapters, and another layout reads them."""
    runs = [
        trainer(
            f"runner.output_dir={tmp_path}",
            "runner.resume_dir=auto",
            "actor.model.precision=bf16",
            *LORA,
            *layout(name),
        )
        for name in ("zero3", "pp4-tp2")
    ]
    state = runs[0].program.init(None)
    state = {**state, "step": state["step"] + 3}
    checkpoints = Checkpoints(runs[0].config)
    checkpoints.save(3, state, {"batch": 0})
    checkpoints.wait()
    manifest = json.loads((tmp_path / "quickstart/checkpoints/global_step_3/manifest.json").read_text())["tree"]
    assert manifest["params/layers/mlp/up"] == "bfloat16[4,32,48]"
    assert manifest["params/layers/mlp/lora/up/a"] == "float32[4,32,4]"
    moments = [name for name in manifest if name.startswith("opt_state") and "/mu/" in name]
    assert moments and all("/lora/" in name for name in moments)
    assert runs[1].restore() == 3
    assert equal_trees(runs[1].state, state)


def test_merged_parameters_give_the_same_logits():
    case, tokens = lora_case(), make_batch()["tokens"][:1]
    info = TokenInfo(make_batch()["positions"][:1], None)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def logits(model: FunctionalModel, params: dict) -> jax.Array:
        x = model.embed(params, tokens, info)
        for layer in range(model.num_layers):
            x = model.block(jax.tree.map(lambda p, i=layer: p[i], params["layers"]), x, info)
        return model.head(params, x)[..., :VOCAB]  # what pads the vocabulary would outweigh them

    plain = FunctionalModel(Decoder(DECODER))
    found = merged(case.params, 2.0)
    assert jax.tree.structure(found) == jax.tree.structure(plain.shapes)
    assert relative_error(logits(plain, found), logits(case.model, case.params)) < 1e-5
    # New adapters change nothing, and the other weights do not know of them.
    with_adapters, without = (jax.jit(model.init, compiler_options=QUICK)(3) for model in (case.model, plain))
    assert equal_trees(merged(with_adapters, 2.0), without)


@pytest.mark.slow
def test_merged_parameters_of_a_trainer():
    run, plain = trainer(*layout("dp4"), *LORA), trainer(*layout("dp4"))
    for step in range(3):
        run.train_step(batch(step))
    given = run.merged_params()
    merged = trainer(*layout("dp4"), params=given)
    assert relative_error(merged.log_probs(batch(9)), run.log_probs(batch(9))) < 1e-5
    assert relative_error(plain.log_probs(batch(9)), run.log_probs(batch(9))) > 1e-4
    run.train_step(batch(3))
    assert not any(x.is_deleted() for x in jax.tree.leaves(given))  # copies


def test_adapters_in_the_format_of_peft(tmp_path: Path):
    """Written, read by its definition, W + B A · alpha / r, and by a run."""
    settings = ["actor.model.is_lora=True", f"actor.model.lora_path={tmp_path}", *layout("two")]
    config = jaxpar.load_config(QUICKSTART, SMALL)
    lora = Lora(4, 8.0, ("k_proj", "o_proj", "up_proj"))
    params = random_params(FunctionalModel(Decoder(config.architecture(), lora)))
    save_adapters(tmp_path, jax.tree.map(jnp.asarray, params), config.architecture(), lora)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["target_modules"]) == (4, 8, ["k_proj", "o_proj", "up_proj"])
    before, after = named_params(params), named_params(merged(params, lora.scale))
    names = {"attention/output": "self_attn.o_proj", "attention/key": "self_attn.k_proj", "mlp/up": "mlp.up_proj"}
    assert len(tensors) == len(names) * 2 * config.architecture().num_hidden_layers
    for name, theirs in names.items():
        a, b = (tensors[f"base_model.model.model.layers.2.{theirs}.lora_{letter}.weight"] for letter in "AB")
        change = np.asarray(after[f"layers/{name}"] - before[f"layers/{name}"])[2].reshape(a.shape[1], -1)
        assert a.shape[0] == b.shape[1] == 4 and relative_error(change.T, b @ a * 2) < 1e-5
    run = trainer(*settings)
    assert run.program.blueprint.lora == lora
    for name, x in named_params(run.state["params"]).items():
        assert np.array_equal(x, before[name]) == ("/lora/" in name), name
    with pytest.raises(jaxpar.ConfigError, match=r"lora_rank: 8, but .* has r 4: remove the key"):
        trainer(*settings, "actor.model.lora_rank=8")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**stored, "use_dora": True}))
    with pytest.raises(jaxpar.ConfigError, match=r"lora_path: .*adapter_config.json: use_dora True is not supported"):
        trainer(*settings)


@pytest.mark.slow
def test_adapters_begin_beside_stored_or_given_weights(tmp_path):
    plain = trainer(*layout("one"))
    architecture, base = plain.program.blueprint.architecture, plain.state["params"]
    save_params(tmp_path, base, architecture, dtype="float32")
    bf16 = ["actor.model.precision=bf16", *layout("two"), *LORA]
    runs = [
        trainer(*bf16, f"actor.model.model_path={tmp_path}"),
        trainer(*bf16, params=base),
        trainer(*bf16, params=lambda path: named_params(base)[re.sub(r"layers/\d+", "layers", path)][layer_of(path)]),
    ]
    adapters = named_params(trainer(*LORA, *layout("two")).state["params"])  # of random numbers
    for run in runs:
        for name, x in named_params(run.state["params"]["layers"]).items():
            name = f"layers/{name}"
            expected = adapters[name] if "/lora/" in name else np.asarray(named_params(base)[name]).astype(jnp.bfloat16)
            np.testing.assert_array_equal(x, expected, err_msg=name)
    with pytest.raises(
        jaxpar.ConfigError, match="save_params: the parameters have adapters: give trainer.merged_params"
    ):
        save_params(tmp_path, runs[0].state["params"], architecture)


def layer_of(path: str) -> Any:
    found = re.search(r"layers/(\d+)/", path)
    return int(found[1]) if found else slice(None)


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
