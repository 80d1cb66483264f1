"""Records the steps of a run: metrics, the progress line, and the batches of skipped steps."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxpar.hardware import peak_flops
from jaxpar.program import Program


class NonFiniteError(Exception):
    """`runner.max_skipped_steps` steps in a row had a loss or gradient that is NaN or infinite."""


class StepLog:
    """Reports each step one step late, so that the devices never wait for the host to read a number.

    Args:
      report: is given the row of each step.
      say: prints a line.

    Attributes:
      between: seconds of what `between_steps` has measured since the last row.
    """

    def __init__(self, program: Program, report: Callable[[dict[str, Any]], None], say: Callable[[str], None]):
        self._config, self._report, self._say = program.blueprint.config, report, say
        self._pending: tuple[int, dict[str, jax.Array], Mapping[str, np.ndarray], Mapping[str, float]] | None = None
        self._skipped_in_a_row = 0
        self._batch_layout = program.batch_layout
        devices = program.mesh.devices.flatten()
        peak = peak_flops(devices[0].device_kind)
        self._mfu_per_flops = None
        flops_per_token = program.blueprint.flops_per_token
        if flops_per_token and peak:
            self._flops_per_token = flops_per_token
            self._mfu_per_flops = 1 / (peak * len(devices))
        self._tokens = math.prod(program.batch_layout.shape)
        self._previous_end = time.perf_counter()
        self.between: dict[str, float] = {}

    def enter(
        self,
        step: int,
        values: dict[str, jax.Array],
        batch: Mapping[str, np.ndarray],
        figures: Mapping[str, float],
    ) -> None:
        """Takes over a step that was just dispatched, and reports the one before it.

        Args:
          values: the step's metrics, from `train_step`; they may still be computing.
          batch: this process's rows of its batch.
          figures: numbers about that batch, see `jaxpar.data.BatchLoader`.
        """
        self.flush()
        self._pending = (step, values, batch, figures)

    def wait(self) -> float:
        """Waits until the pending step is done; returns its duration in seconds."""
        if self._pending:
            jax.block_until_ready(self._pending[1])
        return time.perf_counter() - self._previous_end

    @contextlib.contextmanager
    def between_steps(self, name: str) -> Iterator[None]:
        """Measures what is done after `flush` and before the next step. The next row has its seconds under this name, and
        its `step_seconds` are without them."""
        start = time.perf_counter()
        yield
        self.between[name] = time.perf_counter() - start
        self._previous_end += self.between[name]

    def flush(self, seconds: float | None = None, **more: float) -> None:
        """Reports the pending step, if there is one.

        Args:
          seconds: its duration from `wait`; required if other work followed the step.
          more: additional numbers for its row.

        Raises:
          NonFiniteError: `runner.max_skipped_steps` steps in a row, this one included, were skipped.
        """
        if self._pending is None:
            return
        step, values, batch, figures = self._pending
        self._pending = None
        numbers = {key: float(value) for key, value in values.items()}  # waits for the step
        seconds = time.perf_counter() - self._previous_end if seconds is None else seconds
        # Only dynamic batches have figures; their padding does not count.
        rate = (numbers["tokens"] if figures else self._tokens) / seconds
        mfu = None
        if self._mfu_per_flops is not None:
            mfu = rate * figures.get("flops_per_token", self._flops_per_token) * self._mfu_per_flops
        skipped = bool(numbers["skipped"])
        row: dict[str, Any] = {
            "step": step,
            "loss": numbers["loss"],
            "grad_norm": numbers["grad_norm"],
            "learning_rate": numbers.get("learning_rate"),  # unknown with an optimizer of the user's own
            "tokens": int(numbers["tokens"]),
            "skipped": skipped,
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": mfu,
            **figures,
            **self.between,
            **more,
        }
        self.between = {}
        row = {**{name: value for name, value in numbers.items() if name not in row}, **row}
        self._report(row)
        if skipped and not self._is_scale_overflow(numbers):
            self._save_skipped(step, batch)
        else:
            self._skipped_in_a_row = 0
        self._previous_end = time.perf_counter()

    def _is_scale_overflow(self, numbers: Mapping[str, float]) -> bool:
        """Whether the dynamic loss scale was too large and will be lowered; then the batch is not at fault."""
        lowest = self._config.actor.optim.min_loss_scale
        return np.isfinite(numbers["loss"]) and numbers.get("loss_scale", lowest) > lowest

    def _save_skipped(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
        folder = self._config.output_path / "skipped_batches"
        path = folder / f"step_{step}.process_{jax.process_index()}.npz"
        arrays: Any = {"rows": np.asarray(self._batch_layout.resized(len(batch["tokens"])).rows), **batch}
        where = f"its batch is in {path}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **arrays)
        except OSError as error:  # a full disk; the run is worth more than this file
            where = f"its batch could not be written to {path} ({error.strerror})"
        self._say(f"step {step}: loss or gradients are not finite, so nothing was updated; {where}")
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= (most := self._config.runner.max_skipped_steps):
            raise NonFiniteError(
                f"the last {most} steps ({step - most + 1} to {step}) had losses or gradients that are not "
                f"finite, and {most} is the limit, runner.max_skipped_steps: their batches are in {folder}; try "
                f"a lower actor.optim.lr, precision bf16 or fp32, or an earlier checkpoint with runner.resume_dir"
            )
