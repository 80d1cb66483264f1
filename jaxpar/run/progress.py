"""Progress output of a run: a progress bar in a terminal, plain lines elsewhere."""

import sys
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter(Protocol):
    def start(self, first_step: int, last_step: int | None) -> None: ...
    def step(self, row: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Prints nothing; for all processes except process 0."""

    def start(self, first_step: int, last_step: int | None) -> None: ...
    def step(self, row: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Lines(Silent):
    """Prints a line every `every` steps, without colours or cursor movements."""

    def __init__(self, every: int = 1):
        self._every = every
        self._last: int | None = None

    def start(self, first_step: int, last_step: int | None) -> None:
        self._last = last_step

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] % self._every == 0 or row["step"] == self._last:
            total = f"/{self._last}" if self._last else ""
            print(f"step {row['step']}{total} {summary(row)}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


class Bar(Silent):
    """A progress bar with loss, tokens/s and remaining time."""

    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip

    def start(self, first_step: int, last_step: int | None) -> None:
        self._task = self._progress.add_task("", total=last_step, completed=first_step, text="compiling")
        self._progress.start()

    def step(self, row: dict[str, Any]) -> None:
        self._progress.update(self._task, completed=row["step"], text=summary(row))

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._progress.stop()


def summary(row: dict[str, Any]) -> str:
    """The numbers of one step, from its metrics row, as one line of text."""
    rate = "" if row["learning_rate"] is None else f"  lr {row['learning_rate']:.2e}"
    mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
    more = f"  val loss {row['val_loss']:.4f}" if "val_loss" in row else ""
    more += "  skipped" if row["skipped"] else ""
    if "dp_balance" in row:
        more += f"  microbatches {row['num_microbatches']}  balance {row['dp_balance']:.3f}"
        more += f"  padding {row['padding_fraction']:.1%}"
    return (
        f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}{rate}  "
        f"{row['tokens_per_second']:,.0f} tokens/s{mfu}{more}"
    )


def reporter(first_process: bool, every: int = 1) -> Reporter:
    """The reporter for this process: a bar, lines every `every` steps, or silence."""
    if not first_process:
        return Silent()
    return Bar(Console()) if sys.stdout.isatty() else Lines(every)
