"""What a cluster does to a run. A new fault is a new function here.

Each starts runs, harms them or their folder, and says how they must end (the tables of `jaxpar/run/README.md` and
`jaxpar/checkpoint/README.md`). What it draws, it draws from `life.rng`.
"""

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from soak.life import Life
from soak.run import check

FAULTS: list[Callable[[Life], None]] = []
# Settings with which a resume is another run, or no run at all.
OTHER_RUNS = [
    "actor.model.rope_theta=500.0", "data.seed=99", "data.shuffle=False", "actor.optim.adam_beta2=0.9", "actor.optim.adam_eps=1e-6",
    "runner.seq_length=64", "actor.global_batch_size=32", "actor.seed=5", "actor.model.window_size=[7,0]",
    "actor.global_batch_size=18.5", "actor.model.hidden_size=31", "actor.optim.lr=fast", "runner.sav_interval=3",
]  # fmt: skip
HARMLESS = [
    "runner.check_replicas_interval=2", "actor.model.recompute_granularity=full actor.model.recompute_method=uniform "
    "actor.model.recompute_num_layers=1", "data.num_workers=1", "runner.stall_timeout=100", "runner.verify_checkpoint=True",
]  # fmt: skip


def fault(function: Callable[[Life], None]) -> Callable[[Life], None]:
    FAULTS.append(function)
    return function


@fault
def kill_at_a_step(life: Life) -> None:
    run = life.start()
    life.wait_for_step(run)
    run.send(signal.SIGKILL)
    life.end(run, -signal.SIGKILL, leaves="run.lock tmp")


@fault
def kill_in_a_save(life: Life) -> None:
    run = life.start()
    life.wait_for_save(run)
    run.send(signal.SIGKILL)
    life.end(run, -signal.SIGKILL, leaves="run.lock tmp")


@fault
def kill_while_it_starts(life: Life) -> None:
    run = life.start()
    time.sleep(life.draw(0, 6, "after seconds"))
    run.send(signal.SIGKILL)
    life.end(run, -signal.SIGKILL, leaves="run.lock tmp")


@fault
def kill_one_of_two(life: Life) -> None:
    run = life.start(processes=2)
    victim = life.choose([0, 1], "process")
    life.choose([life.wait_for_step, life.wait_for_save])(run)
    run.processes[victim].kill()
    codes = [75, 75]
    codes[victim] = -signal.SIGKILL
    life.end(run, codes, "error: process", leaves="run.lock tmp")


@fault
def stop_one_of_two(life: Life) -> None:
    """SIGSTOP: it has not died, and makes no progress."""
    run = life.start(processes=2)
    life.wait_for_step(run)
    run.processes[1].send_signal(signal.SIGSTOP)
    run.wait_until(lambda: run.processes[0].poll() is not None, "end of the other")
    run.processes[1].kill()
    life.end(run, [75, -signal.SIGKILL], r"error: process 1 on \S+ died or hangs", leaves="run.lock tmp")


