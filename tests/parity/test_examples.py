"""The programs of jaxpar/examples: loss and gradients of each on a mesh with pp, tp and cp against one device."""

import numpy as np
import pytest
from runs import metrics
from support import Step, assert_parity, make_batch, mesh_id, random_params, slow

import jaxpar
from jaxpar.config import ConfigError
from jaxpar.examples import everything, gemma, gpt2, moe, own_loop, vit
from jaxpar.models import FunctionalModel
from jaxpar.models.split_check import check_split_sequence

SEED = np.array([1, 2], np.uint32)


@pytest.mark.parametrize("example", [gpt2, moe, *slow(gemma)], ids=["gpt2", "moe", "gemma"])
@pytest.mark.parametrize("sizes", [(1, 2, 2, 1, 2), *slow((2, 2, 1, 2, 2))], ids=mesh_id)
def test_stacks(example, sizes):
    model = FunctionalModel(example.build())
    check_split_sequence(model, 2, 32)
    params, batch = random_params(model), make_batch()
    seed = SEED if model.is_random else None
    expected = Step(model, (1, 1, 1, 1, 1))(params, batch, seed)
    assert_parity(*Step(model, sizes)(params, batch, seed), *expected)


@pytest.mark.slow
def test_vit():
    def train(steps, **sizes):
        trainer, rng = jaxpar.Trainer(vit.config(**sizes), vit.build()), np.random.default_rng(0)
        return [float(trainer.train_step(vit.images(rng, 32))["loss"]) for _ in range(steps)]

    losses = train(60, tensor_model_parallel_size=2, context_parallel_size=2)
    np.testing.assert_allclose(losses[:8], train(8), rtol=1e-5)
    assert losses[-1] < 0.5 * losses[0]


def test_a_config_has_no_data_for_another_input():
    trainer = jaxpar.Trainer(vit.config(), vit.build())
    with pytest.raises(
        ConfigError, match=r"train_data_paths: gives tokens, but the model or the objective also takes patches"
    ):
        trainer.fit()


def test_own_loop():
    losses = own_loop.train(12, own_loop.build_mesh(2, 4))
    np.testing.assert_allclose(losses, own_loop.train(12, own_loop.build_mesh(1, 1)), rtol=1e-5)
    assert losses[-1] < losses[0]


SPLIT = {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}


@pytest.mark.parametrize("sizes", [SPLIT, *slow({}, {"tensor_model_parallel_size": 2})], ids=str)
def test_everything(tmp_path, sizes):
    everything.train(str(tmp_path / "whole"), confidence=0.2, **SPLIT)
    rows = metrics(tmp_path / "whole", "everything")
    assert rows[-2]["confidence"] > 0.2 > rows[-3]["confidence"]  # the hook learns of a step one step late
    for confidence in (0.1, 0.2):  # goes on with the batch that comes next
        everything.train(str(tmp_path / "halves"), confidence, **sizes)
    halves = [row["loss"] for row in metrics(tmp_path / "halves", "everything")]
    np.testing.assert_allclose(halves, [row["loss"] for row in rows], rtol=1e-5)
