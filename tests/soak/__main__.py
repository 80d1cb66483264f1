"""Does for an hour what a cluster does to a run, and checks after each fault that nothing was lost, doubled or changed.

    python -m tests.soak --seed 1 --minutes 60 --folder /tmp/soak

An experiment lives through ten faults of `faults.py`, drawn from the seed and the experiment's number alone, and is then trained
to its end; the next one begins, with other data. The first violation ends the soak with exit code 1, keeps the folder and prints
the command that repeats the experiment.
"""

import argparse
import collections
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from runs import layout, metrics, train_command
from soak.faults import FAULTS
from soak.life import STEPS, WORDS, Life
from soak.run import Run, Violation, cached, check

FAULTS_A_LIFE = 10
DISK = "40m"


class Report:
    """What has been seen, by kind of fault."""

    def __init__(self) -> None:
        self.count: collections.Counter[str] = collections.Counter()
        self.codes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.lines: dict[str, dict[str, str]] = collections.defaultdict(dict)  # without their numbers → as seen
        self.figures: collections.Counter[str] = collections.Counter()
        self.lives, self.largest = 0, 0.0

    def add(self, kind: str, life: Life) -> None:
        self.count[kind] += 1
        for run in life.runs:
            self.codes[kind].update(process.poll() for process in run.processes)
            for line in filter(WORDS.search, run.output.splitlines()):
                line = line.replace(str(life.folder), "FOLDER")
                self.lines[kind].setdefault(re.sub(r"[\d.,]+", "N", line)[:60], line[:240])

    def add_life(self, life: Life) -> None:
        self.lives += 1
        self.figures.update(life.figures)
        self.largest = max(self.largest, life.largest)

    def print(self) -> None:
        print(
            f"\n{self.lives} lives, {sum(self.count.values())} turns",
            *(f"{n:,} {name}" for name, n in self.figures.items()),
            sep=", ",
        )
        print(
            f"largest relative difference of a loss: {self.largest:.2g}\n\n| fault | times | exit codes |\n|---|---|---|"
        )
        for kind, count in sorted(self.count.items()):
            print(f"| {kind} | {count} | {', '.join(f'{code}: {n}' for code, n in sorted(self.codes[kind].items()))} |")
        said: set[str] = set()
        for kind, lines in sorted(self.lines.items()):
            print(f"\n{kind}: the user saw")
            print(*(f"  {line}" for key, line in lines.items() if key not in said), sep="\n")
            said |= lines.keys()
        sys.stdout.flush()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a disk that can be filled; without the right to mount it is a plain folder."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder]
    mounted = not subprocess.run(command, capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def reference(folder: Path, life: Life) -> list[dict]:
    run = Run([train_command(folder, *life.own, *layout("one"), "runner.save_interval=-1")])
    check(run.wait() == [0], run.output)
    return metrics(folder)


def live(life: Life, report: Report, ends: float) -> None:
    """Goes through the life's faults, then trains to its last step."""
    faults = random.Random(life.name).sample(FAULTS, FAULTS_A_LIFE)
    for number, fault in enumerate([*faults, train_to_the_end]):
        if life.done or (time.monotonic() > ends and number):
            break
        life.turn(number)
        began = time.monotonic()
        try:
            fault(life)
        finally:
            codes = [[process.poll() for process in run.processes] for run in life.runs]
            words = f"life {life.name} turn {number} {fault.__name__}: {'; '.join(life.notes)}"
            print(f"{words}: exit {codes}, step {len(life.rows)}, {time.monotonic() - began:.0f} s", flush=True)
            report.add(fault.__name__, life)
            life.close()


def train_to_the_end(life: Life) -> None:
    life.end(life.start(), 0, f"^done: step {STEPS}")
    check(len(life.rows) == STEPS, f"done at step {len(life.rows)}")


def soak(seed: int, minutes: float, folder: Path, first: int = 0, lives: int | None = None) -> Report:
    """Lives `lives` lives, or as many as begin in the time; raises Violation."""
    os.environ.update(cached())
    ends, report = time.monotonic() + 60 * minutes, Report()
    folder = folder.absolute()
    print(f"soak --seed {seed} --minutes {minutes:g} --folder {folder} --life {first}", flush=True)
    for number in range(first, sys.maxsize if lives is None else first + lives):
        if time.monotonic() > ends:
            break
        home = folder / f"life_{seed}_{number}"
        shutil.rmtree(home, ignore_errors=True)
        with small_disk(home):
            life = Life(home / "runs", f"{seed}/{number}", data_seed=1000 * seed + number)
            try:
                life.reference = reference(home / "reference", life)
                live(life, report, ends)
                report.add_life(life)
            except BaseException as error:
                kept = shutil.copytree(home, folder / "violation", symlinks=True, dirs_exist_ok=True)
                for run in life.runs:
                    print(f"\noutput:\n{run.output}")
                report.add_life(life)
                report.print()
                print(f"\nviolation in life {life.name}: {type(error).__name__}: {error}\nfolder: {kept}")
                print(
                    f"again: python -m tests.soak --seed {seed} --life {number} --lives 1 --folder {folder}", flush=True
                )
                raise
        home.rmdir()
    report.print()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folder", type=Path, required=True, help="for the experiments; needs no room to speak of")
    parser.add_argument("--life", type=int, default=0, help="number of the first experiment, to repeat one")
    parser.add_argument("--lives", type=int, help="how many; default: as many as begin in the time")
    args = parser.parse_args()
    try:
        soak(args.seed, args.minutes, args.folder, args.life, args.lives)
    except Violation:
        sys.exit(1)


if __name__ == "__main__":
    main()
