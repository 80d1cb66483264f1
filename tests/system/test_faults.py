"""What a run survives, and how it ends otherwise: real processes, real signals, a disk that is really full."""

import contextlib
import errno
import io
import itertools
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runs import JAXPAR, QUICKSTART, SMALL, environment, fit, layout, losses, metrics, start, start_two
from support import make_mesh

import jaxpar
from jaxpar.run.metrics import MetricsFile
from jaxpar.run.replicas import ReplicaError, check_replicas
from jaxpar.run.step_log import NonFiniteError
from jaxpar.step.loss_scale import DynamicLossScale

KILLS = 50
RUN = ["runner.resume_dir=auto", *SMALL, *layout("dp4")]


@pytest.fixture
def cached(tmp_path) -> dict[str, str]:
    """Environment variables with which a restart does not compile again."""
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1800)
def test_kills_at_any_moment_lose_and_double_nothing(tmp_path, cached):
    """A save is in progress nearly all the time. In the end, steps, losses and tokens are bitwise those of a run
    without kills: no sample was lost or read twice, and no state was torn."""
    run = [*RUN, "runner.save_interval=1", "runner.keep_checkpoints=2", "actor.lr_sched.lr_decay_iters=1000"]
    rng = random.Random(0)
    saved, during_save, resumed_from = 0, 0, []
    for _ in range(KILLS):
        process = start(tmp_path / "killed", "runner.max_steps=100000", *run, **cached)
        early = rng.random() < 0.1  # before the first step, while the process starts
        lines = [] if early else read_until(process, r"step \d+/")
        time.sleep(rng.uniform(0, 5) if early else rng.uniform(0, 1.5))
        process.kill()
        lines += process.communicate()[0].splitlines()
        names = [path.name for path in (tmp_path / "killed/quickstart").glob("checkpoints/*")]
        during_save += any("tmp" in name for name in names)
        if resumed := [int(m[1]) for line in lines if (m := re.match(r"resumed from .*global_step_(\d+)$", line))]:
            # The last checkpoint that was complete at the previous kill is there, and no older one is used.
            assert resumed[0] == saved
            resumed_from.append(resumed[0])
        else:
            assert early or saved == 0, lines
        saved = max((int(m[1]) for name in names if (m := re.fullmatch(r"global_step_(\d+)", name))), default=0)
        assert not any("Traceback" in line for line in lines), lines
    assert during_save >= KILLS // 5, "the kills missed the saves"
    assert len(set(resumed_from)) >= KILLS // 2
    last = saved + 5
    for folder in ("killed", "whole"):
        interval = [] if folder == "killed" else ["runner.save_interval=-1"]
        output = start(tmp_path / folder, f"runner.max_steps={last}", *run, *interval, **cached).communicate()[0]
        assert f"done: step {last}" in output, output
    killed, whole = metrics(tmp_path / "killed"), metrics(tmp_path / "whole")
    for key in ("step", "loss", "grad_norm", "tokens"):
        assert [row[key] for row in killed] == [row[key] for row in whole], key
    manifest = json.loads((tmp_path / f"killed/quickstart/checkpoints/global_step_{last}/manifest.json").read_text())
    assert manifest["data"]["batch"] == manifest["step"] == last == len(whole)
    print(f"{KILLS} kills, {during_save} left an unfinished save, {last} steps")


@pytest.mark.slow
@pytest.mark.alone
def test_sigusr1_loses_no_step(tmp_path, cached):
    process = start(tmp_path, "runner.max_steps=100000", *RUN, **cached)
    read_until(process, r"step 5/")
    process.send_signal(signal.SIGUSR1)
    before = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert time.monotonic() - before < 30  # Slurm's grace time
    done = metrics(tmp_path)[-1]["step"]
    assert (tmp_path / f"quickstart/checkpoints/global_step_{done}").is_dir()


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(tmp_path, cached):
    process = start(tmp_path, "runner.max_steps=30", *RUN, **cached)
    read_until(process, r"step 2/")
    process.stdout.close()  # `| tee` dies
    assert process.wait(300) == 0
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 31))


