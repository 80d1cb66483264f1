"""Checkpoints that cannot be read, are torn, or are not what they say: nothing is lost, renamed or replaced in silence."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runs import QUICKSTART, SMALL, fit, layout, metrics
from support import make_mesh

import jaxpar
from jaxpar.checkpoint import CheckpointError, Checkpoints, reading

SHARDING = NamedSharding(make_mesh((2, 1, 2, 1, 2)), P(("dp", "tp")))
POSITION = {"batch": 2}


def checkpoints(folder: Path, *overrides: str) -> Checkpoints:
    overrides = ("runner.resume_dir=auto", *overrides)
    return Checkpoints(jaxpar.load_config(QUICKSTART, [f"runner.output_dir={folder}", *overrides]))


def state(step: int) -> dict[str, jax.Array]:
    whole = NamedSharding(SHARDING.mesh, P())
    return {
        "step": jax.device_put(jnp.int32(step), whole),
        "params": jax.device_put(jnp.arange(8.0) * step, SHARDING),
    }


def restore(saved: Checkpoints, path: Path) -> dict[str, jax.Array]:
    shardings = jax.tree.map(lambda x: x.sharding, state(1))
    return saved.restore(path, jax.eval_shape(lambda: state(1)), shardings)[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    saved = checkpoints(folder)
    for step in (2, 4):
        saved.save(step, state(step), POSITION)
    saved.wait()
    return folder


@pytest.fixture
def copy(written, tmp_path, monkeypatch) -> Path:
    """A copy of two checkpoints, and no long waits."""
    monkeypatch.setattr(reading, "WAITS", (0.01, 0.01))
    return Path(shutil.copytree(written, tmp_path / "copy"))


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"quickstart/checkpoints/global_step_{step}"


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "quickstart/checkpoints").iterdir()}


def unreadable(path: Path) -> None:
    """Neither missing nor readable, also for root."""
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("file", ["commit_success.txt", "manifest.json", "checksums.json", "state/_METADATA"])
def test_what_cannot_be_read_stops_the_run_and_is_not_renamed(copy, file, capsys):
    unreadable(step_folder(copy, 4) / file)
    for use in (lambda c: c.find(), lambda c: c.find_to_use(), lambda c: c.save(6, state(6), POSITION)):
        with pytest.raises(CheckpointError, match=rf"global_step_4/{file} cannot be read \(.*after 3 attempts"):
            use(checkpoints(copy))
    assert names(copy) == {"global_step_2", "global_step_4"}
    assert "trying again in 0.01 s" in capsys.readouterr().err


def test_an_error_that_passes_is_waited_for(copy, monkeypatch):
    read, failures = Path.read_bytes, iter([OSError(5, "Input/output error")] * 2)

    def flaky(path: Path) -> bytes:
        if path.name == "manifest.json" and (error := next(failures, None)):
            raise error
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    assert checkpoints(copy).find() == (step_folder(copy, 4), [])
    assert next(failures, None) is None


def test_all_torn_stops_the_run_unless_it_is_told_to_begin_anew(copy):
    for step in (2, 4):
        (step_folder(copy, step) / "checksums.json").unlink()
    for setting in ("auto", "null"):
        with pytest.raises(CheckpointError, match=r"none of the 2 .*checksums.json is missing: .*resume_dir: fresh"):
            checkpoints(copy, f"runner.resume_dir={setting}").find()
    fresh = checkpoints(copy, "runner.resume_dir=fresh")
    assert fresh.find() == (None, [])
    fresh.save(4, state(4), POSITION)
    fresh.wait()
    assert names(copy) == {"torn_global_step_2", "torn_global_step_4", "global_step_4"}
    assert checkpoints(copy).find()[0] == step_folder(copy, 4)
    with pytest.raises(jaxpar.ConfigError, match="resume_dir: fresh, but .* already holds checkpoints up to step 4"):
        checkpoints(copy, "runner.resume_dir=fresh").find()
    (step_folder(copy, 4) / "checksums.json").unlink()  # a second torn one of this step
    checkpoints(copy, "runner.resume_dir=fresh").open_to_write()
    assert "torn_global_step_4.2" in names(copy)


def test_an_unfinished_first_save_is_no_reason_to_stop(copy):
    shutil.rmtree(step_folder(copy, 2))
    step_folder(copy, 4).rename(step_folder(copy, 4).with_name("global_step_4.orbax-checkpoint-tmp"))
    path, notes = checkpoints(copy).find()
    assert path is None and "not completely written" in notes[0]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("manifest.json", {"step": 4}, r"manifest.json has no written, .*data.batch, .*config.runner"),
        ("manifest.json", [], "manifest.json has no step"),
        ("checksums.json", {}, "checksums.json has no files"),
        ("checksums.json", {"state/_METADATA": "x"}, "checksums.json has no files"),
    ],
)
def test_a_file_without_its_fields_is_named(copy, file, content, words):
    (step_folder(copy, 4) / file).write_text(json.dumps(content))
    for path in ("auto", step_folder(copy, 4)):
        with pytest.raises(CheckpointError, match=words):
            checkpoints(copy, f"runner.resume_dir={path}").find()


def test_a_folder_of_another_step_is_refused(copy):
    path = step_folder(copy, 4).rename(step_folder(copy, 9))
    with pytest.raises(
        CheckpointError, match=r"global_step_9/manifest.json is of step 4, but the folder's name says 9"
    ):
        checkpoints(copy).find()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "step": 9}))
    saved = checkpoints(copy)
    found, _ = saved.find()
    with pytest.raises(CheckpointError, match=r"global_step_9/state is of step 4, but the folder's name says 9"):
        restore(saved, found)


def test_what_was_saved_is_there(copy):
    for harm in (shutil.rmtree, lambda path: (path / "manifest.json").unlink()):
        saved = checkpoints(copy)
        saved.save(6, state(6), POSITION)
        saved._manager.wait_until_finished()
        harm(step_folder(copy, 6))
        with pytest.raises(CheckpointError, match="global_step_6 was saved, but .* is missing"):
            saved.wait()


def test_what_was_saved_is_looked_at_while_the_next_is_written(copy):
    saved = checkpoints(copy)
    saved.save(6, state(6), POSITION)
    saved._manager.wait_until_finished()
    shutil.rmtree(step_folder(copy, 6))
    assert saved.save(8, state(8), POSITION)  # does not wait for this
    with pytest.raises(CheckpointError, match="global_step_6 was saved, but .* is missing"):
        saved.wait()
    assert not step_folder(copy, 8).exists()


def test_a_save_that_orbax_would_leave_out_is_an_error(copy):
    with pytest.raises(CheckpointError, match="holds step 4, so that step 3 cannot be saved"):
        checkpoints(copy).save(3, state(3), POSITION)


def test_a_copy_is_read(copy):
    saved = checkpoints(copy)
    assert (restore(saved, saved.find()[0])["params"] == state(4)["params"]).all()


def test_a_resume_is_of_the_same_data(tmp_path):
    """Through `fit`: another text is an error until it is named; more steps are a line; given batches are not compared."""
    text = tmp_path / "text.txt"
    text.write_text("Now is better than never. " * 200)
    more = ["runner.resume_dir=auto", f"data.train_data_paths=[{text}]", *SMALL, *layout("all")]
    fit(tmp_path, "runner.max_steps=2", *more)
    run = json.loads((step_folder(tmp_path, 2) / "manifest.json").read_text())["run"]
    assert re.fullmatch(r"1 files, 5,200 bytes, modified 20\S+Z, \w{12}", run["data"]["files"])
    assert run["data"]["tokens"].startswith("5,201 tokens, 1 documents, ")
    assert run["architecture"]["rope_theta"] == 10000.0 and len(run["code"]) == 12
    text.write_text("Now is better than newer. " * 200)  # as long as before
    with pytest.raises(jaxpar.ConfigError, match=r"data: 5,201 tokens.*was written with 5,201 tokens"):
        fit(tmp_path, "runner.max_steps=3", *more)
    text.write_text("Although never is often better than right now. " * 200)
    with pytest.raises(jaxpar.ConfigError, match=r"data: 9,401 tokens.*was written with 5,201 tokens.*resume_changes"):
        fit(tmp_path, "runner.max_steps=3", *more)
    with pytest.raises(jaxpar.ConfigError, match=r"actor.model.rope_theta: 500.0, but .* was written with 10000.0"):
        fit(tmp_path, "actor.model.rope_theta=500.0", *more)
    fit(tmp_path, "runner.max_steps=3", *more, "runner.resume_changes=[data]")
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]


def test_a_process_that_died_is_not_an_error_of_the_checkpoint(copy, monkeypatch):
    """Of one process alone it would be; with several, the watchdog finds out who died, and the exit code is 75, not 2."""

    def save() -> None:
        with checkpoints(copy)._reported("write"):
            raise jax.errors.JaxRuntimeError("Gloo AllGather failed: Connection reset by peer")

    with pytest.raises(CheckpointError, match="cannot write a checkpoint .*Connection reset by peer"):
        save()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(jax.errors.JaxRuntimeError):
        save()
