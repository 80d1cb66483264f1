"""A trace of a few training steps for xprof, the profiler of XLA programs."""

import re
from dataclasses import dataclass

import jax

from jaxpar.config import ConfigError
from jaxpar.run.hooks import Hook, Run


@dataclass(frozen=True)
class Steps:
    """The steps that `--profile STEP:COUNT` asks for: `count` steps from step `first` on. The first step is step 1."""

    first: int
    count: int

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    @classmethod
    def parse(cls, text: str) -> "Steps":
        """Reads `STEP:COUNT`.

        Raises:
          ConfigError: `text` is not two whole numbers above 0.
        """
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text, re.ASCII)
        if not found:
            raise ConfigError(f"--profile: {text!r} is not STEP:COUNT, two whole numbers above 0, such as 10:3")
        return cls(int(found[1]), int(found[2]))

    def check(self, done: int, last: int | None) -> None:
        """Checks that a run that has done `done` steps and ends with step `last`, if that is known, still runs these steps.

        Raises:
          ConfigError: it does not run all of them.
        """
        if self.first <= done or (last is not None and self.last > last):
            raise ConfigError(
                f"--profile: {self.first}:{self.count} means steps {self.first} to {self.last}, but this run has steps "
                f"{done + 1} to {last or 'the end'}: choose some of these"
            )


class Profiler(Hook):
    """Traces the requested steps and nothing else, into the folder `profile` of the experiment, where each host writes a file."""

    def __init__(self, steps: Steps):
        self._steps, self._tracing = steps, False

    def start(self, run: Run) -> None:
        self._steps.check(run.step, run.last_step)
        self._run, self._folder = run, run.config.output_path / "profile"

    def begin(self, step: int) -> None:
        if step == self._steps.first:
            self._wait()
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def dispatched(self, step: int) -> None:
        if step == self._steps.last:
            self._wait()
            self.end()

    def end(self) -> None:
        """Writes the trace, even if the run ended before the last requested step."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            self._run.say(f"profile in {self._folder}; view it: pip install xprof && xprof --port 8791 {self._folder}")

    def _wait(self) -> None:
        """Until the devices have finished all dispatched work, so that no other step gets into the trace."""
        jax.block_until_ready(self._run.trainer.state)