@pytest.mark.slow
def test_a_closed_terminal_saves_and_stops(tmp_path, cached):
    """The terminal is gone when the run wants to say so; the next start goes on."""
    command = [JAXPAR, "train", QUICKSTART, f"runner.output_dir={tmp_path}", "runner.max_steps=100000", *RUN]
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        os.execve(JAXPAR, list(map(str, command)), environment(**cached))
    with contextlib.suppress(OSError):
        while not (tmp_path / "quickstart/metrics.jsonl").exists() or len(metrics(tmp_path)) < 3:
            os.read(terminal, 1 << 16)
    os.close(terminal)  # the kernel sends SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    saved = len(metrics(tmp_path))
    assert (tmp_path / f"quickstart/checkpoints/global_step_{saved}/manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("full", ["standard output", "metrics.jsonl"])
def test_a_full_disk_under_output_or_metrics_is_named_and_the_run_saved(tmp_path, monkeypatch, full):
    class Output(io.StringIO):
        def write(self, text):
            if full == "standard output" and text.startswith("step 3/"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(text)

    class Metrics(MetricsFile):
        def step(self, row):
            if full == "metrics.jsonl" and row["step"] == 3:
                self._file = open("/dev/full", "a")  # noqa: SIM115
            super().step(row)

    monkeypatch.setattr(sys, "stdout", Output())
    monkeypatch.setattr("jaxpar.run.metrics.MetricsFile", Metrics)
    with pytest.raises(jaxpar.HookError, match=rf"{full}: No space left on device"):
        fit(tmp_path, "runner.max_steps=30", *RUN)
    assert (tmp_path / "quickstart/checkpoints/global_step_4/manifest.json").exists()


@pytest.mark.slow
def test_two_processes_write_a_damaged_token_cache_anew_together(tmp_path, cached):
    run = [*SMALL, *layout("dp4"), "runner.max_steps=3"]

    def outputs():
        processes = start_two(tmp_path, *run, **cached)
        found = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], found
        return found

    assert "written anew" not in outputs()[0]
    before = losses(tmp_path)
    (tokens,) = tmp_path.glob("token_cache/*/tokens")
    tokens.write_bytes(b"\xff" * tokens.stat().st_size)  # ids beyond the vocabulary
    assert outputs()[0].count("is damaged and is written anew") == 1
    assert losses(tmp_path) == before


@pytest.mark.slow
def test_a_full_disk_loses_nothing_earlier(tmp_path):
    disk = tmp_path / "small"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no small disk can be mounted here: {mount.stderr.strip()}")
    try:
        process = start(disk, "runner.max_steps=20", "runner.save_interval=1", *RUN)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2, output
        assert "Traceback" not in output
        assert re.search(r"error: cannot write a checkpoint in .*No space left on device", output), output
        steps = sorted(int(p.name.rpartition("_")[2]) for p in disk.glob("quickstart/checkpoints/global_step_?"))
        assert steps and f"the newest complete one is {disk}/quickstart/checkpoints/global_step_{steps[-1]}" in output
        subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
        fit(disk, f"runner.max_steps={steps[-1] + 2}", *RUN)  # resumes from it
        fit(tmp_path / "whole", f"runner.max_steps={steps[-1] + 2}", *RUN)
        assert losses(disk) == losses(tmp_path / "whole")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        process = start(disk, "runner.max_steps=20", *RUN)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2 and "Traceback" not in output
        assert re.search(r"error: .*small/quickstart/.*Read-only file system", output), output
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # this process may still have a file of it open


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(tmp_path, cached, victim):
    processes = start_two(tmp_path, "runner.max_steps=100000", "runner.log_interval=20", *RUN, **cached)
    read_until(processes[0], r"step 20/")
    processes[victim].kill()
    killed = time.monotonic()
    output, _ = processes[1 - victim].communicate(timeout=90)
    assert time.monotonic() - killed < 60
    assert processes[1 - victim].returncode == 75, output
    step = r"step \d+, phase \w+"
    named = r"its coordinator at localhost:\d+ is gone" if victim == 0 else rf"on \S+ died or hangs: .* s ago in {step}"
    assert re.search(rf"error: process {victim} .*{named}", output) or (victim == 0 and re.search(named, output)), (
        output
    )
    assert re.search(rf"process {1 - victim} exits in {step}", output), output
    processes[victim].communicate()


@pytest.mark.slow
@pytest.mark.alone
def test_a_process_that_waits_for_its_data_ends_both(tmp_path, cached):
    """The worker of one loader is stopped. The process and its heartbeat live on, but it makes no progress."""
    run = [*RUN, "runner.max_steps=100000", "runner.log_interval=20", "data.num_workers=1", "runner.stall_timeout=40"]
    processes = start_two(tmp_path, *run, **cached)
    read_until(processes[0], r"step 20/")
    children = subprocess.run(["pgrep", "-P", str(processes[1].pid)], capture_output=True, text=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    codes = [process.wait(timeout=120) for process in processes]
    for child in children:  # they hold the pipe open
        os.kill(int(child), signal.SIGKILL)
    assert codes == [75, 75]
    place = r"makes no progress: it has been in step \d+, phase reading the batch for \d+ s"
    for process in processes:
        output = process.communicate()[0]
        assert re.search(rf"error: process 1 on \S+ {place}", output), output


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    """Weight decay moves the parameters so far that all later gradients are NaN."""
    wild = [
        "actor.optim.lr=1000", "actor.optim.weight_decay=1e30", "actor.lr_sched.min_lr=0", "runner.max_skipped_steps=3",
        "runner.save_interval=1",
    ]  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"the last 3 steps \(\d+ to \d+\)"):
        fit(tmp_path, "runner.max_steps=20", *RUN, *wild)
    rows = metrics(tmp_path)
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert len(skipped) == 3 and skipped[-1] == rows[-1]["step"] == skipped[0] + 2
    assert len({row["learning_rate"] for row in rows if row["skipped"]}) == 1  # the schedule waits
    # With the parameters of the last checkpoint, the batch that was written gives the same result again.
    trainer = jaxpar.Trainer(jaxpar.load_config(QUICKSTART, [f"runner.output_dir={tmp_path}", *RUN, *wild]))
    before = jax.tree.map(np.asarray, trainer.state)
    dumped = dict(np.load(tmp_path / f"quickstart/skipped_batches/step_{skipped[0]}.process_0.npz"))
    np.testing.assert_array_equal(dumped.pop("rows"), range(16))
    loss, grads = trainer.loss_and_grads(dumped)
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves((loss, grads)))
    trained = trainer.train_step(dumped)
    assert trained["skipped"] == 1
    assert trainer.state["step"] == before["step"] + 1
    for part in ("params", "opt_state"):
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(before[part]), jax.tree.leaves(trainer.state[part]), strict=True
        ):
            np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_dynamic_loss_scale_falls_until_fp16_holds_and_is_resumed(tmp_path):
    run = [*RUN, "actor.model.precision=fp16", "actor.optim.loss_scale_window=3", "runner.max_skipped_steps=1"]
    fit(tmp_path / "whole", "runner.max_steps=40", *run)
    rows = metrics(tmp_path / "whole")
    scales, skipped = [row["loss_scale"] for row in rows], [row["skipped"] for row in rows]
    assert scales[0] == 2**32 and skipped[0]
    assert not list(tmp_path.glob("whole/quickstart/skipped_batches/*"))  # an overflow is not the fault of the batch
    first = skipped.index(False)
    # The first overflow leaves the scale as it is; each later one halves it.
    assert scales[: first + 1] == [2**32] * 2 + [2.0**n for n in range(31, 31 - first + 1, -1)]
    assert any(after == 2 * before for before, after in itertools.pairwise(scales))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    fit(tmp_path / "halves", f"runner.max_steps={first + 2}", *run)
    fit(tmp_path / "halves", "runner.max_steps=40", *run)
    assert [row["loss_scale"] for row in metrics(tmp_path / "halves")] == scales
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