@fault
def stop_by_signal(life: Life) -> None:
    run = life.start()
    number = life.choose([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
    receiver = int(life.draw(0, len(run.processes), "process"))
    life.choose([life.wait_for_step, life.wait_for_save])(run)
    run.processes[receiver].send_signal(number)
    life.end(run, 128 + number, r"saved and stopped after step \d+")
    last = max(life.checkpoints, default=0)
    check(life.done or [last] == run.found(r"saved and stopped after step (\d+)") == [len(life.rows)], f"saved {last}")


@fault
def reader_of_output_gone(life: Life) -> None:
    run = life.start()
    life.wait_for_step(run)
    run.deaf = True
    rows = len(life.metrics.read_bytes().splitlines()) if life.metrics.exists() else 0
    run.wait_until(lambda: len(life.metrics.read_bytes().splitlines()) > rows + 5, "step after that")
    run.send(signal.SIGTERM)
    life.end(run, 128 + signal.SIGTERM)


@fault
def disk_full(life: Life) -> None:
    if shutil.disk_usage(life.folder).free > 1e9:
        return life.notes.append("left out: no small disk could be mounted")
    filler, left = life.folder / "filler", int(life.draw(0, 300_000, "bytes left"))
    if at_start := life.choose([True, False], "at the start"):
        fill(filler, left)
    run = life.start()
    if not at_start:
        life.wait_for_step(run)
    run.wait_until(lambda: fill(filler, left), "end")
    filler.unlink(missing_ok=True)
    drop_torn_row(life)
    life.end(run, 2, "No space left on device", leaves="tmp")


@fault
def torn_newest_checkpoint(life: Life) -> None:
    train(life, 2)
    torn = life.newest()
    harm(life, torn)
    del life.checkpoints[max(life.checkpoints)]
    run = life.start()
    life.stop(run, f"{torn.name} is torn and was skipped")
    check(torn.with_name(f"torn_{torn.name}").exists(), f"torn_{torn.name} is not there")


@fault
def all_checkpoints_torn(life: Life) -> None:
    train(life, 1)
    aside = shutil.copytree(life.experiment, life.folder / "aside", symlinks=True)
    for path in life.checkpoints_folder.glob("global_step_*"):
        (path / "manifest.json").unlink(missing_ok=True)
    life.refused("none of the .* is complete")
    shutil.rmtree(life.experiment)
    aside.rename(life.experiment)
    life.look()


@fault
def flipped_bit(life: Life) -> None:
    train(life, 1)
    file, place = life.choose(arrays(life.newest())), life.draw(0, 1, "at")
    content = file.read_bytes()
    position = int(place * len(content))
    file.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
    life.refused(f"{file.name} is damaged", "runner.verify_checkpoint=True")
    file.write_bytes(content)
    life.look()


@fault
def unreadable_checkpoint(life: Life) -> None:
    train(life, 1)
    with unreadable(life.newest() / life.choose(["manifest.json", "checksums.json", "commit_success.txt"])) as path:
        life.refused(f"{path.name} cannot be read")
    life.look()


@fault
def damaged_metrics(life: Life) -> None:
    train(life, 1)
    lines = life.metrics.read_bytes().splitlines(keepends=True)
    place = int(life.draw(0, len(lines) + 1, "before line"))
    kind = life.choose(["torn", "bad byte", "doubled"])
    row = lines[min(place, len(lines) - 1)]
    middle = len(row) // 2
    more = {"torn": row[:middle] + b"\n", "bad byte": row[:middle] + b"\xff" + row[middle:], "doubled": row}[kind]
    life.metrics.write_bytes(b"".join([*lines[:place], more, *lines[place:]]))
    life.stop(life.start(), r"1 rows were dropped" if kind == "doubled" else r"1 lines that are damaged were dropped")


@fault
def damaged_token_cache(life: Life) -> None:
    train(life, 1)
    (folder,) = life.folder.glob("token_cache/*")
    kind, file = life.choose(["bytes", "cut", "gone"]), folder / life.choose(["tokens", "doc_ends", "counts.json"])
    if kind == "bytes":
        file.write_bytes(b"\xff" * file.stat().st_size)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    life.stop(life.start(), "is damaged and is written anew")


@fault
def lock_of_a_dead_machine(life: Life) -> None:
    """It is watched for 60 s."""
    life.experiment.mkdir(exist_ok=True)
    holder = {"host": "node7", "pid": 12, "started": "then", "heartbeat": "then", "machine": "another", "ticks": "1"}
    (life.experiment / "run.lock").write_text(json.dumps(holder))
    life.stop(life.start(), "taken over from the run on host node7")


@fault
def second_run_in_the_folder(life: Life) -> None:
    run = life.start()
    life.wait_for_step(run)
    run.send(signal.SIGSTOP)  # so that it does not end before the second one begins
    second = life.start()
    life.end(second, 2, "belongs to the run on host", looks=False)
    run.send(signal.SIGCONT)
    life.stop(run)


@fault
def take_over(life: Life) -> None:
    run = life.start()
    life.wait_for_step(run)
    run.send(signal.SIGSTOP)
    if run.over:
        return life.end(run, 0)
    second = life.start("--take-over")
    second.wait_until(lambda: "waiting for its end" in second.output, "take-over")
    run.send(signal.SIGCONT)
    life.end(run, 2, "was taken over by the run on host", looks=False)
    life.wait_for_step(second)
    second.send(signal.SIGTERM)
    life.end(second, 128 + signal.SIGTERM, exact=False)


@fault
def moved_folder(life: Life) -> None:
    run = life.start()
    life.choose([life.wait_for_step, life.wait_for_save])(run)
    elsewhere = life.experiment.rename(life.folder / "elsewhere")
    run.wait()
    check(not life.experiment.exists(), "it has made its folder anew")
    elsewhere.rename(life.experiment)
    life.end(run, 2, "was moved, deleted or replaced", leaves="run.lock tmp")


@fault
def harmless_edit(life: Life) -> None:
    edit = life.choose(HARMLESS)
    train(life, 1)
    life.stop(life.start(*edit.split()), "changed since")


@fault
def edit_that_makes_another_run(life: Life) -> None:
    train(life, 1)
    edit = life.choose(OTHER_RUNS)
    life.refused(rf"error: .*{edit.partition('=')[0].rpartition('.')[2]}", edit)


@fault
def processes_that_differ(life: Life) -> None:
    edit = life.choose(["actor.optim.lr=2e-3", "data.seed=99", "actor.model.precision=bf16", "runner.max_steps=300"])
    life.refused(edit.partition("=")[0], processes=2, each=((), (edit,)))


def train(life: Life, checkpoints: int) -> None:
    """Trains until the life has so many."""
    while len(life.checkpoints) < checkpoints:
        life.stop(life.start())


def fill(file: Path, left: int) -> None:
    """Writes until the disk has only `left` bytes."""
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as stream:
        while (room := shutil.disk_usage(file.parent).free - left) > 0:
            stream.write(b"\0" * min(room, 1 << 20))


def drop_torn_row(life: Life) -> None:
    """A row that the full disk has cut is dropped at the next start, with a note; the checks want whole ones."""
    if life.metrics.exists() and not (content := life.metrics.read_bytes()).endswith(b"\n"):
        life.metrics.write_bytes(content[: content.rfind(b"\n") + 1])


def arrays(checkpoint: Path) -> list[Path]:
    """The files that have a checksum."""
    return [checkpoint / name for name in sorted(json.loads((checkpoint / "checksums.json").read_bytes()))]


def harm(life: Life, checkpoint: Path) -> None:
    """Removes or cuts one of a checkpoint's files."""
    file = life.choose([*arrays(checkpoint), checkpoint / "manifest.json", checkpoint / "checksums.json"])
    if life.choose([True, False], "cut"):
        file.write_bytes(file.read_bytes()[: int(life.draw(0, 1, "to") * (file.stat().st_size - 1))])
    else:
        file.unlink()


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[Path]:
    """Neither missing nor readable, also for root."""
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(path)
    try:
        yield path
    finally:
        path.unlink()
        path.write_bytes(content)
