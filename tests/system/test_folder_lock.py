"""One experiment, one run: who has the folder, when another start may take it, and how its loss is noticed."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from runs import QUICKSTART, SMALL, layout, metrics, start, start_two
from test_faults import read_until

import jaxpar
from jaxpar.run import folder_lock
from jaxpar.run.folder_lock import FILE, FolderLock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT", 0.05)
    monkeypatch.setattr(folder_lock, "STALE", 0.4)


def other_machine(folder: Path, **fields: object) -> None:
    """The lock of a run on another machine."""
    holder = {"host": "node7", "pid": 12, "started": "then", "heartbeat": "then", "machine": "another", "ticks": "1"}
    (folder / FILE).write_text(json.dumps({**holder, **fields}))


def test_a_second_run_is_told_who_has_the_folder(tmp_path):
    with FolderLock(tmp_path / "new") as lock:
        time.sleep(0.2)  # a few heartbeats
        with pytest.raises(
            jaxpar.ConfigError, match=rf"new belongs to the run on host \S+, pid {os.getpid()}, started"
        ):
            FolderLock(tmp_path / "new").__enter__()
        assert not lock.problem()
    assert not (tmp_path / "new").exists()  # nothing was written
    with FolderLock(tmp_path / "new"):  # it was given back
        pass


@pytest.mark.parametrize("end", ["killed", "reaped"])
def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path, end, monkeypatch, capsys):
    monkeypatch.setattr(folder_lock, "STALE", 1000)
    code = f"""
import time
from jaxpar.run.folder_lock import FolderLock
FolderLock(__import__("pathlib").Path({str(tmp_path)!r}))._acquire()
print("has it", flush=True)
time.sleep(1000)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    with pytest.raises(jaxpar.ConfigError, match=f"pid {process.pid}"):
        FolderLock(tmp_path).__enter__()
    process.kill()
    while end == "killed" and folder_lock._ticks(process.pid):  # then it is a zombie
        time.sleep(0.01)
    if end == "reaped":
        process.wait()
    with FolderLock(tmp_path):
        assert f"taken over from the run on host {folder_lock.socket.gethostname()}, pid {process.pid}" in (
            capsys.readouterr().err
        )
    process.wait()


def test_a_pid_that_another_process_has_now_is_no_sign_of_life(tmp_path):
    other_machine(tmp_path, machine=folder_lock._machine(), pid=os.getpid(), ticks="1")
    with FolderLock(tmp_path) as lock:
        assert not lock.problem()


def test_another_machine_is_watched_for_heartbeats_whatever_its_clock_says(tmp_path):
    other_machine(tmp_path)
    before = time.monotonic()
    with FolderLock(tmp_path):
        assert time.monotonic() - before > 0.4
    holder = FolderLock(tmp_path)
    holder._own["machine"] = "another"
    with holder:
        other = FolderLock(tmp_path)
        holder._own["beat"] = "later"  # as a clock that has gone on by a second
        with pytest.raises(jaxpar.ConfigError, match="belongs to"):
            other.__enter__()


def test_take_over_waits_until_the_other_run_has_ended(tmp_path):
    with FolderLock(tmp_path) as first:
        taker = threading.Thread(target=lambda: entered.append(FolderLock(tmp_path, take_over=True).__enter__()))
        entered = []
        taker.start()
        time.sleep(0.3)  # some of its heartbeats, which do not reach the second's file
        assert f"taken over by the run on host {folder_lock.socket.gethostname()}" in first.problem()
        assert not entered
    taker.join(5)
    assert entered and not entered[0].problem()
    entered[0].__exit__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["moved", "deleted", "replaced"])
def test_a_folder_that_is_gone_ends_the_run_at_the_next_step(tmp_path, harm):
    class Harm(jaxpar.Hook):
        steps = 0

        def begin(self, step):
            self.steps = step
            if step == 2:
                folder = tmp_path / "quickstart"
                shutil.rmtree(folder) if harm == "deleted" else folder.rename(tmp_path / "elsewhere")
                if harm == "replaced":
                    folder.mkdir()

    settings = [f"runner.output_dir={tmp_path}", "runner.max_steps=6", *SMALL, *layout("all")]
    hook = Harm()
    with pytest.raises(jaxpar.ConfigError, match="quickstart was moved, deleted or replaced"):
        jaxpar.Trainer(jaxpar.load_config(QUICKSTART, settings)).fit(hooks=[hook])
    assert hook.steps == 2
    assert not list((tmp_path / "quickstart").glob("*"))


@pytest.mark.timeout(60)
def test_a_save_that_cannot_end_does_not_hold_a_run_whose_folder_is_gone(tmp_path, monkeypatch):
    """As when one of several processes has failed in it, and Orbax waits for that one for an hour."""

    class Move(jaxpar.Hook):
        def begin(self, step):
            if step == 2:
                (tmp_path / "quickstart").rename(tmp_path / "elsewhere")
                draft = tmp_path / "quickstart/checkpoints/global_step_5.orbax-checkpoint-tmp/state"
                draft.mkdir(parents=True)  # as TensorStore makes it anew
                monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", lambda _: time.sleep(1000))

    monkeypatch.setattr("jaxpar.checkpoint.checkpoints._PATIENCE", 0.1, raising=False)
    settings = [f"runner.output_dir={tmp_path}", "runner.max_steps=6", "runner.save_interval=5", *SMALL, *layout("one")]
    with pytest.raises(jaxpar.ConfigError, match="quickstart was moved, deleted or replaced"):
        trainer = jaxpar.Trainer(jaxpar.load_config(QUICKSTART, settings))
        trainer.fit(hooks=[Move()])
    assert not (tmp_path / "quickstart").exists()


@pytest.mark.slow
def test_two_starts_of_one_command(tmp_path):
    """The second ends with 2 and changes nothing; with --take-over the first one ends."""
    run = ["runner.resume_dir=auto", "runner.save_interval=5", "runner.max_steps=100000", *SMALL, *layout("dp4")]
    first = start(tmp_path, *run)
    read_until(first, r"step 5/")
    second = start(tmp_path, *run)
    output, _ = second.communicate(timeout=120)
    assert (
        second.returncode == 2
        and f"belongs to the run on host {folder_lock.socket.gethostname()}, pid {first.pid}" in output
    )
    read_until(first, r"step \d+/")
    third = start(tmp_path, "--take-over", *run)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 2 and f"pid {third.pid}" in output and "Traceback" not in output, output
    read_until(third, r"step \d+/")
    third.terminate()
    output, _ = third.communicate(timeout=120)
    assert third.returncode == 143, output
    steps = [row["step"] for row in metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert not (tmp_path / "quickstart" / FILE).exists()


@pytest.mark.slow
def test_two_processes_wait_for_a_sign_of_life(tmp_path):
    """Longer than the 30 s after which Gloo gives up a run's first collective."""
    (tmp_path / "quickstart").mkdir()
    other_machine(tmp_path / "quickstart")
    processes = start_two(tmp_path, "runner.max_steps=2", *SMALL, *layout("two"))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "waiting up to 60 s" in outputs[0] and "taken over from the run on host node7, pid 12" in outputs[0]
