"""Checkpoints through Orbax: asynchronous, sharded, atomic.

`<experiment>/checkpoints/global_step_N/` holds the state (one array for each canonical parameter, layers in order, so
that any layout can read what any other wrote), the data position and the config. A folder of that name is complete:
Orbax writes under another name and renames.
"""

import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxpar.config import Config, ConfigError

PREFIX = "global_step"


class Checkpoints:
    """The checkpoints of one experiment.

    Args:
      config: says where they are, and is stored with them.
    """

    def __init__(self, config: Config):
        self._config = config
        self.folder = (config.output_path / "checkpoints").absolute()
        self._manager: ocp.CheckpointManager | None = None

    def save(self, step: int, state: Any, data_position: dict[str, int]) -> None:
        """Copies the state to the host and writes it in the background. A step that is there already is kept."""
        if self._manager is None:
            self._manager = _open(self.folder)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({**data_position, "global_batch_size": self._config.actor.global_batch_size}),
                config=ocp.args.JsonSave(self._config.model_dump()),
            ),
        )

    def wait(self) -> None:
        """Until everything is written.

        Raises whatever went wrong in the background, such as OSError for a full disk.
        """
        if self._manager is not None:
            self._manager.wait_until_finished()

    def find(self) -> Path | None:
        """The checkpoint that `runner.resume_dir` asks for: a folder global_step_N, or None to start anew.

        Raises:
          ConfigError: it names a path without a checkpoint, or this experiment's folder holds later checkpoints, which
            the run would get mixed up with.
        """
        wanted = self._config.runner.resume_dir
        newest = _newest(self.folder)
        if wanted == "auto":
            return newest
        found = None if wanted is None else self._find_in(Path(wanted).expanduser().absolute())
        if newest and _step(newest) > (_step(found) if found else 0):
            raise ConfigError(
                f"runner.resume_dir: {wanted or 'null'}, but {self.folder} already holds checkpoints up to step "
                f"{_step(newest)}: set resume_dir: auto to go on from there, or another runner.experiment_name, or "
                f"move them away"
            )
        return found

    def _find_in(self, path: Path) -> Path:
        is_checkpoint = re.fullmatch(rf"{PREFIX}_\d+", path.name) and path.is_dir()
        found = path if is_checkpoint else _newest(path) or _newest(path / "checkpoints")
        if found is None:
            raise ConfigError(
                f"runner.resume_dir: no checkpoint ({PREFIX}_N) in {path}: give a checkpoint's folder, the folder of "
                f"an experiment, auto, or null to start anew"
            )
        return found

    def restore(self, path: Path, shapes: Any, shardings: Any) -> tuple[Any, dict[str, int]]:
        """State and data position from a checkpoint of any layout; each device reads its own slices.

        Args:
          path: from `find`.
          shapes, shardings: trees that say how the state shall lie on this run's devices.

        Raises:
          ConfigError: another model's checkpoint, or a global batch size other than this run's.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        with _open(path.parent) as manager:
            step = _step(path)
            position = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
            self._check(path, manager.item_metadata(step)["state"], target, position)
            restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
        return restored["state"], {"batch": position["batch"]}

    def _check(self, path: Path, stored: Any, target: Any, position: dict[str, int]) -> None:
        problems = []
        batch, stored_batch = self._config.actor.global_batch_size, position["global_batch_size"]
        if batch != stored_batch:
            problems.append(
                f"actor.global_batch_size: {batch}, but {path} was written with {stored_batch}, and its data position "
                f"is counted in such batches: set it to {stored_batch}, or runner.resume_dir: null to start anew"
            )
        theirs = {name: tuple(leaf.shape) for name, leaf in _named_leaves(getattr(stored, "tree", stored))}
        ours = {name: tuple(leaf.shape) for name, leaf in _named_leaves(target)}
        different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        for name in different[:3]:
            problems.append(
                f"runner.resume_dir: {path} has {name} {theirs.get(name, 'not at all')}, the model of this config "
                f"{ours.get(name, 'not at all')} (one of {len(different)} differences): resume with the config that it "
                f"was written with, or set runner.resume_dir: null to start anew"
            )
        if problems:
            raise ConfigError(problems)


def _open(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(step_prefix=PREFIX, enable_async_checkpointing=True)
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _newest(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    steps = [int(m[1]) for child in folder.iterdir() if (m := re.fullmatch(rf"{PREFIX}_(\d+)", child.name))]
    return folder / f"{PREFIX}_{max(steps)}" if steps else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("_")[2])


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
