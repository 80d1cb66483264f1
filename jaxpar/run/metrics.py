"""Writes the numbers of each step to `metrics.jsonl` and to TensorBoard's event files."""

import json
import math
import sys
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from jaxpar.config import Config


class MetricsWriter(Protocol):
    def write(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def metrics_writers(config: Config, first_step: int) -> list[MetricsWriter]:
    """The writers that the config asks for. `first_step` is the step that the run resumes from, 0 for a new run."""
    writers: list[MetricsWriter] = [MetricsFile(config.output_path, first_step)]
    if "tensorboard" in (config.runner.logger.logger_backends or ()):
        writers.append(TensorBoardFile(config.output_path, first_step))
    return writers


class MetricsFile:
    """`metrics.jsonl`: one JSON object per step.

    Args:
      folder: the experiment's folder; created if missing.
      first_step: rows of an earlier run for later steps are dropped, because those steps run again.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if _step(line) <= first_step]
        draft = self.path.with_suffix(".jsonl.tmp")
        draft.write_text("".join(kept))
        draft.replace(self.path)
        self._file = self.path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Appends one line and flushes it, for `tail -f`. JSON has no NaN or infinity, so these become strings."""
        plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines(keepends=True) if self.path.exists() else []


class TensorBoardFile:
    """`tensorboard/events.out.tfevents…`: each number of a row becomes the scalar `train/<name>`.

    Args:
      folder: the experiment's folder.
      first_step: TensorBoard is told to discard what an earlier run wrote for later steps.
    """

    def __init__(self, folder: Path, first_step: int):
        purge_step = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=10)
        events = self._writer.file_writer.event_writer
        events._ev_writer = events._worker._record_writer = _Tolerant(events._ev_writer)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(f"train/{name}", value, row["step"])

    def close(self) -> None:
        self._writer.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a crash: drop it


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
