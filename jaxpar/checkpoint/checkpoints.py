"""Checkpoints through Orbax: asynchronous, sharded, atomic, and checked when they are read.

`<experiment>/checkpoints/global_step_N/` holds `state/` (one array for each canonical parameter and moment, layers in
order, so that any layout can read what any other wrote) and what `jaxpar.checkpoint.manifest` writes beside it. Orbax writes under
another name and renames, so a folder of that name is complete, unless something took a part of it afterwards.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext, PreservationPolicy

from jaxpar.checkpoint.manifest import (
    PREFIX,
    build_manifest,
    checkpoints_in,
    damages,
    named_leaves,
    newest,
    read_manifest,
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
    return_large_buffers,
)
from jaxpar.config import Config, ConfigError
from jaxpar.run.processes import check_together, from_first

_TORN = "torn_"  # before the name of a folder that was found incomplete
_WRITE_TIMEOUT = 3600  # seconds; Orbax's own 600 are short for a large model on a slow file system


class CheckpointError(ConfigError):
    """A checkpoint cannot be written or read: no space, no permission, damage. The message names the file."""


class Checkpoints:
    """The checkpoints of one experiment.

    Args:
      config: says where they are and which are kept, and is stored with them.
    """

    def __init__(self, config: Config):
        self._config = config
        self.folder = (config.output_path / "checkpoints").absolute()
        self._manager: ocp.CheckpointManager | None = None
        self._handler = StateHandler()
        self._val_losses: dict[int, float] = {}

    def save(self, step: int, state: Any, batch: int, val_loss: float | None = None) -> None:
        """Copies the state to the host and writes it in the background. A step that is there already is kept.

        Args:
          batch: position in the data, `BatchLoader.get_state()["batch"]`.
          val_loss: of these parameters, if they were evaluated.

        Raises:
          CheckpointError: this one or the one before could not be written.
        """
        with self._reported("write"):
            manager = self._open_to_write()
            manager.wait_until_finished()
            if step in manager.all_steps():
                return
            if val_loss is not None and math.isfinite(val_loss):
                self._val_losses[step] = val_loss
            self._handler.manifest = build_manifest(self._config, step, state, batch, val_loss)
            chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
            manager.save(step, args=ocp.args.Composite(state=StateSave(state, save_args=chunks)))

    def is_best(self, val_loss: float) -> bool:
        """Whether it is below that of every checkpoint."""
        self._open_to_write()
        return val_loss < min(self._val_losses.values(), default=float("inf"))

    def check(self) -> None:
        """Raises CheckpointError if writing has failed in the background; does not wait."""
        if self._manager is not None:
            with self._reported("write"):
                self._manager.check_for_errors()

    def wait(self) -> None:
        """Until everything is written. Raises CheckpointError if it was not."""
        if self._manager is not None:
            with self._reported("write"):
                self._manager.wait_until_finished()

    def find(self) -> tuple[Path | None, list[str]]:
        """The checkpoint that `runner.resume_dir` asks for, a folder global_step_N or None to start anew, and what to
        tell about torn ones that were passed over. The same in all processes.

        Raises:
          ConfigError: it names a path without a complete checkpoint, or this experiment's folder holds later
            checkpoints, which the run would get mixed up with.
        """
        path, notes = from_first(self._find)
        return Path(path) if path else None, notes

    def _find(self) -> tuple[str | None, list[str]]:
        wanted = self._config.runner.resume_dir
        last, notes = newest(self.folder)
        if wanted == "auto":
            return str(last) if last else None, notes
        found = None if wanted is None else resolve(Path(wanted))
        if found and (reason := why_torn(found)):
            raise CheckpointError(f"runner.resume_dir: {found} is torn: {reason}: choose another checkpoint")
        if last and step_of(last) > (step_of(found) if found else 0):
            raise ConfigError(
                f"runner.resume_dir: {wanted or 'null'}, but {self.folder} already holds checkpoints up to step "
                f"{step_of(last)}: set resume_dir: auto to go on from there, or another runner.experiment_name, or "
                f"move them away"
            )
        return str(found) if found else None, []

    def restore(self, path: Path, shapes: Any, shardings: Any) -> tuple[Any, dict[str, int]]:
        """State and data position from a checkpoint of any layout; each device reads its own slices.

        Args:
          path: from `find`.
          shapes, shardings: trees that say how the state shall lie on this run's devices.

        Raises:
          ConfigError: another model's checkpoint, or a position in the data that means something else in this run.
          CheckpointError: a file is damaged or cannot be read.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        manifest = from_first(lambda: read_manifest(path))
        self._check(path, manifest, target)
        if self._config.runner.verify_checkpoint:
            advice = "go on from an earlier checkpoint with runner.resume_dir"
            found = damages(path, jax.process_index(), jax.process_count())
            check_together([f"{problem}: {advice}" for problem in found])
        return_large_buffers()
        with self._reported("read", path):
            handlers = {"state": StateHandler(bytes_at_once(path / "state", target))}
            with ocp.CheckpointManager(path.parent, options=_options(), item_handlers=handlers) as manager:
                state = manager.restore(step_of(path), args=ocp.args.Composite(state=StateRestore(target)))
        return state["state"], {"batch": manifest["data"]["batch"]}

    def _check(self, path: Path, manifest: dict[str, Any], target: Any) -> None:
        problems = []
        batch, stored_batch = self._config.actor.global_batch_size, manifest["data"]["global_batch_size"]
        if batch != stored_batch:
            problems.append(
                f"actor.global_batch_size: {batch}, but {path} was written with {stored_batch}, and its data position "
                f"is counted in such batches: set it to {stored_batch}, or runner.resume_dir: null to start anew"
            )
        dynamic, stored = (
            runner["enable_dynamic_batch_size"] for runner in (vars(self._config.runner), manifest["config"]["runner"])
        )
        if dynamic != stored:
            problems.append(
                f"runner.enable_dynamic_batch_size: {dynamic}, but {path} was written with {stored}, and its data position "
                f"counts {'documents' if stored else 'sequences'}: set it to {stored}, or runner.resume_dir: null to start "
                f"anew"
            )
        theirs = manifest["tree"]
        ours = {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in named_leaves(target)}
        different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        for name in different[:3]:
            problems.append(
                f"runner.resume_dir: {path} has {name} {theirs.get(name, 'not at all')}, the model of this config "
                f"{ours.get(name, 'not at all')} (one of {len(different)} differences): resume with the config that it "
                f"was written with, or set runner.resume_dir: null to start anew"
            )
        if problems:
            raise ConfigError(problems)

    def _open_to_write(self) -> ocp.CheckpointManager:
        if self._manager is None:
            with self._reported("write"):
                steps = from_first(self._clear_torn)
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
        """Moves torn folders out of the way of Orbax, which takes every name for a checkpoint; step → validation loss
        of the others."""
        steps = {}
        for path in checkpoints_in(self.folder):
            if why_torn(path):
                path.rename(path.with_name(_TORN + path.name))
            else:
                steps[str(step_of(path))] = read_manifest(path)["val_loss"]
        return steps

    @contextlib.contextmanager
    def _reported(self, verb: str, path: Path | None = None) -> Iterator[None]:
        """Whatever Orbax, TensorStore or the file system raise, as one line that says what is left."""
        try:
            yield
        except ConfigError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            left, _ = newest(self.folder)
            kept = f"the newest complete one is {left}" if left else "there is no complete one"
            reason = re.sub(r"\s+", " ", str(error))
            if len(reason) > 400:  # TensorStore's end with the file and the system's own words
                reason = f"{reason[:60]} … {reason[-300:]}"
            raise CheckpointError(f"cannot {verb} a checkpoint in {path or self.folder}: {reason}: {kept}") from error


class _Keep(PreservationPolicy):
    """The newest `count`, the multiples of `interval`, and the best; all, if neither number is given."""

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
