"""Where a trainer's state comes from: a checkpoint, given weights, or random numbers; and what the user is told."""

import json
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import QUICKSTART, SMALL, assert_same_state, environment, fit, layout, losses
from support import equal_trees

import jaxpar
from jaxpar.checkpoint.checkpoints import Checkpoints
from jaxpar.models.hugging_face import save_params
from jaxpar.models.weights import named_params

RUN = ["runner.resume_dir=auto", "runner.save_interval=2", *SMALL, *layout("dp4")]
TOKENS = np.random.default_rng(0).integers(0, 258, (16, 32))
BATCH = {"tokens": TOKENS, "targets": TOKENS}


def trainer(folder: Path, *overrides: str, **options: object) -> jaxpar.Trainer:
    return jaxpar.Trainer(jaxpar.load_config(QUICKSTART, [f"runner.output_dir={folder}", *RUN, *overrides]), **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, jaxpar.Trainer]:
    """A run of three steps, with checkpoints of steps 2 and 3. It has warned about nothing."""
    folder = tmp_path_factory.mktemp("trained")
    with warnings.catch_warnings(action="error", category=UserWarning):
        return folder, fit(folder, "runner.max_steps=3", *RUN)


def test_a_checkpoint_is_used_without_training_data(trained, tmp_path):
    folder, expected = trained
    saved = folder / "quickstart/checkpoints"
    other = trainer(tmp_path, "runner.resume_dir=null", "data.train_data_paths=[nowhere.txt]")
    assert other.restore(saved) == 3 and other.restore(saved.parent) == 3
    assert_same_state(other, expected)
    np.testing.assert_array_equal(other.log_probs(BATCH), expected.log_probs(BATCH))
    assert other.restore(str(saved / "global_step_2")) == 2 == other.state["step"]
    # Neither the position in the data nor another layout matters.
    smaller = trainer(folder, "actor.global_batch_size=8", *layout("pp4-tp2"))
    assert smaller.restore() == 3
    assert_same_state(smaller, expected)
    with pytest.raises(jaxpar.ConfigError, match=r"actor.global_batch_size: 8, but .* was written with 16"):
        smaller.fit()
    with pytest.raises(jaxpar.ConfigError, match=f"no complete checkpoint in {tmp_path}"):
        trainer(tmp_path).restore()
    with pytest.raises(jaxpar.ConfigError, match=r"no checkpoint \(global_step_N\)"):
        other.restore(tmp_path)


def test_an_optimizer_that_does_not_fit_is_said_to_be_the_reason(trained):
    folder, _ = trained
    with pytest.raises(
        jaxpar.ConfigError, match=r"all in opt_state: the parameters are the same\): resume with the se"
    ):
        trainer(folder, "actor.optim.clip_grad=0").restore()
    with pytest.raises(jaxpar.ConfigError, match=r"\(\d+ differences in all\): resume with the config"):
        trainer(folder, "actor.model.hidden_size=64").restore()


@pytest.mark.slow
def test_the_first_use_opens_the_checkpoint_and_fit_does_not_read_it_again(trained, tmp_path, monkeypatch, capsys):
    folder, expected = trained
    reads, restore = [], Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda self, path, *a, **k: reads.append(path) or restore(self, path, *a, **k)
    )
    branch = ["runner.experiment_name=branch", "runner.max_steps=4"]
    for number, source in enumerate((folder / "quickstart", folder / "quickstart/checkpoints/global_step_3")):
        with warnings.catch_warnings(action="error", category=UserWarning):
            resumed = trainer(tmp_path / str(number), f"runner.resume_dir={source}", *branch)
            np.testing.assert_array_equal(resumed.log_probs(BATCH), expected.log_probs(BATCH))
            assert_same_state(resumed, expected)
            resumed.fit()
        assert len(reads) == number + 1 and resumed.state["step"] == 4
    whole = fit(tmp_path / "whole", "runner.max_steps=4", *RUN)
    assert losses(tmp_path / "whole")[3:] == losses(tmp_path / "1", "branch")
    assert_same_state(whole, resumed)
    # A step by hand makes it another state, so fit reads the checkpoint again, as it says.
    by_hand = trainer(tmp_path / "1", "runner.resume_dir=auto", "runner.experiment_name=branch", "runner.max_steps=5")
    by_hand.train_step(BATCH)
    assert by_hand.state["step"] == 5
    reads.clear()
    by_hand.fit()
    assert len(reads) == 1 and len(losses(tmp_path / "1", "branch")) == 2
    assert "resumed from" in capsys.readouterr().out


