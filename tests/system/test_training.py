"""Whole training runs: real data, real checkpoints, real processes."""

import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import yaml
from runs import JAXPAR, QUICKSTART, SMALL, assert_same_state, environment, fit, layout, losses, metrics, start_two
from support import slow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jaxpar
from jaxpar.models.hugging_face import save_params
from jaxpar.run.profile import Steps


@pytest.mark.slow
def test_quickstart_has_the_same_losses_on_1_and_on_16_devices(tmp_path):
    for name in ("one", "all"):
        fit(tmp_path / name, "runner.max_steps=20", "actor.lr_sched.lr_decay_iters=200", *layout(name))
    one, sixteen = losses(tmp_path / "one"), losses(tmp_path / "all")
    np.testing.assert_allclose(one, sixteen, rtol=0, atol=1e-4)
    assert len(one) == 20
    assert one[0] == pytest.approx(np.log(258), abs=0.1)
    assert one[-1] < 3.6


def test_metrics_have_one_object_a_step(tmp_path):
    fit(tmp_path, "runner.max_steps=3", *SMALL, *layout("dp4"))
    rows = metrics(tmp_path)
    keys = ["step", "loss", "grad_norm", "learning_rate", "tokens"]
    keys += ["skipped", "step_seconds", "tokens_per_second", "mfu"]
    assert [list(row) for row in rows] == [keys] * 3
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["mfu"] is None and row["tokens"] <= 16 * 32 and row["step_seconds"] > 0 for row in rows)


def test_tensorboard_reads_the_same_numbers_also_after_a_step_was_run_again(tmp_path):
    run = [*SMALL, *layout("one")]
    fit(tmp_path, "runner.max_steps=4", "runner.save_interval=2", *run)
    shutil.rmtree(tmp_path / "quickstart/checkpoints/global_step_4")
    fit(tmp_path, "runner.max_steps=3", "runner.resume_dir=auto", *run)
    board = EventAccumulator(str(tmp_path / "quickstart/tensorboard")).Reload()
    saving = {"checkpoint_seconds", "checkpoint_wait_seconds"}  # of the first run's third step
    keys = (metrics(tmp_path)[0].keys() | saving) - {"step", "mfu"}
    assert set(board.Tags()["scalars"]) == {f"train/{key}" for key in keys}
    scalars = board.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [1, 2, 3]
    np.testing.assert_array_equal([scalar.value for scalar in scalars], np.float32(losses(tmp_path)))


def test_tensorboard_can_be_left_out(tmp_path):
    fit(tmp_path, "runner.max_steps=1", "runner.logger.logger_backends=[]", *SMALL, *layout("one"))
    assert {path.name for path in (tmp_path / "quickstart").iterdir()} == {"metrics.jsonl", "checkpoints"}


def test_a_profile_is_of_the_steps_asked_for(tmp_path, capsys):
    run = [f"runner.output_dir={tmp_path}", "runner.max_steps=4", *SMALL, *layout("dp4")]
    trainer = jaxpar.Trainer(jaxpar.load_config(QUICKSTART, run))
    with pytest.raises(jaxpar.ConfigError, match="3:3 means steps 3 to 5, but this run has steps 1 to 4"):
        trainer.fit(profile=Steps(3, 3))
    trainer.fit(profile=Steps(2, 2))
    folder = tmp_path / "quickstart/profile"
    assert f"xprof --port 8791 {folder}" in capsys.readouterr().out
    (trace,) = folder.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    traced = [dict(event.stats).get("step_num") for plane in planes for line in plane.lines for event in line.events]
    assert sorted(number for number in traced if number is not None) == [2, 3]


def test_resume_from_a_path_and_its_mistakes(tmp_path):
    small = [*SMALL, *layout("one")]
    fit(tmp_path, "runner.max_steps=4", "runner.save_interval=2", "runner.resume_dir=null", *small)
    saved = tmp_path / "quickstart" / "checkpoints"
    assert {path.name for path in saved.iterdir()} == {"global_step_2", "global_step_4"}
    branch = ["runner.experiment_name=branch", "runner.max_steps=4", *small]
    fit(tmp_path, f"runner.resume_dir={saved / 'global_step_2'}", *branch)
    assert losses(tmp_path, "branch") == losses(tmp_path)[2:]
    for overrides, words in [
        (["runner.resume_dir=null"], "already holds checkpoints up to step 4"),
        ([f"runner.resume_dir={tmp_path / 'nowhere'}"], "no checkpoint"),
        (["runner.resume_dir=auto", "actor.global_batch_size=8"], "global_batch_size: 8, but"),
        (
            ["runner.resume_dir=auto", "actor.model.hidden_size=64"],
            "and float32[384,64] in the model of this config",
        ),
    ]:
        with pytest.raises(jaxpar.ConfigError) as caught:
            fit(tmp_path, "runner.max_steps=6", *small, *overrides)
        assert words in str(caught.value)


