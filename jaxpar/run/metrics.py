"""Writes the numbers of each step to `metrics.jsonl` and to TensorBoard's event files."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from jaxpar.config import Config
from jaxpar.run.hooks import Hook, Run


def metrics_writers(config: Config) -> list[Hook]:
    """The writers that the config asks for.

    Raises:
      ConfigError: one of them is not installed.
    """
    writers: list[Hook] = [MetricsFile(config.output_path)]
    backends = config.runner.logger.logger_backends or ()
    if "tensorboard" in backends:
        writers.append(TensorBoardFile(config.output_path))
    if "wandb" in backends:
        from jaxpar.run.wandb import WandB  # imports wandb, which few have

        writers.append(WandB())
    return writers


class MetricsFile(Hook):
    """`metrics.jsonl`: one JSON object per step.

    Of an earlier run's rows, those for steps after the one that the run goes on from are dropped, because those steps run again.
    Of two rows of a step the later one is kept. A line that is no row, because a crash or a disk has damaged it, is dropped with
    a note.

    Args:
      folder: the experiment's folder; created if missing.
    """

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self._file: Any = None

    def start(self, run: Run) -> None:
        with _named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
            lines = [line for line in lines if line.strip()]
            steps = [_step(line) for line in lines]
            rows = {step: line for step, line in zip(steps, lines, strict=True) if step is not None}
            if damaged := steps.count(None):
                run.say(f"{self.path}: {damaged} lines that are damaged were dropped")
            if doubled := len(lines) - damaged - len(rows):
                run.say(f"{self.path}: {doubled} rows were dropped: their steps have later ones")
            draft = self.path.with_suffix(".jsonl.tmp")
            draft.write_bytes(b"".join(line + b"\n" for step, line in sorted(rows.items()) if step <= run.step))
            draft.replace(self.path)
            self._file = self.path.open("a")

    def step(self, row: dict[str, Any]) -> None:
        """Appends one line and flushes it, for `tail -f`. JSON has no NaN or infinity, so these become strings."""
        plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        with _named(self.path):
            self._file.write(json.dumps(plain) + "\n")
            self._file.flush()

    def end(self) -> None:
        if self._file:
            with _named(self.path):
                self._file.close()


class TensorBoardFile(Hook):
    """`tensorboard/events.out.tfevents…`: each number of a row becomes the scalar `train/<name>`.

    TensorBoard is told to discard what an earlier run wrote for steps that run again.

    Args:
      folder: the experiment's folder.
    """

    def __init__(self, folder: Path):
        self._folder, self._writer = folder / "tensorboard", None  # type: Path, SummaryWriter | None

    def start(self, run: Run) -> None:
        purge_step = run.step + 1 if run.step else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=10)
        events = self._writer.file_writer.event_writer
        events._ev_writer = events._worker._record_writer = _Tolerant(events._ev_writer)

    def step(self, row: dict[str, Any]) -> None:
        assert self._writer
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(f"train/{name}", value, row["step"])

    def end(self) -> None:
        if self._writer:
            self._writer.close()


def _step(line: bytes) -> int | None:
    """The step of a line of `metrics.jsonl`; None if it is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Gives an OSError the file's name, which an error of writing lacks."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class _Tolerant:
    """tensorboardX's writer of events, which stops quietly when the disk is full or gone. It writes in a thread and again at
    exit, where an error would be a traceback and not end the run; the run itself reports the disk."""

    def __init__(self, writer: Any):
        self._writer: Any = writer

    def write_event(self, event: Any) -> None:
        self._attempt("write_event", event)

    def flush(self) -> None:
        self._attempt("flush")

    def close(self) -> None:
        self._attempt("close")

    def _attempt(self, name: str, *args: Any) -> None:
        try:
            if self._writer is not None:
                getattr(self._writer, name)(*args)
        except OSError as error:
            self._writer = None
            print(f"note: TensorBoard's file is not complete: {error}", file=sys.stderr)