def test_untrained_weights_are_not_handed_out_in_silence(tmp_path):
    new = trainer(tmp_path)
    with pytest.warns(UserWarning, match=f"no checkpoint in {tmp_path}.*: the weights are untrained") as caught:
        first = new.log_probs(BATCH)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings(action="error", category=UserWarning):
        np.testing.assert_array_equal(new.log_probs(BATCH), first)
        np.testing.assert_array_equal(trainer(tmp_path, "runner.resume_dir=null").log_probs(BATCH), first)
    with pytest.warns(UserWarning, match="untrained"):  # each trainer says so
        trainer(tmp_path).state["step"]


@pytest.mark.slow
def test_training_starts_from_given_weights_unless_there_is_a_checkpoint(trained, tmp_path, capsys):
    folder, other = trained
    given = jax.tree.map(np.asarray, other.state["params"])
    with warnings.catch_warnings(action="error", category=UserWarning):
        new = trainer(tmp_path, "runner.max_steps=1", params=other.state["params"])
        assert equal_trees(new.state["params"], given) and new.state["step"] == 0
        np.testing.assert_array_equal(new.log_probs(BATCH), other.log_probs(BATCH))
    new.fit()
    assert losses(tmp_path)[0] < losses(folder)[0]
    with pytest.raises(AssertionError):
        assert_same_state(new, other)
    capsys.readouterr()
    again = trainer(tmp_path, "runner.max_steps=2", params=given)
    again.fit()
    assert "params: not used, because there is the checkpoint" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="params: not used"):
        used = trainer(tmp_path, params=given).state
    assert used["step"] == 2 and equal_trees(used["params"], again.state["params"])
    # A restore to look at something does not change where training starts.
    third = trainer(tmp_path / "third", "runner.max_steps=1", params=given)
    third.restore(tmp_path / "quickstart")
    third.fit()
    assert "was restored, but training starts anew" in capsys.readouterr().out
    assert losses(tmp_path / "third") == losses(tmp_path)[:1]


def test_given_and_stored_weights_are_a_contradiction(trained, tmp_path):
    _, other = trained
    save_params(tmp_path / "stored", other.state["params"], other.program.blueprint.architecture, dtype="float32")
    path = f"actor.model.model_path={tmp_path / 'stored'}"
    zeros = jax.tree.map(np.zeros_like, other.state["params"])
    with pytest.raises(jaxpar.ConfigError, match="stored has weights, and params are given too"):
        trainer(tmp_path, path, params=zeros)
    assert not trainer(tmp_path, path, params=zeros, replace_stored=True).state["params"]["embed"]["table"].any()
    # The vocabulary's padding is not stored.
    assert equal_trees(trainer(tmp_path, path).state["params"]["layers"], other.state["params"]["layers"])
    with pytest.raises(jaxpar.ConfigError, match=r"params: embed/table \[\d+, 32\] is missing"):
        trainer(tmp_path, params={key: zeros[key] for key in ("layers", "head")})


PROCESS = """
import json, sys
import numpy as np, jaxpar
weights, asked = dict(np.load(sys.argv[1])), []
def params(path):
    asked.append(path)
    part, *rest = path.split("/")
    return weights["/".join([part, *rest[1:]])][int(rest[0])] if part == "layers" else weights[path]
trainer = jaxpar.Trainer(jaxpar.load_config(sys.argv[2], sys.argv[3:]), params=params)
tokens = np.random.default_rng(0).integers(0, 258, (16, 32))
loss, _ = trainer.loss_and_grads({"tokens": tokens, "targets": tokens})
print("ASKED", json.dumps([float(loss), asked]), flush=True)
"""


@pytest.mark.slow
def test_a_process_asks_for_its_own_layers(trained, tmp_path):
    _, other = trained
    np.savez(tmp_path / "weights.npz", **named_params(jax.tree.map(np.asarray, other.state["params"])))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    sizes = ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "context_parallel_size=1"]
    overrides = [*SMALL, "runner.resume_dir=null", "cluster.num_gpus_per_node=4"]
    overrides += [f"actor.model.{size}" for size in sizes]
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "weights.npz"), str(QUICKSTART), *overrides]
    place = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(command, env=environment(**place, JAX_PROCESS_ID=str(rank)), stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    expected, _ = other.loss_and_grads(BATCH)
    for rank, output in enumerate(outputs):
        (line,) = (line for line in output.splitlines() if line.startswith("ASKED"))
        loss, asked = json.loads(line.removeprefix("ASKED"))
        assert abs(loss - expected) < 1e-5
        layers = [path.split("/")[1] for path in asked if path.startswith("layers/")]
        assert set(layers) == {str(2 * rank), str(2 * rank + 1)} and len(asked) == len(set(asked))