def test_dynamic_loss_scale_by_hand():
    rule = DynamicLossScale(initial=8.0, minimum=2.0, window=2, hysteresis=2)
    state, scales = rule.init(), []
    for finite in [True, True, False, False, False, True, False, True, True, False, False]:
        state = rule.update(state, jnp.bool_(finite))
        scales.append(float(state["scale"]))
    assert scales == [8, 16, 16, 8, 4, 4, 2, 2, 4, 4, 2]


def test_replicas_that_differ_are_named():
    mesh = make_mesh((2, 1, 2, 1, 1))
    sharding = NamedSharding(mesh, P("tp"))
    value = np.arange(8, dtype=np.float32)

    def on(device: jax.Device, index: tuple, flip: bool) -> jax.Array:
        words = value[index].copy().view(np.uint32)
        words[0] ^= flip  # the lowest bit of the mantissa
        return jax.device_put(words.view(np.float32), device)

    places = sharding.addressable_devices_indices_map((8,)).items()
    good = jax.device_put(value, sharding)
    check_replicas({"a": good, "b": good})
    odd = mesh.devices.flatten()[-1]
    shards = [on(device, index, device == odd) for device, index in places]
    bad = jax.make_array_from_single_device_arrays((8,), sharding, shards)
    with pytest.raises(ReplicaError, match=rf"1 of 2 parameters differ .*: b on {odd}\. "):
        check_replicas({"a": good, "b": bad})


def read_until(process: subprocess.Popen, pattern: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if re.match(pattern, line):
            return lines
    raise AssertionError(f"ended before {pattern!r}: {lines}")
