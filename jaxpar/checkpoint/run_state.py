"""The state of a run, and where it comes from: a checkpoint, given weights, a Hugging Face folder, or random numbers."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpar.checkpoint.checkpoints import Checkpoints
from jaxpar.checkpoint.manifest import Position
from jaxpar.config import ConfigError
from jaxpar.models.hugging_face import has_weights
from jaxpar.models.initial import InitialParams
from jaxpar.models.protocol import Params
from jaxpar.models.weights import Source
from jaxpar.parallel.trained import merge
from jaxpar.program import Program
from jaxpar.run.processes import raise_together
from jaxpar.step.train_step import State


class RunState:
    """The state of one run. All processes must make the same calls.

    Args:
      params, replace_stored: as in `jaxpar.Trainer`.

    Attributes:
      restored: the checkpoint that the state is a copy of; None after a step, or if it comes from elsewhere.

    Raises:
      ConfigError: `params` do not fit the model, or there are weights in actor.model.model_path too.
    """

    def __init__(self, program: Program, params: Source | None = None, *, replace_stored: bool = False):
        self._program, self._config = program, program.blueprint.config
        self._state: State | None = None
        self._gone = False  # whether `params` were given and are no longer kept
        self.restored: Path | None = None
        blueprint, path = program.blueprint, self._config.actor.model.model_path
        stored = path if blueprint.architecture and path and has_weights(path) else None
        if params is not None and stored and not replace_stored:
            raise ConfigError(
                f"actor.model.model_path: {path} has weights, and params are given too: leave out params, or say with "
                f"Trainer(…, params=…, replace_stored=True) that they are meant"
            )
        self._initial = InitialParams(
            program.state_shapes["params"],
            blueprint.architecture,
            given=params,
            folder=stored,
            adapters=self._config.actor.model.lora_path if blueprint.lora else None,
            period=blueprint.model.period,
        )

    @property
    def is_random(self) -> bool:
        """Whether weights of step 0 are random numbers."""
        return self._initial.are_random

    def get(self) -> State:
        """The state, on first use that of the checkpoint which `runner.resume_dir` names, else that of step 0.

        Warns if there is no checkpoint and the weights are random. Raises ConfigError as `restore` and `start`.
        """
        if self._state is None and self._config.runner.resume_dir not in (None, "fresh"):
            checkpoints = Checkpoints(self._config)
            found, notes = checkpoints.find_to_use()
            warn(notes)
            if found:
                self.restore(checkpoints, found, to_train=False)
                warn(self.unused(found))
            elif self.is_random:
                warn([f"there is no checkpoint in {checkpoints.folder}: the weights are untrained, random numbers"])
        return self._state or self.start()

    def train_step(self, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Takes one step with the rows of a global batch on the mesh, and returns its metrics."""
        self._state, metrics = self._program.train_step(self.get(), rows)
        self.restored = None
        return metrics

    def restore(self, checkpoints: Checkpoints, path: Path, *, to_train: bool) -> Position:
        """Takes the state of a checkpoint, which is not read again if this is that state.

        Returns:
          The checkpoint's position in the data; not to be used without `to_train`.

        Raises:
          ConfigError: see `Checkpoints.restore`.
        """
        if path == self.restored and not any(x.is_deleted() for x in jax.tree.leaves(self._state)):
            return checkpoints.position(path)[0] if to_train else {}
        self._state = self.restored = None  # its memory is needed
        shapes, shardings = self._program.state_shapes, self._program.state_shardings
        self._state, position = checkpoints.restore(path, shapes, shardings, to_train=to_train)
        self.restored = path
        return position

    def start(self) -> State:
        """Takes the state of step 0. Raises ConfigError if the weights do not fit."""
        self._state = self.restored = None
        self._state = self._program.init(self._given())
        return self._state

    def reference(self, dtype: Any) -> Params:
        """Another copy of the weights of step 0. Raises ConfigError as `start`, or if they were given and are gone."""
        if self._gone:
            raise ConfigError(
                "reference_params: the weights that were given are gone, because training has begun and a second copy of them would "
                "take memory: ask for the reference before fit"
            )
        blueprint, shardings = self._program.blueprint, self._program.state_shardings["params"]

        def cast(given: Params) -> Params:
            params = merge(given, blueprint.model.init(blueprint.config.actor.seed))
            return jax.tree.map(lambda x: x.astype(dtype), params)

        return jax.jit(cast, out_shardings=shardings)(self._given())

    def _given(self) -> Params:
        """The weights of step 0, with None at those that are to be initialized."""
        params: Any = None
        problems = list[str]()
        try:
            params = self._initial.load(self._program.state_shardings["params"])
        except ConfigError as error:  # perhaps in this process alone
            problems = error.problems
        raise_together(problems)
        return params

    def start_training(self, checkpoints: Checkpoints) -> tuple[Position | None, list[str]]:
        """Takes the state from which training starts or goes on: of the checkpoint that `runner.resume_dir` names, else
        the present one, but not one that was only restored to be used; else that of step 0.

        Returns:
          (position, notes): where to go on in the data, None at the beginning; and lines for the user.

        Raises:
          ConfigError: see `Checkpoints.find` and `Checkpoints.restore`.
        """
        found, notes = checkpoints.find()
        position = None
        if found:
            position = self.restore(checkpoints, found, to_train=True)
            changes = checkpoints.position(found)[1]
            notes = [*notes, f"resumed from {found}", *changes, *self.unused(found)]
        elif self._state is None or self.restored:
            if self.restored:
                more = "training starts anew: to continue from it, set runner.resume_dir"
                notes = [*notes, f"{self.restored} was restored, but {more}"]
            self.start()
        self._gone = self._gone or self._initial.given is not None
        self._initial.given = None  # so that a second copy of the model does not stay in memory
        return position, notes

    def unused(self, found: Path) -> list[str]:
        """A line if a checkpoint has won over given weights."""
        names = "which runner.resume_dir names"
        return (
            []
            if self._initial.given is None
            else [f"params: not used, because there is the checkpoint {found}, {names}"]
        )


def warn(lines: Sequence[str]) -> None:
    """Warns, on process 0, about the line of code outside of jaxpar that led here; each time, not only the first."""
    frame = sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("jaxpar."):
        frame = frame.f_back
    for line in lines if jax.process_index() == 0 else ():
        warnings.warn_explicit(line, UserWarning, frame.f_code.co_filename, frame.f_lineno)
