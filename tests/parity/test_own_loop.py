"""A training loop of the user's own around `program.loss_and_grads`, as jaxpar/models/README.md shows it."""

import jax
import numpy as np
import pytest
from runs import QUICKSTART, SMALL
from support import readme_example

import jaxpar

SETTINGS = [
    *SMALL, "runner.resume_dir=null", "cluster.num_gpus_per_node=8",
    "actor.model.pipeline_model_parallel_size=2", "actor.model.context_parallel_size=2",
    "actor.model.tensor_model_parallel_size=2", "actor.model.sequence_parallel=False",
    # The README's optimizer: adam, and nothing else.
    "actor.optim.lr=1e-3", "actor.optim.adam_beta2=0.999", "actor.optim.weight_decay=0", "actor.optim.clip_grad=0",
    "actor.lr_sched.lr_decay_style=constant", "actor.lr_sched.lr_warmup_fraction=0",
]  # fmt: skip


@pytest.mark.slow
def test_the_loop_of_the_readme_has_the_losses_of_train_step(monkeypatch):
    load = jaxpar.load_config
    monkeypatch.setattr(jaxpar, "load_config", lambda path, overrides: load(QUICKSTART, [*overrides, *SETTINGS]))
    names: dict = {"__name__": "__main__"}
    exec(readme_example("def build_step"), names)

    trainer = jaxpar.Trainer(load(QUICKSTART, SETTINGS))
    assert dict(trainer.program.mesh.shape) == {"dp": 1, "pp": 2, "tp": 2, "sp": 1, "cp": 2}
    tokens = np.random.default_rng(0).integers(0, 258, (16, 33))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    expected = [float(trainer.train_step(batch)["loss"]) for _ in range(4)]
    assert expected[0] - expected[-1] > 1e-3
    np.testing.assert_allclose(names["losses"], expected, rtol=1e-6)
    # The state was given away, and parameters and moments still lie as jaxpar's own.
    assert all(x.is_deleted() for x in jax.tree.leaves(names["trainer"].state["params"]))
    params, opt_state = names["state"]
    shardings = jax.tree.map(lambda x: x.sharding, trainer.state["params"])
    first_moments = names["optimizer"].init(trainer.state["params"])[0].mu
    for tree in (params, opt_state[0].mu, opt_state[0].nu, first_moments):
        same = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), tree, shardings)
        assert jax.tree.all(same), same
