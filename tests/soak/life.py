"""One experiment of the soak: its processes, and what must be true of its folder whenever no process runs."""

import collections
import contextlib
import json
import random
import re
import signal
import time
import zlib
from pathlib import Path
from typing import Any

from runs import LAYOUTS, SMALL, layout, train_command
from soak.run import Run, Violation, check

STEPS = 150  # of a life
KEEP = 3  # checkpoints
TOLERANCE = 1e-5  # relative, of float32 losses on other layouts
RUN = [
    *SMALL,
    "runner.resume_dir=auto",
    f"runner.max_steps={STEPS}",
    f"runner.keep_checkpoints={KEEP}",
    f"actor.lr_sched.lr_decay_iters={2 * STEPS}",
    "actor.optim.lr=5e-4",
]
# Layout of `runs.LAYOUTS` and number of processes, which share its devices.
PLACES = [
    ("one", 1), ("dp4", 1), ("zero3", 1), ("two", 1), ("pp4-tp2", 1), ("cp4", 1), ("interleaved", 1), ("dp4", 2), ("two", 2),
]  # fmt: skip
WORDS = re.compile(r"^(error|note|\S*torn)|resumed from|dropped|damaged|changed since|saved and stopped|stops|full")


class Life:
    """An experiment's folder, and what was in it when it was last looked at.

    Args:
      folder: an empty one, perhaps a small disk of its own.
      name: seed and number of the life; all that is drawn follows from it.
      data_seed: another order of the data.

    Attributes:
      reference: the rows of a run of the same settings that nothing has disturbed.
      done: whether it was trained to its last step.
    """

    def __init__(self, folder: Path, name: str, data_seed: int):
        self.folder, self.name = folder, name
        self.reference: list[dict] = []
        folder.mkdir()
        self.own = [*RUN, f"data.seed={data_seed}"]
        self.experiment = folder / "quickstart"
        self.checkpoints_folder = self.experiment / "checkpoints"
        self.metrics = self.experiment / "metrics.jsonl"
        self.rng = random.Random(name)
        self.checkpoints: dict[int, dict[str, int]] = {}  # step → checksum of each file, of those that are complete
        self.rows: list[dict] = []
        self.runs: list[Run] = []  # of this turn
        self.notes: list[str] = []
        self.figures = collections.Counter()
        self.largest = 0.0  # relative difference of two losses
        self.done = False

    # What a fault does

    def turn(self, number: int) -> None:
        """What is drawn in a turn does not depend on what was drawn before."""
        self.rng, self.runs, self.notes = random.Random(f"{self.name}/{number}"), [], []

    def start(self, *more: str, processes: int = 0, each: tuple[tuple[str, ...], ...] = ()) -> Run:
        """Starts a run on a drawn layout.

        Args:
          more: settings.
          processes: their number; 0: a drawn one.
          each: settings of each process.
        """
        name, count = self.rng.choice([place for place in PLACES if processes in (0, place[1])])
        interval, workers = self.rng.choice([1, 2, 3, 5]), self.rng.choice([0, 0, 0, 1])
        devices = f"cluster.num_gpus_per_node={LAYOUTS[name][4] // count}"
        drawn = [devices, f"runner.save_interval={interval}", f"data.num_workers={workers}"]
        settings = [*self.own, *layout(name), *drawn, *more]
        own = each or ((),) * count
        self.notes.append(f"{name}×{count} save_interval {interval} num_workers {workers}")
        run = Run([train_command(self.folder, *settings, *one) for one in own], SOAK_FOLDER=str(self.folder))
        self.runs.append(run)
        self.figures["starts"] += 1
        return run

    def draw(self, low: float, high: float, words: str) -> float:
        number = self.rng.uniform(low, high)
        self.notes.append(f"{words} {number:.3g}")
        return number

    def choose(self, choices: list, words: str = "") -> Any:
        choice = self.rng.choice(choices)
        self.notes.append(f"{words} {getattr(choice, '__name__', getattr(choice, 'name', choice))}".strip())
        return choice

    def wait_for_step(self, run: Run) -> None:
        """Returns some drawn steps after the run's first one, and a moment later."""
        steps, later = int(self.draw(1, 10, "after steps")), self.draw(0, 0.1, "and seconds")
        run.wait_until(lambda: len(run.found(r"^step (\d+)/")) >= steps, "step")
        time.sleep(later)

    def wait_for_save(self, run: Run) -> None:
        """Returns while the run writes a checkpoint, most often."""
        self.wait_for_step(run)
        later = self.draw(0, 0.1, "after the save's begin, seconds")
        run.wait_until(lambda: self._names("*tmp*"), "save")
        time.sleep(later)

    def newest(self) -> Path:
        return self.checkpoints_folder / f"global_step_{max(self.checkpoints)}"

    # How a turn ends

    def end(
        self, run: Run, codes: list[int] | int, *says: str, leaves: str = "", looks: bool = True, exact: bool = True
    ) -> None:
        """Waits for a run's end and looks at everything.

        Args:
          codes: the exit code of each process, or of all. A run that was done before the fault came ends with 0.
          says: patterns that its output must contain, unless it was done before.
          leaves: what may be left: "run.lock", "tmp" (an unfinished checkpoint).
          looks: False while another run has the folder.
          exact: as in `look`.
        """
        found = run.wait()
        self.done = not any(found) and bool(rows := self._rows()) and rows[-1]["step"] == STEPS
        wanted = [codes] * len(found) if isinstance(codes, int) else codes
        check(found == wanted or self.done, f"exit codes {found} instead of {wanted}")
        for pattern in () if self.done else says:
            check(re.search(pattern, run.output), f"it does not say {pattern!r}")
        check("Traceback" not in run.output, "a traceback")
        if looks:
            self.look(run, exact=exact)
            check("run.lock" in leaves or not self._locks(), "run.lock is left")
            check("tmp" in leaves or not self._names("*tmp*"), f"left: {self._names('*tmp*')}")
            self.figures["saves cut"] += bool(self._names("*tmp*"))

    def refused(self, says: str, *more: str, **start: Any) -> None:
        """Starts a run that must not begin: exit code 2, and nothing has changed."""
        before, locked = self.snapshot(), self._locks()
        run = self.start(*more, **start)
        codes = run.wait()
        check(set(codes) == {2}, f"exit codes {codes} instead of 2")
        check(re.search(says, run.output), f"it does not say {says!r}")
        check("Traceback" not in run.output, "a traceback")
        after = self.snapshot()
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        check(not changed, f"a run that was refused has changed {changed}")
        check(locked or not self._locks(), "run.lock is left")
        self._check_processes()

    def stop(self, run: Run, *says: str) -> None:
        """Ends a run by SIGTERM some steps later."""
        self.wait_for_step(run)
        run.send(signal.SIGTERM)
        self.end(run, 128 + signal.SIGTERM, *says)

    def snapshot(self) -> dict[str, int]:
        """Name → checksum of each file of the experiment, links as they are, but for the lock."""
        files = [path for path in self.experiment.rglob("*") if path.is_symlink() or path.is_file()]
        return {
            str(path.relative_to(self.experiment)): 0 if path.is_symlink() else zlib.crc32(path.read_bytes())
            for path in files
            if path.name != "run.lock"
        }

    def look(self, run: Run | None = None, *, exact: bool = True) -> None:
        """Compares the folder with what it was, and with the reference. Uses none of jaxpar's own code.

        Args:
          run: that has ended; without it, nothing may have changed.
          exact: whether it went on from the newest checkpoint that was there before, rather than from a later one.
        """
        self._check_processes()
        before, rows_before = self.checkpoints, self.rows
        after = {
            int(path.name.rpartition("_")[2]): self._sums(path) for path in self._names("global_step_*", tmp=False)
        }
        for step in sorted(before.keys() | after.keys())[-KEEP:]:
            check(after.get(step), f"global_step_{step} is gone or torn, one of the newest {KEEP}")
        newest = max(before, default=0)
        resumed = max(run.found(r"^resumed from .*global_step_(\d+)$"), default=0) if run else 0
        began = bool(resumed or (run and run.found(r"^step (\d+)/")))
        check(
            not began or resumed == newest or (resumed > newest and not exact),
            f"resumed from {resumed} instead of {newest}",
        )
        same = resumed if began or not before else STEPS  # the last step that was not trained again
        changed = [step for step in before.keys() & after.keys() if step <= same and before[step] != after[step]]
        check(not changed, f"the checkpoints of steps {changed} have changed")
        rows = self._rows()
        steps = [row["step"] for row in rows]
        last = max(after, default=0)
        check(steps == list(range(1, len(steps) + 1)), f"metrics.jsonl has the steps {steps}")
        check(len(steps) >= last, f"metrics.jsonl ends at {len(steps)}, before checkpoint {last}")
        check(rows[:same][: len(rows_before)] == rows_before[:same], f"rows up to step {same} have changed")
        for row in rows:
            self._compare(row, self.reference[row["step"] - 1])
        self.figures["losses compared"] += max(0, len(rows) - same)  # each once
        self.figures["steps trained again"] += max(0, len(rows_before) - resumed) if began else 0
        self.checkpoints, self.rows = {step: sums for step, sums in after.items() if sums}, rows

    def _compare(self, row: dict, true: dict) -> None:
        difference = abs(row["loss"] - true["loss"]) / true["loss"]
        self.largest = max(self.largest, difference)
        check(difference <= TOLERANCE, f"step {row['step']}: loss {row['loss']} instead of {true['loss']}")
        for key in ("tokens", "learning_rate", "skipped"):
            check(row[key] == true[key], f"step {row['step']}: {key} {row[key]} instead of {true[key]}")

    def _rows(self) -> list[dict]:
        try:
            return [json.loads(line) for line in self.metrics.read_bytes().splitlines()]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise Violation(f"metrics.jsonl has a damaged line: {error}") from error

    def _locks(self) -> list[Path]:
        return list(self.experiment.glob("run.lock*"))

    def _names(self, pattern: str, tmp: bool = True) -> list[Path]:
        found = self.checkpoints_folder.glob(pattern)
        return [path for path in found if tmp or re.fullmatch(r"global_step_\d+", path.name)]

    def _sums(self, path: Path) -> dict[str, int]:
        """The checksum of each file of a checkpoint, or nothing if it is not complete."""
        try:
            manifest = json.loads((path / "manifest.json").read_bytes())
            listed = json.loads((path / "checksums.json").read_bytes())
            sums = {
                str(file.relative_to(path)): zlib.crc32(file.read_bytes()) for file in path.rglob("*") if file.is_file()
            }
        except (OSError, ValueError):
            return {}
        if not (path / "commit_success.txt").exists() or any(
            sums.get(name) != crc for name, (_, crc) in listed.items()
        ):
            return {}
        step = int(path.name.rpartition("_")[2])
        position = manifest["step"], manifest["data"]["batch"]
        check(position == (step, step), f"{path.name} has step and position {position}")
        self.figures["checkpoints verified"] += 1
        return sums

    def _check_processes(self) -> None:
        """No process of this life is left, nor a child of one; its environment names the folder."""
        mark, left = f"SOAK_FOLDER={self.folder}".encode(), []
        for _ in range(100):
            left = [
                path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if mark in _read(path).split(b"\0")
            ]
            if not left:
                return
            time.sleep(0.05)
        check(not left, f"processes {left} are left")

    def close(self) -> None:
        for run in self.runs:
            for process in run.processes:
                with contextlib.suppress(OSError):
                    process.kill()
                process.wait()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
