"""Checkpoints through Orbax: asynchronous, sharded, atomic, and verified when read.

`<experiment>/checkpoints/global_step_N/` holds `state/` and the files that `jaxpar.checkpoint.manifest` writes beside
it. `state/` has one array for each parameter and moment, with the layers in order, so any layout can read what any
other wrote. Orbax writes under a temporary name and renames the folder at the end, so a folder with the final name is
complete unless a part of it was removed later.
"""

import contextlib
import itertools
import math
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext, PreservationPolicy

from jaxpar.checkpoint.manifest import (
    PREFIX,
    Position,
    build_manifest,
    check_saved,
    checkpoints_in,
    damages,
    newest,
    position_in,
    read_manifest,
    remove_drafts,
    resolve,
    step_of,
    why_torn,
)
from jaxpar.checkpoint.orbax_handler import (
    CHUNK_BYTES,
    StateHandler,
    StateRestore,
    StateSave,
    bytes_at_once,
    in_its_own_memory,
    return_large_buffers,
)
from jaxpar.checkpoint.reading import CheckpointError
from jaxpar.checkpoint.same_run import Described, compare, position_problems, tree_problems
from jaxpar.config import Config, ConfigError
from jaxpar.run.processes import decide_on_process_0, raise_together

_TORN = "torn_"  # prefix for the folder of a torn checkpoint
_PATIENCE = 30.0  # seconds for the last write of a run that has lost its folder
_WRITE_TIMEOUT = 3600  # seconds; Orbax's default of 600 is too short for a large model on a slow file system


