"""Where the batches of a run come from: what `Trainer.fit` is given, as this process's rows of one global batch after another.

A source has a position, a dict that JSON can hold. A checkpoint stores it, and it always has `batch`, the number of global batches
read. `kind` says what else means the same in another run.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from jaxpar.config import ConfigError
from jaxpar.data.loader import FILES, Batch
from jaxpar.parallel.batch import BatchLayout
from jaxpar.program import Program
from jaxpar.run.processes import from_all_processes

UserBatches = Iterable[Mapping[str, Any]] | Callable[[int], Mapping[str, Any]]
State = dict[str, Any]


class BatchSource(Protocol):
    """An iterator over this process's rows; `jaxpar.data.BatchLoader` is one.

    Attributes:
      kind: sources of the same kind understand each other's positions.
      num_batches: until the source ends; None: it does not, or nobody knows.
      figures: numbers about the last batch, for the step's row.
      notes: lines for the user.
      fingerprint: of the data, which a checkpoint stores and a resume compares; None: unknown.
    """

    kind: str
    notes: Sequence[str]
    fingerprint: Mapping[str, Any] | None

    @property
    def num_batches(self) -> int | None: ...
    @property
    def figures(self) -> Mapping[str, float]: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> State: ...
    def set_state(self, state: State, /) -> None: ...
    def close(self) -> None: ...


def open_batches(program: Program, batches: UserBatches, next_step: Callable[[], int]) -> BatchSource:
    """The source of what `Trainer.fit` is given.

    Args:
      next_step: gives the number of the next step, for a function of it.

    Raises:
      ConfigError: it is neither an iterable nor a function, a function without `runner.max_steps`, or more than one epoch.
    """
    layout, config = program.batch_layout, program.blueprint.config
    runner = config.runner
    if runner.max_epochs > 1:
        raise ConfigError(
            f"runner.max_epochs: {runner.max_epochs}, but batches that are given are read once: repeat them there, and set "
            f"max_epochs to 1"
        )
    if isinstance(batches, Iterable) and not isinstance(batches, Mapping | str):
        iterator = iter(batches)
        with_state = hasattr(iterator, "get_state") and hasattr(iterator, "set_state")
        source: _UserSource = (StatefulIterator if with_state else PlainIterator)(
            iterator, layout, is_own=iterator is not batches
        )
    elif not callable(batches):
        raise ConfigError(
            f"batches: a {type(batches).__name__}, expected an iterable of global batches (of dicts of arrays), or a "
            f"function from the number of the step to its batch"
        )
    elif runner.max_steps <= 0:
        raise ConfigError("batches: a function of the step has no end: set runner.max_steps")
    else:
        source = StepFunction(batches, layout, next_step)
    if config.data.train_data_paths:
        source.notes = [*source.notes, "data.train_data_paths: not read, because batches are given"]
    return source


def own_rows(layout: BatchLayout, batch: Any, name: str) -> Batch:
    """This process's rows of a user's batch. Raises ValueError, see `BatchLayout.own_rows`."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"{name}: gave a {type(batch).__name__}, expected a dict of arrays, one global batch")
    return layout.own_rows(batch)


class _UserSource:
    """What the sources that are made of a user's batches have in common."""

    kind: str
    notes: Sequence[str] = ()
    fingerprint: Mapping[str, Any] | None = None
    num_batches: int | None = None
    _next: Callable[[], Any]  # the user's next batch

    def __init__(self, layout: BatchLayout):
        self._layout, self._read = layout, 0
        self.figures: Mapping[str, float] = {}

    def __next__(self) -> Batch:
        batch = self._next()
        self._read += 1
        return own_rows(self._layout, batch, "batches")

    def get_state(self) -> State:
        return {"source": self.kind, "batch": self._read}

    def set_state(self, state: State, /) -> None:
        self._read = state["batch"]

    def close(self) -> None: ...


class StepFunction(_UserSource):
    """A function of the step, from 1. The step is its position."""

    kind = "a function of the step"

    def __init__(self, function: Callable[[int], Any], layout: BatchLayout, next_step: Callable[[], int]):
        super().__init__(layout)
        self._function, self._next_step = function, next_step

    def _next(self) -> Any:
        return self._function(self._next_step())


class PlainIterator(_UserSource):
    """Any iterator. All that is known of its position is the number of batches, so a run that resumes reads it again up to there.

    Args:
      is_own: nobody else has this iterator, so it is closed at the end.
    """

    kind = "an iterator"
    notes: Sequence[str] = (
        "batches: the position of an iterator without get_state and set_state cannot be saved: a run that resumes takes it "
        "from its first batch, and reads and drops those that are done",
    )

    def __init__(self, iterator: Iterator[Any], layout: BatchLayout, *, is_own: bool):
        super().__init__(layout)
        self._iterator: Any = iterator
        self._is_own = is_own

    def _next(self) -> Any:
        return next(self._iterator)

    def set_state(self, state: State, /) -> None:
        for number in range(state["batch"]):
            try:
                next(self._iterator)
            except StopIteration:
                raise ConfigError(
                    f"batches: ended after {number}, but the checkpoint is after batch {state['batch']}: give an iterator "
                    f"that starts with its first batch"
                ) from None
        super().set_state(state)

    def close(self) -> None:
        if self._is_own and hasattr(self._iterator, "close"):
            self._iterator.close()


class StatefulIterator(PlainIterator):
    """An iterator with `get_state` and `set_state`, such as those of Grain's datasets and loaders. The state is of JSON or bytes."""

    kind, notes = "an iterator with a state", ()

    def get_state(self) -> State:
        state = self._iterator.get_state()
        return {**super().get_state(), "state": {"bytes": state.hex()} if isinstance(state, bytes) else state}

    def set_state(self, state: State, /) -> None:
        own = state["state"]
        if "states" in state:
            if len(state["states"]) != jax.process_count():
                raise ConfigError(
                    f"batches: the checkpoint has a position for each of {len(state['states'])} processes, which differ, and "
                    f"this run has {jax.process_count()}: resume on {len(state['states'])}, or let every process read alike"
                )
            own = state["states"][jax.process_index()]
        is_bytes = isinstance(own, dict) and list(own) == ["bytes"]
        try:
            self._iterator.set_state(bytes.fromhex(own["bytes"]) if is_bytes else own)
        except Exception as error:  # whatever a user's iterator raises
            raise ConfigError(f"batches: set_state does not take the position in the checkpoint: {error}") from error
        self._read = state["batch"]


def go_on(source: BatchSource, position: State) -> list[str]:
    """Goes to a position from a checkpoint, or, if it is one of another kind of source, starts anew and says so.

    Returns:
      Lines for the user.

    Raises:
      ConfigError: the source has no such position.
    """
    kind = position.get("source", FILES)
    if source.kind in (kind, StepFunction.kind):
        source.set_state(position)
        return []
    return [f"the checkpoint's position is in {kind}: {source.kind} starts with the first batch"]


def position_to_save(position: State) -> State:
    """The position of this process, with those of the others if they differ. A collective call.

    Raises:
      ConfigError: the state of a user's iterator is not JSON.
    """
    if "state" not in position:
        return position
    try:
        json.dumps(position)
    except TypeError as error:
        raise ConfigError(f"batches: get_state gave what JSON cannot hold, and no bytes: {error}") from None
    states = from_all_processes(position["state"])
    return position if all(state == states[0] for state in states) else {**position, "states": states, "state": None}
