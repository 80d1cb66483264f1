"""A trace of a few training steps for xprof, the profiler of XLA programs."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxpar.config import ConfigError


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

    def check(self, done: int, last: int) -> None:
        """Checks that a run that has done `done` steps and ends with step `last` still runs these steps.

        Raises:
          ConfigError: it does not run all of them.
        """
        if self.first <= done or self.last > last:
            raise ConfigError(
                f"--profile: {self.first}:{self.count} means steps {self.first} to {self.last}, but this run has steps "
                f"{done + 1} to {last}: choose some of these"
            )


class Profiler:
    """Traces the requested steps and nothing else.

    Args:
      steps: the steps to trace; None: no trace.
      folder: where the trace goes; each host writes its own file below it.
      wait: returns when the devices have finished all dispatched work, so that no other step gets into the trace.
      say: prints a line.
    """

    def __init__(self, steps: Steps | None, folder: Path, wait: Callable[[], object], say: Callable[[str], None]):
        self._steps, self._folder, self._wait, self._say = steps, folder, wait, say
        self._tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps the dispatch of one step."""
        if self._steps and number == self._steps.first:
            self._wait()
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if self._steps and number == self._steps.last:
            self._wait()
            self.stop()

    def stop(self) -> None:
        """Writes the trace, even if the run ended before the last requested step."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            self._say(f"profile in {self._folder}; view it: pip install xprof && xprof --port 8791 {self._folder}")