class Checkpoints:
    """The checkpoints of one experiment.

    Args:
      config: says where they are and which ones to keep; it is stored with each of them.
      described: from `same_run.describe`; stored, too, and compared before training goes on from one of them.
    """

    def __init__(self, config: Config, described: Described | None = None):
        self._config, self._described = config, described or {}
        self.folder = (config.output_path / "checkpoints").absolute()
        self._manager: ocp.CheckpointManager | None = None
        self._handler = StateHandler()
        self._val_losses: dict[int, float] = {}
        self._saved: Path | None = None  # the last that this run has written, or is writing

    def save(self, step: int, state: Any, position: Position, val_loss: float | None = None) -> Path | None:
        """Copies the state to the host and writes it in the background, one save after the other.

        Returns when the state is copied: the next step may then reuse its memory. Does nothing if the step is already saved.

        Args:
          position: in the data, as `build_manifest` takes it.
          val_loss: validation loss of these parameters, if they were evaluated.

        Returns:
          The folder, which exists when it is complete; None if the step is already saved.

        Raises:
          CheckpointError: this checkpoint or the previous one could not be written.
        """
        manager = self.open_to_write()
        self.wait_until_written()
        with self._reported("write"):
            if step in manager.all_steps():
                return None
            if val_loss is not None and math.isfinite(val_loss):
                self._val_losses[step] = val_loss
            self._handler.manifest = build_manifest(self._config, step, state, position, val_loss, self._described)
            self._handler.earlier = self._saved
            chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
            save = StateSave(in_its_own_memory(state), save_args=chunks)
            if not manager.save(step, args=ocp.args.Composite(state=save)):
                raise CheckpointError(
                    f"{self.folder} holds step {manager.latest_step()}, so that step {step} cannot be saved: something else writes "
                    f"there"
                )
        self._saved = self.folder / f"{PREFIX}_{step}"
        return self._saved

    def is_best(self, val_loss: float) -> bool:
        """Whether `val_loss` is lower than that of every checkpoint."""
        self.open_to_write()
        return val_loss < min(self._val_losses.values(), default=float("inf"))

    def check(self) -> None:
        """Raises CheckpointError if a write in the background has failed. Does not wait."""
        if self._manager is not None:
            with self._reported("write"):
                self._manager.check_for_errors()

    def wait_until_written(self) -> None:
        """Waits until the last save is written, by all processes. Raises CheckpointError if it could not be written."""
        if self._manager is not None:
            with self._reported("write"):
                self._manager.wait_until_finished()

    def wait(self) -> None:
        """As `wait_until_written`; then looks whether it is there. A collective call. Raises CheckpointError if it is not."""
        self.wait_until_written()
        decide_on_process_0(lambda: check_saved(self._saved))

    def give_up(self) -> None:
        """Waits until a write in the background has ended or failed, but not long: where the folder is gone, one process may have
        failed, and Orbax's others wait for it."""

        def wait(manager: ocp.CheckpointManager) -> None:
            with contextlib.suppress(Exception):
                manager.wait_until_finished()

        if self._manager is not None:
            thread = threading.Thread(target=wait, args=(self._manager,), daemon=True)
            thread.start()
            thread.join(_PATIENCE)
        if jax.process_index() == 0:
            remove_drafts(self.folder.parent)

    def find(self) -> tuple[Path | None, list[str]]:
        """Finds the checkpoint that `runner.resume_dir` asks for. A collective call.

        Returns:
          (folder, notes), the same in all processes: a folder global_step_N, or None for a new run; and one line for
          the user about each torn checkpoint that was skipped.

        Raises:
          ConfigError: resume_dir names a path without a complete checkpoint, or this experiment's folder holds later
            checkpoints, which would get mixed up with those of this run.
        """
        path, notes = decide_on_process_0(self._find)
        return Path(path) if path else None, notes

    def _find(self) -> tuple[str | None, list[str]]:
        wanted = self._config.runner.resume_dir
        last, notes = self._newest()
        if wanted == "auto":
            return str(last) if last else None, notes
        found = None if wanted in (None, "fresh") else resolve(Path(wanted))
        if found and (reason := why_torn(found)):
            raise CheckpointError(f"runner.resume_dir: {found} is torn: {reason}: choose another checkpoint")
        if last and step_of(last) > (step_of(found) if found else 0):
            raise ConfigError(
                f"runner.resume_dir: {wanted or 'null'}, but {self.folder} already holds checkpoints up to step "
                f"{step_of(last)}: set runner.resume_dir: auto to continue from there, or set another "
                f"runner.experiment_name, or move them away"
            )
        return str(found) if found else None, []

    def _newest(self) -> tuple[Path | None, list[str]]:
        """`newest` of this experiment. Raises CheckpointError if all are torn and runner.resume_dir is not "fresh"."""
        last, notes = newest(self.folder)
        if last is None and (torn := checkpoints_in(self.folder)) and self._config.runner.resume_dir != "fresh":
            raise CheckpointError(
                f"runner.resume_dir: {self._config.runner.resume_dir or 'null'}, but none of the {len(torn)} checkpoints in "
                f"{self.folder} is complete: {torn[0].name}: {why_torn(torn[0])}: put back what is missing, or set "
                f"runner.resume_dir: fresh to begin at step 1 (they are kept as {_TORN}{PREFIX}_N)"
            )
        return last, notes

    def find_to_use(self, wanted: str | Path | None = None) -> tuple[Path | None, list[str]]:
        """Finds a checkpoint to use without training. A collective call.

        Args:
          wanted: a folder as `runner.resume_dir` takes it, or "auto". None: what `runner.resume_dir` says, and if that is
            null, "auto".

        Returns:
          (folder, notes) as `find`; None if this experiment has no complete checkpoint.

        Raises:
          ConfigError: `wanted` has no complete checkpoint.
        """
        path, notes = decide_on_process_0(lambda: self._find_to_use(wanted))
        return Path(path) if path else None, notes

    def _find_to_use(self, wanted: str | Path | None) -> tuple[str | None, list[str]]:
        wanted = wanted or self._config.runner.resume_dir or "auto"
        if wanted in ("auto", "fresh"):
            last, notes = self._newest()
            return str(last) if last else None, notes
        found = resolve(Path(wanted))
        if reason := why_torn(found):
            raise CheckpointError(f"{found} is torn: {reason}: choose another checkpoint")
        return str(found), []

    def restore(self, path: Path, shapes: Any, shardings: Any, *, to_train: bool = True) -> tuple[Any, Position]:
        """Reads a checkpoint that any layout may have written; each device reads its own slices. A collective call.

        Args:
          path: from `find` or `find_to_use`.
          shapes: tree of the shapes and dtypes of this run's state.
          shardings: tree of its shardings.
          to_train: whether this run must be the one that wrote it, so that training goes on.

        Returns:
          (state, position): the state on this run's devices, and the position in the data.

        Raises:
          ConfigError: the checkpoint is of another model, or of another run (`same_run.compare`), or its position in the
            data means something else in this run.
          CheckpointError: a file is damaged or cannot be read.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        manifest = decide_on_process_0(lambda: read_manifest(path))
        problems = self._differences(path, manifest)[1] if to_train else []
        if problems := [*problems, *tree_problems(path, manifest, target)]:
            raise ConfigError(problems)
        if self._config.runner.verify_checkpoint:
            advice = "resume from an earlier checkpoint with runner.resume_dir"
            try:
                found = [f"{problem}: {advice}" for problem in damages(path, jax.process_index(), jax.process_count())]
            except ConfigError as error:  # perhaps in this process alone
                found = error.problems
            raise_together(found)
        return_large_buffers()
        with self._reported("read", path):
            handlers = {"state": StateHandler(bytes_at_once(path / "state", target))}
            with ocp.CheckpointManager(path.parent, options=_options(), item_handlers=handlers) as manager:
                state = manager.restore(step_of(path), args=ocp.args.Composite(state=StateRestore(target)))
        if (step := int(state["state"]["step"])) != step_of(path):
            raise CheckpointError(f"{path / 'state'} is of step {step}, but the folder's name says {step_of(path)}")
        return state["state"], position_in(manifest)

    def position(self, path: Path) -> tuple[Position, list[str]]:
        """A checkpoint's position in the data, as from `restore`; and lines about what has changed since. A collective call.

        Raises:
          ConfigError: it means something else in this run, or this is not the run that wrote it.
        """
        manifest = decide_on_process_0(lambda: read_manifest(path))
        notes, problems = self._differences(path, manifest)
        if problems:
            raise ConfigError(problems)
        return position_in(manifest), notes

    def _differences(self, path: Path, manifest: dict[str, Any]) -> tuple[list[str], list[str]]:
        notes, problems = compare(path, manifest, self._config, self._described)
        return notes, [*position_problems(path, manifest, self._config), *problems]

    def open_to_write(self) -> ocp.CheckpointManager:
        """Makes the folder ready for `save`; does nothing the second time. A collective call.

        Torn checkpoints are renamed, because Orbax would count them.

        Raises:
          CheckpointError: a checkpoint cannot be read, so that it is not known to be torn; or the folder cannot be written.
        """
        if self._manager is None:
            with self._reported("write"):
                steps = decide_on_process_0(self._clear_torn)
                self._val_losses = {int(step): loss for step, loss in steps.items() if math.isfinite(loss or math.nan)}
                runner = self._config.runner
                keep = _Keep(
                    runner.keep_checkpoints,
                    runner.keep_checkpoint_interval,
                    self._val_losses if runner.keep_best_checkpoint else {},
                )
                self._manager = ocp.CheckpointManager(
                    self.folder, options=_options(keep), item_handlers={"state": self._handler}
                )
        return self._manager

    def _clear_torn(self) -> dict[str, float | None]:
        """Renames the folders of torn checkpoints, once all have been read.

        Returns:
          step → validation loss of the complete checkpoints.
        """
        found = checkpoints_in(self.folder)
        torn = [path for path in found if why_torn(path)]
        for path in torn:
            path.rename(_unused(path.with_name(_TORN + path.name)))
        return {str(step_of(path)): read_manifest(path)["val_loss"] for path in found if path not in torn}

    @contextlib.contextmanager
    def _reported(self, verb: str, path: Path | None = None) -> Iterator[None]:
        """Turns any error of Orbax, TensorStore or the file system into one line that says which checkpoint is left."""
        try:
            yield
        except ConfigError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
                raise  # a step or a barrier has failed because a process died: the watchdog says which
            try:
                left, _ = newest(self.folder)
                kept = f"the newest complete one is {left}" if left else "there is no complete one"
            except ConfigError as other:
                kept = str(other)
            reason = re.sub(r"\s+", " ", str(error))
            if len(reason) > 400:  # TensorStore's messages end with the file and the system's error
                reason = f"{reason[:60]} … {reason[-300:]}"
            raise CheckpointError(f"cannot {verb} a checkpoint in {path or self.folder}: {reason}: {kept}") from error


def _unused(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


class _Keep(PreservationPolicy):
    """Keeps the newest `count` (None: all), the multiples of `interval`, and the one of the lowest validation loss."""

    def __init__(self, count: int | None, interval: int | None, val_losses: dict[int, float]):
        self._count, self._interval, self._val_losses = count, interval, val_losses

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        newest = steps if self._count is None else steps[-self._count :]
        known = {step: loss for step, loss in self._val_losses.items() if step in steps}
        best = min(known, key=lambda step: known[step]) if known else None
        return [s in newest or s == best or (self._interval is not None and s % self._interval == 0) for s in steps]


def _options(keep: PreservationPolicy | None = None) -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(
        step_prefix=PREFIX,
        preservation_policy=keep,
        cleanup_tmp_directories=keep is not None,
        async_options=ocp.AsyncOptions(timeout_secs=_WRITE_TIMEOUT),
    )
