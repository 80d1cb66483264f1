"""Progress output of a run: a progress bar in a terminal, plain lines elsewhere."""

import sys
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxpar.run.hooks import Hook, Run


class Progress(Hook):
    """Prints nothing; for all processes except process 0."""

    def say(self, text: str) -> None: ...


class Lines(Progress):
    """Prints a line every `every` steps, without colours or cursor movements."""

    def __init__(self, every: int = 1):
        self._every = every
        self._last: int | None = None

    def start(self, run: Run) -> None:
        self._last = run.last_step

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] % self._every == 0 or row["step"] == self._last or saving(row):
            total = f"/{self._last}" if self._last else ""
            print(f"step {row['step']}{total} {summary(row)}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


class Bar(Progress):
    """A progress bar with loss, tokens/s and remaining time."""

    def __init__(self, console: Console):
        self._bar = rich.progress.Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip

    def start(self, run: Run) -> None:
        self._task = self._bar.add_task("", total=run.last_step, completed=run.step, text="compiling")
        self._bar.start()

    def step(self, row: dict[str, Any]) -> None:
        self._bar.update(self._task, completed=row["step"], text=summary(row))

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def end(self) -> None:
        self._bar.stop()


def summary(row: dict[str, Any]) -> str:
    """The numbers of one step, from its metrics row, as one line of text."""
    rate = "" if row["learning_rate"] is None else f"  lr {row['learning_rate']:.2e}"
    mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
    more = f"  val loss {row['val_loss']:.4f}" if "val_loss" in row else ""
    more += "  skipped" if row["skipped"] else ""
    if "dp_balance" in row:
        more += f"  microbatches {row['num_microbatches']}  balance {row['dp_balance']:.3f}"
        more += f"  padding {row['padding_fraction']:.1%}"
    more += saving(row)
    return (
        f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}{rate}  "
        f"{row['tokens_per_second']:,.0f} tokens/s{mfu}{more}"
    )


def saving(row: dict[str, Any]) -> str:
    """How long the save before this step has stopped training; empty if that was less than a second, or there was none."""
    seconds = row.get("checkpoint_seconds", 0.0) + row.get("checkpoint_wait_seconds", 0.0)
    return f"  checkpoint {seconds:.1f} s" if seconds >= 1 else ""


def progress(first_process: bool, every: int = 1) -> Progress:
    """What this process prints: a bar, lines every `every` steps, or nothing."""
    if not first_process:
        return Progress()
    return Bar(Console()) if sys.stdout.isatty() else Lines(every)
