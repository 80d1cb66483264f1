"""Checkpoints: every layout reads those of every other, bit for bit; torn and damaged ones are detected."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import QUICKSTART, SMALL, assert_same_state, environment, fit, layout, losses, metrics, start_two
from typer.testing import CliRunner

import jaxpar
from jaxpar.checkpoint.checkpoints import Checkpoints
from jaxpar.checkpoint.manifest import read_manifest
from jaxpar.cli import app
from jaxpar.data import PackedSource
from jaxpar.run.datasets import open_tokens, open_training_data

RESUMED = ["zero3", "pp4-tp2", "all", "cp4", "sp4"]  # all except zero3 use ZeRO stage 1
MATRIX = ["one", "zero3", "all", "pp4-tp2", "interleaved", "cp4"]
COMMON = ["runner.resume_dir=auto", *SMALL]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_ten_and_ten_steps_are_bitwise_twenty(tmp_path, name):
    whole = fit(tmp_path / "whole", "runner.max_steps=20", *COMMON, *layout(name))
    fit(tmp_path / "halves", "runner.max_steps=10", *COMMON, *layout(name))
    halves = fit(tmp_path / "halves", "runner.max_steps=20", *COMMON, *layout(name))
    assert len(losses(tmp_path / "whole")) == 20
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert_same_state(whole, halves)


def test_three_and_three_steps_are_bitwise_six(tmp_path):
    run = [*COMMON, *layout("all")]
    whole = fit(tmp_path / "whole", "runner.max_steps=6", *run)
    fit(tmp_path / "halves", "runner.max_steps=3", *run)
    halves = fit(tmp_path / "halves", "runner.max_steps=6", *run)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert_same_state(whole, halves)
    with pytest.raises(AssertionError):  # shows that a loss of the moments would be noticed
        assert_same_state(whole, jaxpar.Trainer(config(tmp_path / "whole", *run, "runner.resume_dir=null")))


@pytest.mark.slow
def test_two_processes_resume_bitwise_and_go_on_as_one(tmp_path):
    run = [*COMMON, *layout("two")]
    for folder, steps in [("whole", 20), ("halves", 10), ("halves", 20)]:
        outputs = [
            p.communicate(timeout=300)[0] for p in start_two(tmp_path / folder, f"runner.max_steps={steps}", *run)
        ]
        assert f"done: step {steps}" in outputs[0], outputs
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    states = [
        restore(jaxpar.Trainer(config(tmp_path / folder, *run)), checkpoint(tmp_path / folder, 20))
        for folder in ("whole", "halves")
    ]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert read_manifest(checkpoint(tmp_path / "halves", 20))["processes"] == 2


@pytest.mark.slow
def test_each_layout_reads_each_others_checkpoint(tmp_path):
    """36 pairs: parameters and moments are bitwise equal, and the next step on the same samples has the same loss."""
    trainers = {name: fit(tmp_path / name, "runner.max_steps=3", *COMMON, *layout(name)) for name in MATRIX}
    saved = {name: jax.tree.map(np.asarray, trainer.state) for name, trainer in trainers.items()}
    for writer in MATRIX:
        next_losses = []
        for reader in MATRIX:
            trainer, path = trainers[reader], checkpoint(tmp_path / writer, 3)
            state = restore(trainer, path)
            for (key, a), b in zip(
                jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(saved[writer]), strict=True
            ):
                np.testing.assert_array_equal(a, b, err_msg=f"{writer} → {reader}: {jax.tree_util.keystr(key)}")
            loader = open_training_data(trainer.program)
            loader.set_state({"batch": read_manifest(path)["data"]["batch"]})
            batch = trainer.program.batch_layout.put_on_mesh(next(loader))
            next_losses.append(float(trainer._run_state.train_step(batch)["loss"]))
            loader.close()
        np.testing.assert_allclose(next_losses, next_losses[0], rtol=0, atol=1e-5, err_msg=writer)


@pytest.mark.slow
def test_another_dp_goes_on_with_the_same_samples(tmp_path):
    whole = [*COMMON, *layout("one")]
    fit(tmp_path / "whole", "runner.max_steps=6", *whole)
    fit(tmp_path / "changed", "runner.max_steps=3", *whole)
    fit(tmp_path / "changed", "runner.max_steps=6", *COMMON, *layout("dp4"))
    np.testing.assert_allclose(losses(tmp_path / "changed"), losses(tmp_path / "whole"), rtol=0, atol=1e-5)
    # The batches differ in their number of valid tokens.
    tokens = [[row["tokens"] for row in metrics(tmp_path / folder)] for folder in ("whole", "changed")]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_which_checkpoints_are_kept(tmp_path):
    run = [
        *COMMON,
        *layout("one"),
        "runner.save_interval=1",
        "runner.keep_checkpoints=2",
        "runner.val_check_interval=2",
    ]
    run += [f"data.val_data_paths=[{held_out(tmp_path)}]", "runner.keep_best_checkpoint=True"]
    fit(tmp_path, "runner.max_steps=6", "runner.keep_checkpoint_interval=3", *run)
    assert steps_in(tmp_path) == [3, 5, 6]
    fit(tmp_path, "runner.max_steps=10", "actor.optim.lr=10.0", "actor.lr_sched.min_lr=0", *run)
    val_losses = {row["step"]: row["val_loss"] for row in metrics(tmp_path) if "val_loss" in row}
    assert list(val_losses) == [2, 4, 6, 8, 10]
    assert min(val_losses, key=val_losses.get) == 6
    assert steps_in(tmp_path) == [6, 9, 10]
    assert read_manifest(checkpoint(tmp_path, 6))["val_loss"] == val_losses[6]


@pytest.mark.slow
def test_the_best_checkpoint_is_saved_when_it_is_reached(tmp_path):
    run = [*COMMON, *layout("one"), f"data.val_data_paths=[{held_out(tmp_path)}]", "runner.val_check_interval=2"]
    fit(tmp_path, "runner.max_steps=5", "runner.keep_best_checkpoint=True", "runner.keep_checkpoints=1", *run)
    assert steps_in(tmp_path) == [4, 5]


def test_evaluation_takes_each_validation_token_once(tmp_path):
    run = [*COMMON, *layout("dp4"), f"data.val_data_paths=[{held_out(tmp_path)}]"]
    run += ["runner.val_check_interval=2"]
    trainer = fit(tmp_path, "runner.max_steps=2", *run)
    source = PackedSource.read(open_tokens(trainer.program, "val_data_paths"), 32)
    assert len(source) % 16  # the last batch is partly empty
    nats = tokens = 0.0
    for index in range(len(source)):
        sample = source[index]
        rows = {key: np.broadcast_to(value, (16, 32)) for key, value in sample.items()}
        count = float(sample["loss_mask"].sum())
        nats += float(trainer.loss_and_grads(rows)[0]) * count
        tokens += count
    assert metrics(tmp_path)[1]["val_loss"] == pytest.approx(nats / tokens, rel=1e-6)


def test_inspect_and_what_is_torn_or_damaged(tmp_path):
    run = [*COMMON, *layout("dp4")]
    fit(tmp_path, "runner.max_steps=4", "runner.save_interval=2", *run)
    newest = checkpoint(tmp_path, 4)
    shown = CliRunner().invoke(app, ["checkpoint", "inspect", str(tmp_path / "quickstart"), "--verify"])
    assert shown.exit_code == 0, shown.output
    assert "complete, step 4" in shown.output and "dp 4  pp 1" in shown.output
    assert re.search(r"layers/attention/query .* 4 x 32 x 4 x 8 .* 16,384", shown.output)
    assert "all checksums match" in shown.output
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["tree"]["params/layers/attention/query"] == "float32[4,32,4,8]"
    assert manifest["config"]["actor"]["global_batch_size"] == 16 and manifest["versions"]["jax"] == jax.__version__

    flipped = max((newest / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    whole = bytearray(flipped.read_bytes())
    for position in (len(whole) // 3, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1  # one bit
        flipped.write_bytes(damaged)
        with pytest.raises(jaxpar.ConfigError, match=f"{flipped} is damaged"):
            fit(tmp_path, "runner.max_steps=6", *run)
        shown = CliRunner().invoke(app, ["checkpoint", "inspect", str(newest), "--verify"])
        assert str(flipped.name) in str(shown.exception)

    # A checkpoint with a shorter or missing file is torn, so the one before it is used. Unfinished folders are ignored.
    flipped.write_bytes(whole[:-1])
    assert found(tmp_path, *run) == (
        2,
        f"{flipped.relative_to(newest)} has {len(whole) - 1} bytes instead of {len(whole)}",
    )
    flipped.unlink()
    assert found(tmp_path, *run) == (2, f"{flipped.relative_to(newest)} is missing")
    (newest / "manifest.json").unlink()
    assert found(tmp_path, *run) == (2, "manifest.json is missing")
    with pytest.raises(jaxpar.ConfigError, match="global_step_4 is torn: manifest.json is missing"):
        fit(tmp_path, "runner.max_steps=6", *run, f"runner.resume_dir={newest}")
    shutil.copytree(checkpoint(tmp_path, 2), tmp_path / "quickstart/checkpoints/global_step_9.orbax-checkpoint-tmp")
    assert found(tmp_path, *run)[0] == 2
    fit(tmp_path, "runner.max_steps=4", *run)  # writes the step again, next to the torn one
    assert steps_in(tmp_path) == [2, 4]
    assert (tmp_path / "quickstart/checkpoints/torn_global_step_4").is_dir()
    assert found(tmp_path, *run) == (4, "")


MEMORY = """
import sys
import jax, jaxpar
from jaxpar.checkpoint.checkpoints import Checkpoints
def kernel_says(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
path, save = sys.argv[1], sys.argv[2] == "save"
config = jaxpar.load_config("{config}", [f"runner.output_dir={{path}}", "runner.resume_dir=auto", *sys.argv[3:]])
trainer, checkpoints = jaxpar.Trainer(config), Checkpoints(config)
if save:
    checkpoints.save(1, dict(trainer.state, step=trainer.state["step"] + 1), dict(batch=0))
    checkpoints.wait()
    sys.exit()
found, _ = checkpoints.find()
jax.device_put(0.0).block_until_ready()
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
before = kernel_says("VmRSS")
state, _ = checkpoints.restore(found, trainer.program.state_shapes, trainer.program.state_shardings)
jax.block_until_ready(state)
peak = kernel_says("VmHWM") - before
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
print("MEMORY", peak, held)
"""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("reader", ["dp4", "all"])
def test_restoring_takes_little_host_memory_beyond_the_state(tmp_path, reader):
    """Device memory is host memory here. The growth of a new process's peak memory during the restore is compared with
    what its devices hold afterwards. The checkpoint was written on one device, in the largest pieces."""
    script = MEMORY.format(config=QUICKSTART)
    sizes = [
        "actor.model.hidden_size=1024", "actor.model.intermediate_size=4096", "actor.model.num_hidden_layers=4",
        "actor.micro_batch_size=1",
    ]  # fmt: skip
    for verb, name in (("save", "one"), ("restore", reader)):
        command = [sys.executable, "-c", script, str(tmp_path), verb, *sizes, *layout(name)]
        output = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert output.returncode == 0, output.stderr
    peak, held = map(int, re.search(r"MEMORY (\d+) (\d+)", output.stdout).groups())
    print(f"{reader}: peak growth {peak:,} bytes, held {held:,} bytes: {peak / held:.3f}")
    assert held > 7e8
    assert held <= peak <= 1.2 * held


def held_out(folder: Path) -> Path:
    path = folder / "held_out.txt"
    path.write_text("Now is better than never. Although never is often better than right now. " * 12)
    return path


def config(folder: Path, *overrides: str) -> jaxpar.Config:
    return jaxpar.load_config(QUICKSTART, [f"runner.output_dir={folder}", *overrides])


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"quickstart/checkpoints/global_step_{step}"


def steps_in(folder: Path) -> list[int]:
    names = [path.name for path in (folder / "quickstart/checkpoints").iterdir()]
    return sorted(int(name.removeprefix("global_step_")) for name in names if re.fullmatch(r"global_step_\d+", name))


def restore(trainer: jaxpar.Trainer, path: Path) -> dict:
    assert trainer.restore(path) == int(path.name.rpartition("_")[2])
    return trainer.state


def found(folder: Path, *overrides: str) -> tuple[int, str]:
    """The step from which `resume_dir: auto` resumes, and its message about step 4."""
    path, notes = Checkpoints(config(folder, *overrides)).find()
    prefix = f"{checkpoint(folder, 4)} is torn and was skipped: "
    return int(path.name.rpartition("_")[2]), "".join(n.removeprefix(prefix) for n in notes if n.startswith(prefix))
