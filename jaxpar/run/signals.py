"""Stops a run between two steps when a signal asks for it."""

import signal
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal ended the run between two steps. The checkpoint of `step` is complete.

    Attributes:
      step: the last step that was done.
      last_step: the step at which the run would have ended; None if nobody knows.
      signal: number of the signal.
    """

    def __init__(self, step: int, last_step: int | None, signal_number: int):
        self.step, self.last_step, self.signal = step, last_step, signal_number
        super().__init__(f"saved and stopped after step {step}" + (f" of {last_step}" if last_step else ""))


class Signals:
    """Notes SIGINT, SIGTERM, SIGUSR1 and SIGHUP instead of ending the process; a second SIGINT interrupts at once.

    SIGUSR1 is what `tpu_gpu_scripts/slurm.sbatch` has Slurm send before the job's time is over. SIGHUP comes when the terminal
    is closed; under `nohup` it stays ignored.

    Attributes:
      number: of the signal that this process has received last; 0 if none.
    """

    def __enter__(self) -> "Signals":
        self.number = 0
        stopping = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        stopping += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        self._before = {number: signal.signal(number, self._note) for number in stopping}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
