"""Stopping between two steps when a signal asks for it."""

import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """A signal ended the run between two steps; the checkpoint of `step` is complete.

    Attributes:
      step, last_step: where it stopped, and where it would have ended.
      signal: number of the signal.
    """

    def __init__(self, step: int, last_step: int, signal_number: int):
        self.step, self.last_step, self.signal = step, last_step, signal_number
        super().__init__(f"stopped after step {step} of {last_step}, which is saved")


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 (Slurm's choice), noted instead of obeyed; a second SIGINT interrupts at once.

    `received` is the same in all processes, whichever of them the signal reached.
    """

    def __enter__(self) -> "Signals":
        self._number = 0
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def received(self) -> int:
        if jax.process_count() == 1:
            return self._number
        return int(multihost_utils.process_allgather(np.int32(self._number)).max())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number
