"""`jaxpar check` and `Trainer.check`: a layout beside one device, with models that are right and models that are wrong."""

import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import user_models
from flax import nnx
from runs import JAXPAR, ROOT, environment

import jaxpar
from jaxpar.attention import reference_attention
from jaxpar.measure import check
from jaxpar.measure.check_report import LayoutError

QUICKSTART = ROOT / "configs/quickstart.yaml"
SMALL = ["runner.seq_length=32", "actor.model.sequence_parallel=False"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    """`jaxpar check` in the folder of `user_models.py`."""
    return subprocess.run(
        [JAXPAR, "check", *arguments],
        cwd=ROOT / "tests",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def trainer(model=None, pp=1, tp=1, cp=1, dp=1, *overrides: str) -> jaxpar.Trainer:
    sizes = [
        f"actor.model.pipeline_model_parallel_size={pp}",
        f"actor.model.tensor_model_parallel_size={tp}",
        f"actor.model.context_parallel_size={cp}",
        f"cluster.num_gpus_per_node={pp * tp * cp * dp}",
    ]
    return jaxpar.Trainer(jaxpar.load_config(QUICKSTART, [*SMALL, *sizes, *overrides]), model)


# --- the command ------------------------------------------------------------------------------------------------------

CLUSTERS = sorted(path.name for path in (ROOT / "configs").glob("*node*.yaml"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "llama3_70b_32nodes_32k.yaml" else pytest.mark.exhaustive)
        for name in CLUSTERS
    ],
)
def test_a_shipped_config_is_the_same_as_one_device(name):
    result = run(ROOT / "configs" / name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "verdict    the same, within 1e-05" in result.stdout
    if name == "llama3_70b_32nodes_32k.yaml":
        assert "devices: pp 4 → 2, sp 8 → 2, cp 4 → 2; checked: dp, pp, sp, cp" in result.stdout
        assert "num_hidden_layers 80 → 4" in result.stdout and "precision bf16 → fp32" in result.stdout


WRONG = """
from user_models import GPT
from jaxpar.attention import reference_attention

def build():
    model = GPT(reference_attention)  # without a ring: a rank attends to its own tokens only
    model.mixes_tokens_itself = True  # which is not true
    return model
"""


def test_a_wrong_model_is_found_and_so_is_the_axis(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    one = [f"actor.model.{axis}_model_parallel_size=1" for axis in ("tensor", "pipeline")]
    sizes = [*one, "cluster.num_gpus_per_node=4", *SMALL]
    result = run(QUICKSTART, "--model", f"{tmp_path}/wrong.py:build", *sizes)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "first      embed/positions/embedding: relative" in result.stdout
    assert "alone      dp 2: the same, cp 2: WRONG" in result.stdout
    assert "verdict    WRONG: 18 of 18 gradients and the loss differ" in result.stdout
    assert "take positions from info.positions" in result.stdout


@pytest.mark.slow
def test_the_number_of_layers_is_cut_if_the_model_is_built_from_the_config(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import user_models\n"
        "class Mine(user_models.GPT):\n"
        "    def __init__(self, config):\n"
        "        super().__init__()\n"
        "        self.num_layers = config.actor.model.num_hidden_layers\n"
    )
    result = run(QUICKSTART, "--model", f"{tmp_path}/mine.py:Mine", "actor.model.num_hidden_layers=31")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "num_hidden_layers 31 → 5" in result.stdout and "hidden_size" not in result.stdout


def test_a_mistake_in_the_config_is_no_difference():
    result = run(QUICKSTART, "actor.global_batch_size=18")
    assert result.returncode == 2 and "18 is not a multiple of" in result.stderr
    assert "Traceback" not in result.stderr


# --- the trainer ------------------------------------------------------------------------------------------------------


def test_the_decoder_on_all_axes_with_a_batch_of_ones_own(capsys):
    tokens = np.random.default_rng(0).integers(0, 258, (16, 33))
    one = trainer(None, 2, 2, 2, 2)
    report = one.check({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
    assert report.passed and report.shape == (16, 32) and len(report.differences) == 12
    assert 0 < max(difference.error for difference in report.differences) < 1e-5
    assert "verdict    the same" in capsys.readouterr().out
    with pytest.raises(ValueError, match="batch: tokens is"):
        one.check({"tokens": tokens, "targets": tokens})


def test_rows_are_reduced_to_what_the_schedule_needs(capsys):
    report = trainer(None, 1, 1, 1, 2, "actor.global_batch_size=64", "data.reset_attention_mask=False").check()
    assert (report.shape, report.num_microbatches) == ((8, 32), 2)
    assert "reduced    actor.global_batch_size 64 → 8" in capsys.readouterr().out


@pytest.mark.slow
def test_dynamic_batches():
    dynamic = ["runner.enable_dynamic_batch_size=True", "runner.max_tokens_per_mbs=32"]
    report = trainer(None, 2, 1, 2, 1, *dynamic).check()
    assert report.passed and report.shape == (4, 64)


class LocalPositions(user_models.TokenAndPosition):
    def __call__(self, tokens, info):
        return self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))


class PlainGPT(user_models.GPT):
    mixes_tokens_itself = True  # which is not true


class WithLocalPositions(PlainGPT):
    def embed(self, rngs):
        return LocalPositions(rngs)


@pytest.mark.parametrize("model", [PlainGPT(reference_attention), WithLocalPositions()], ids=["attention", "positions"])
def test_a_model_that_is_wrong_with_cp_is_found(model):
    with pytest.raises(LayoutError, match="embed/positions/embedding: relative") as caught:
        trainer(model, cp=2).check()
    report = caught.value.report
    assert not report.passed and report.loss_error > 1e-5
    assert report.wrong[0].name == "embed/positions/embedding"


class KeyBias(user_models.Block):
    """Adds the same to all scores of a query, so that its gradient is zero but for rounding."""

    def __init__(self, rngs, attention=user_models.ring_attention):
        super().__init__(rngs, attention)
        self.key_bias = nnx.Param(
            jnp.zeros((user_models.KV_HEADS, user_models.HEAD_DIM)), out_sharding=("kv_heads", "head_dim")
        )

    def __call__(self, x, info):
        y = self.norm1(x)
        y = self.attention(self.query(y), self.key(y) + self.key_bias[...], self.value(y), segment_ids=info.segment_ids)
        x = x + self.out(y)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class WithKeyBias(user_models.GPT):
    def block(self, rngs):
        return KeyBias(rngs)


@pytest.mark.slow
def test_a_gradient_that_is_zero_but_for_rounding_is_no_difference():
    report = trainer(WithKeyBias(), cp=2, tp=2).check()
    assert [one.name for one in report.differences if one.vanishing] == ["layers/key_bias"]


def test_one_layer_of_one_parameter_is_named(monkeypatch):
    right = check._loss_and_grads

    def wrong(program, params, batch):
        loss, grads = right(program, params, batch)
        if program.mesh.size > 1:
            grads["layers"]["mlp"]["up"] = grads["layers"]["mlp"]["up"].at[2].multiply(1.0001)
        return loss, grads

    monkeypatch.setattr(check, "_loss_and_grads", wrong)
    with pytest.raises(LayoutError) as caught:
        trainer(dp=2).check()
    (one,) = caught.value.report.wrong
    assert (one.name, one.layer) == ("layers/mlp/up", 2)
    assert one.error == pytest.approx(1e-4, rel=0.1)
    assert "WRONG: 1 of 12 gradients differ by more than 1e-05" in str(caught.value)


def test_a_nan_differs(monkeypatch):
    right = check._loss_and_grads

    def wrong(program, params, batch):
        loss, grads = right(program, params, batch)
        return loss, jax.tree.map(lambda x: x * (np.nan if program.mesh.size > 1 else 1), grads)

    monkeypatch.setattr(check, "_loss_and_grads", wrong)
    with pytest.raises(LayoutError, match="12 of 12 gradients"):
        trainer(dp=2).check()
