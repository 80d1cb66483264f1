"""Hooks: code that runs before, after and between the steps of a run. What jaxpar itself writes and prints is hooks, too."""

from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from jaxpar.config import Config, ConfigError


class _Answer(Enum):
    STOP = "stop"


STOP = _Answer.STOP  # a hook returns it to end the run


class Run(Protocol):
    """What a hook is given: one call of `Trainer.fit`.

    Attributes:
      config: of the run.
      trainer: the `jaxpar.Trainer`. `trainer.state` is that after `step`. A hook may use what reads it (`check`, `log_probs`,
        `loss_and_grads`), but must not train or restore. Most of these are collective calls: all processes must make them.
      step: the last step that was given to the devices; before the first, the step that the run goes on from.
      last_step: the step at which the run ends; None if only its batches end it.
    """

    @property
    def config(self) -> Config: ...
    @property
    def trainer(self) -> Any: ...
    @property
    def step(self) -> int: ...
    @property
    def last_step(self) -> int | None: ...

    def stop(self, reason: str) -> None:
        """Ends the run, in all processes, before the next step; the state is saved. One process is enough to ask."""

    def say(self, text: str) -> None:
        """Prints a line, on process 0, that does not break the progress bar."""


class Hook:
    """Derive from it, and define what you need. Each method may return `jaxpar.STOP` to end the run.

    A hook runs on every process. An error in a method ends the run in all processes: the state is saved, then `HookError` is
    raised. Only an error of `start` is raised at once.
    """

    def start(self, run: Run) -> Any:
        """The run begins. Keep `run`, if you need it later."""

    def begin(self, step: int) -> Any:
        """This step is the next that the devices are given."""

    def dispatched(self, step: int) -> Any:
        """The devices have been given this step, and may still be at work on it."""

    def step(self, row: dict[str, Any]) -> Any:
        """The numbers of a finished step: `step`, `loss`, `grad_norm` and the others of `metrics.jsonl`. Numbers that are added
        to it on process 0 are written, too. It comes one step late, so that the devices never wait for the host: if it asks
        to stop, one more step has been taken.
        """

    def evaluation(self, step: int, loss: float) -> Any:
        """The parameters after this step have been evaluated. Called after `step`."""

    def save(self, step: int, folder: Path) -> Any:
        """The state after this step is being written, in the background, to this folder, which exists when it is complete."""

    def end(self) -> Any:
        """The run ends, also after an error; everything is saved."""


class HookError(ConfigError):
    """A hook has failed. `__cause__` is its error."""

    def __init__(self, hook: Hook, method: str, error: Exception):
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.filename:
            reason = f"{error.filename}: {error.strerror}"
        super().__init__(f"hook {type(hook).__name__}.{method}: {reason}")
        self.__cause__ = error


class Hooks:
    """Calls the hooks of a run, in their order.

    Args:
      fail: is given the error of a hook, once the others have been called.
    """

    def __init__(self, run: Run, hooks: Sequence[Hook], fail: Callable[[Exception], None]):
        self._run, self._hooks, self._fail = run, hooks, fail
        self._started: list[Hook] = []
        for hook in hooks:
            if not isinstance(hook, Hook):
                given = f"the class {hook.__name__}" if isinstance(hook, type) else repr(hook)
                raise ConfigError(f"hooks: {given} is not an instance of a jaxpar.Hook")

    def start(self) -> None:
        """Raises the error of the first hook that fails."""
        for hook in self._hooks:
            self._started.append(hook)
            if error := self._error_of(hook, "start", self._run):
                raise error

    def call(self, method: str, *args: Any) -> None:
        """Calls a method of every hook that was started, even if one fails."""
        for hook in self._started:
            if error := self._error_of(hook, method, *args):
                self._fail(error)

    def _error_of(self, hook: Hook, method: str, *args: Any) -> Exception | None:
        try:
            if getattr(hook, method)(*args) is STOP:
                self._run.stop(f"{type(hook).__name__} asks for it")
        except ConfigError as error:
            return error
        except Exception as error:  # whatever a user's hook raises
            return HookError(hook, method, error)
        return None
