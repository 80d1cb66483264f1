"""Where the figures of each step go: `metrics.jsonl` and TensorBoard's files."""

import json
import math
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from jaxpar.config import Config


class MetricsWriter(Protocol):
    def write(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def metrics_writers(config: Config, first_step: int) -> list[MetricsWriter]:
    """Those that the config asks for; `first_step`: the step that the run starts from, 0 for a new one."""
    writers: list[MetricsWriter] = [MetricsFile(config.output_path, first_step)]
    if "tensorboard" in (config.runner.logger.logger_backends or ()):
        writers.append(TensorBoardFile(config.output_path, first_step))
    return writers


class MetricsFile:
    """`metrics.jsonl`: one object a step.

    Args:
      folder: of the experiment; it is made.
      first_step: what an earlier run wrote about steps after this one is dropped, because they are run again.
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
        """Appends a line, at once visible to `tail -f`. A value that is not finite becomes a string: JSON has none."""
        plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines(keepends=True) if self.path.exists() else []


class TensorBoardFile:
    """`tensorboard/events.out.tfevents…`: each number of a row as the scalar `train/<its name>`.

    Args:
      folder: of the experiment.
      first_step: TensorBoard is told to forget what an earlier run wrote about steps after this one.
    """

    def __init__(self, folder: Path, first_step: int):
        purge_step = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=10)

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
        return math.inf  # torn by a crash