def test_loss_and_grads_takes_a_users_batch(tmp_path):
    trainer = jaxpar.Trainer(jaxpar.load_config(QUICKSTART, ["runner.resume_dir=null", *SMALL, *layout("all")]))
    tokens = np.random.default_rng(0).integers(0, 258, (16, 32))
    loss, grads = trainer.loss_and_grads({"tokens": tokens, "targets": tokens})
    explicit = {
        "tokens": tokens,
        "targets": tokens,
        "loss_mask": np.ones((16, 32)),
        "segment_ids": np.zeros((16, 32), int),
        "positions": np.tile(np.arange(32), (16, 1)),
    }
    assert trainer.loss_and_grads(explicit)[0] == loss
    log_probs = np.asarray(trainer.log_probs(explicit))
    assert log_probs.shape == (16, 32) and -log_probs.mean() == pytest.approx(float(loss), rel=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(trainer.state["params"])
    masked = explicit | {"loss_mask": np.zeros((16, 32))}
    np.testing.assert_array_equal(trainer.log_probs(masked), log_probs)
    for batch, words in [
        ({"tokens": tokens}, "targets missing"),
        ({"tokens": tokens, "targets": tokens[:8]}, "targets is (8, 32)"),
        ({"tokens": tokens, "targets": tokens, "mask": tokens}, "unknown keys mask"),
        (masked, "loss_mask is 0 everywhere"),
    ]:
        with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
            trainer.loss_and_grads(batch)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path):
    # No ring across the processes, because with one, gloo sometimes hit its 30 s timeout on a loaded machine.
    sizes = ["actor.model.context_parallel_size=1", "cluster.num_gpus_per_node=8"]  # dp 2, pp 2, sp 2
    run = [*SMALL, "runner.max_steps=4", *layout("all"), *sizes]
    fit(tmp_path / "one", *run)
    processes = start_two(tmp_path / "two", *run)
    output = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert "step 4/4" in output[0]
    assert "step" not in output[1]  # only one process reports
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-6)
    # One process reads what two have written.
    trainer = fit(tmp_path / "two", *run, "runner.max_steps=5")
    assert int(trainer.state["step"]) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, *slow(signal.SIGTERM)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number):
    run = ["runner.max_steps=400", *SMALL, *layout("dp4")]
    command = [JAXPAR, "train", QUICKSTART, f"runner.output_dir={tmp_path}", *run]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 5/400"):
            process.send_signal(number)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    done = metrics(tmp_path)[-1]["step"]
    assert f"saved and stopped after step {done} of 400: run the same command to continue" in errors
    assert "Traceback" not in errors
    assert 5 <= done < 400
    last = done + 3
    fit(tmp_path, *run, f"runner.max_steps={last}")
    fit(tmp_path, *run, f"runner.max_steps={last}", "runner.experiment_name=whole")
    assert losses(tmp_path) == losses(tmp_path, "whole")


@pytest.mark.slow
def test_a_kill_leaves_the_last_checkpoint_and_metrics_without_gaps(tmp_path):
    run = ["runner.save_interval=5", *SMALL, *layout("dp4")]
    command = [JAXPAR, "train", QUICKSTART, f"runner.output_dir={tmp_path}", "runner.max_steps=400", *run]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    saved = tmp_path / "quickstart/checkpoints/global_step_5"
    deadline = time.monotonic() + 120
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    last = 5 * (len(losses(tmp_path)) // 5 + 2)
    fit(tmp_path, *run, f"runner.max_steps={last}")
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, last + 1))


@pytest.mark.slow
def test_a_hugging_face_folder_gives_architecture_and_weights(tmp_path):
    first = fit(tmp_path, "runner.max_steps=2", *SMALL, *layout("all"))
    folder = tmp_path / "exported"
    save_params(folder, first.state["params"], first.program.blueprint.architecture, dtype="float32")
    rng = np.random.default_rng(0)
    batch = {key: rng.integers(0, 258, (16, 32)) for key in ("tokens", "targets")}
    expected, _ = first.loss_and_grads(batch)
    values = yaml.safe_load(QUICKSTART.read_text())
    model = values["actor"]["model"]
    values["actor"]["model"] = {key: value for key, value in model.items() if key.endswith(("size", "parallel"))}
    for key in ("hidden_size", "intermediate_size", "vocab_size"):
        del values["actor"]["model"][key]
    values["actor"]["model"] |= {"model_path": str(folder), "precision": "fp32"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    overrides = ["runner.seq_length=32", "runner.resume_dir=null", *layout("cp4")]
    trainer = jaxpar.Trainer(jaxpar.load_config(tmp_path / "own.yaml", overrides))
    assert trainer.program.blueprint.architecture.hidden_size == 32
    loss, _ = trainer.loss_and_grads(batch)
    assert abs(float(loss) - float(expected)) < 1e-5


@pytest.mark.slow
def test_moments_in_host_memory_change_nothing(tmp_path):
    options = ["runner.resume_dir=auto", *SMALL, *layout("dp4")]
    there = fit(tmp_path / "there", "runner.max_steps=4", *options)
    offload = [*options, "actor.optim.optimizer_cpu_offload=True"]
    fit(tmp_path / "offloaded", "runner.max_steps=2", *offload)
    offloaded = fit(tmp_path / "offloaded", "runner.max_steps=4", *offload)
    moments = [x for x in jax.tree.leaves(offloaded.state["opt_state"]) if x.ndim]
    assert {x.sharding.memory_kind for x in moments} == {"pinned_host"}
    assert losses(tmp_path / "offloaded") == losses(tmp_path / "there")
    assert_same_state(offloaded, there)
