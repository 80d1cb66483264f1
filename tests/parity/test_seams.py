"""All of the trainer's seams in one run: model, loss, optimizer, what is trained, weights, batches, hooks."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from runs import QUICKSTART, SMALL, layout
from support import equal_trees, relative_error
from test_trained import LoraGPT

import jaxpar
from jaxpar.attention import attention
from jaxpar.models.weights import named_params

VOCAB = 96


class Recorder(jaxpar.Hook):
    def __init__(self):
        self.rows, self.evaluations = [], []

    def step(self, row):
        self.rows.append(row)

    def evaluation(self, step, loss):
        self.evaluations.append(loss)


def batches(count, first=0):
    for seed in range(first, first + count):
        tokens = np.random.default_rng(seed).integers(0, VOCAB, (16, 33))
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def objective(tokens, batch):
    return -tokens.log_probs, {"entropy": tokens.log_sums - tokens.log_probs}


def sketch(folder, name):
    overrides = [
        f"runner.output_dir={folder}",
        "runner.max_steps=4",
        "runner.val_check_interval=2",
        "runner.resume_dir=null",
    ]
    config = jaxpar.load_config(QUICKSTART, [*SMALL, "actor.model.precision=fp32", *overrides, *layout(name)])
    model = LoraGPT(attention)
    pretrained = jax.tree.map(np.asarray, jaxpar.Trainer(config, model).state["params"])
    recorder, batch = Recorder(), next(batches(1, 100))

    trainer = jaxpar.Trainer(
        config,
        model,
        objective=objective,
        optimizer=optax.lion(1e-4),
        trainable=nnx.LoRAParam,
        params=pretrained,
    )
    trainer.check(batch)
    trainer.fit(batches(4), eval_batches=lambda: batches(2, 50), hooks=[recorder])
    return pretrained, trainer, recorder, trainer.module()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "zero3"])
def test_the_whole_sketch(tmp_path, name):
    pretrained, trainer, recorder, module = sketch(tmp_path / "mesh", name)
    before, after = named_params(pretrained), named_params(trainer.state["params"])
    changed = {path for path, x in before.items() if not np.array_equal(x, after[path])}
    assert changed == {"layers/lora_up/lora_a", "layers/lora_up/lora_b"}
    assert [row["step"] for row in recorder.rows] == [1, 2, 3, 4] and len(recorder.evaluations) == 2
    one, _, of_one, module_of_one = sketch(tmp_path / "one", "one")
    assert equal_trees(pretrained, one)
    for key in ("loss", "entropy"):
        np.testing.assert_allclose([r[key] for r in recorder.rows], [r[key] for r in of_one.rows], rtol=1e-5)
    np.testing.assert_allclose(recorder.evaluations, of_one.evaluations, rtol=1e-5)
    tokens = next(batches(1, 100))["tokens"]
    assert relative_error(module(tokens), module_of_one(tokens)) < 1e-5
