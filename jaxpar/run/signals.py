"""Stops a run between two steps when a signal asks for it."""

import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """A signal ended the run between two steps. The checkpoint of `step` is complete.

    Attributes:
      step: the last step that was done.
      last_step: the step at which the run would have ended.
      signal: number of the signal.
    """

    def __init__(self, step: int, last_step: int, signal_number: int):
        self.step, self.last_step, self.signal = step, last_step, signal_number
        super().__init__(f"saved and stopped after step {step} of {last_step}")


class Signals:
    """Notes SIGINT, SIGTERM and SIGUSR1 instead of ending the process; a second SIGINT interrupts at once.

    SIGUSR1 is what `tpu_gpu_scripts/slurm.sbatch` has Slurm send before the job's time is over.
    """

    def __enter__(self) -> "Signals":
        self._number = 0
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self) -> int:
        """The number of the signal that any process received, 0 if none did: the same in all processes.

        A collective call: all processes must make it equally often. If several signals arrived, the highest counts.
        """
        if jax.process_count() == 1:
            return self._number
        return int(multihost_utils.process_allgather(np.int32(self._number)).max())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number
