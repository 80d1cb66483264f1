"""Finds checkpoints, describes them and verifies them.

`manifest.json` is for people and tools: step, data position, mesh, versions, the tree with shapes and dtypes, the
config. `checksums.json` has the size and CRC-32 of every file. The sizes quickly tell a torn checkpoint, one that is
incomplete, from a complete one; the checksums reveal flipped bits.
"""

import contextlib
import json
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxpar.checkpoint.reading import CheckpointError, patiently
from jaxpar.config import Config, ConfigError
from jaxpar.run.agreement import versions

PREFIX = "global_step"
MANIFEST, CHECKSUMS = "manifest.json", "checksums.json"
COMMITTED = "commit_success.txt"  # the last file that Orbax writes
_PARTS = "checksums.part."  # prefix of the files that `merge_checksums` merges
_PIECE = 2**22  # bytes read at once
_THREADS = 8

Position = dict[str, Any]
Checksums = dict[str, tuple[int, int]]  # path inside the checkpoint → bytes, CRC-32


def build_manifest(
    config: Config,
    step: int,
    state: Any,
    position: Position,
    val_loss: float | None,
    described: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `manifest.json`.

    Args:
      state: tree of arrays; the mesh is that of its `step`.
      position: in the data, with `batch`, the number of global batches read so far; see `jaxpar.run.sources`.
      val_loss: validation loss of these parameters, or None.
      described: of the run, beside its config; from `same_run.describe`.
    """
    return {
        "step": step,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "val_loss": val_loss,
        "data": {**position, "global_batch_size": config.actor.global_batch_size},
        "mesh": dict(state["step"].sharding.mesh.shape),
        "processes": jax.process_count(),
        "versions": versions(),
        "tree": {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in named_leaves(state)},
        "config": config.model_dump(),
        "run": dict(described),
    }


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The content of `manifest.json`.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is not JSON, as when its end is missing.
      CheckpointError: it cannot be read; a field is missing; it is of another step than the folder's name says.
    """
    path = checkpoint / MANIFEST
    manifest = json.loads(patiently(Path.read_bytes, path))
    places = {"": manifest, **({key: manifest.get(key) for key in ("data", "config")} if _is_dict(manifest) else {})}
    wrong = [
        f"{place}.{key}".removeprefix(".")
        for place, fields in _FIELDS.items()
        for key, kind in fields.items()
        if not (_is_dict(places.get(place)) and key in places[place] and isinstance(places[place][key], kind))
    ]
    if wrong:
        raise CheckpointError(f"{path} has no {', '.join(wrong)}, or not as jaxpar writes them: {_ADVICE}")
    if manifest["step"] != step_of(checkpoint):
        raise CheckpointError(
            f"{path} is of step {manifest['step']}, but the folder's name says {step_of(checkpoint)}: give the folder its "
            f"name back"
        )
    return manifest


_FIELDS: dict[str, dict[str, Any]] = {
    "": {
        "step": int, "written": str, "val_loss": float | int | None, "data": dict, "mesh": dict, "processes": int, "versions": dict,
        "tree": dict, "config": dict,
    },
    "data": {"batch": int, "global_batch_size": int},
    "config": {"runner": dict},
}  # fmt: skip
_ADVICE = "put the file back as it was written, or move this checkpoint away"


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def position_in(manifest: dict[str, Any]) -> Position:
    """The position in the data, as `build_manifest` was given it."""
    return {key: value for key, value in manifest["data"].items() if key != "global_batch_size"}


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(name, leaf) of each leaf, with names such as params/layers/attention/query."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def write_checksums(folder: Path, paths: Sequence[Path], part: str) -> None:
    """Reads back the files among `paths`, several at a time, and writes a file of checksums for `merge_checksums`.

    Args:
      folder: `state` of the checkpoint, under its temporary name.
      paths: files and folders below it; folders are ignored.
      part: name of this part of the checksums.
    """
    files = [path for path in sorted(paths) if path.is_file()]
    names = [f"state/{path.relative_to(folder)}" for path in files]
    with ThreadPoolExecutor(_THREADS) as threads:  # zlib releases the interpreter lock
        sums = dict(zip(names, threads.map(_checksum, files), strict=True))
    (folder.parent / f"{_PARTS}{part}").write_text(json.dumps(sums))


def merge_checksums(checkpoint: Path) -> None:
    """Merges the files of all `write_checksums` calls into `checksums.json` and removes them."""
    parts = list(checkpoint.glob(f"{_PARTS}*"))
    sums: Checksums = {name: entry for part in parts for name, entry in json.loads(part.read_text()).items()}
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(sums.items())]
    (checkpoint / CHECKSUMS).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for part in parts:
        part.unlink()


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in `folder`, or None; and a line for each torn one that is newer.

    Raises:
      CheckpointError: as `why_torn`, of one that is newer, or `folder` cannot be read.
    """
    torn = dict.fromkeys(checkpoints_in(folder, rf"{PREFIX}_\d+\..*tmp.*"), "it was not completely written")
    found = None
    for path in checkpoints_in(folder):
        reason = why_torn(path)
        if reason is None:
            found = path
            break
        torn[path] = reason
    newer = {path: reason for path, reason in torn.items() if not found or step_of(path) > step_of(found)}
    return found, [f"{path} is torn and was skipped: {reason}" for path, reason in newer.items()]


def resolve(path: Path) -> Path:
    """The checkpoint that `path` means: a checkpoint itself, or the newest complete one of a folder or an experiment.

    Raises:
      ConfigError: there is no complete checkpoint.
    """
    path = path.expanduser().absolute()
    if re.fullmatch(rf"{PREFIX}_\d+", path.name) and path.is_dir():
        return path
    found = newest(path)[0] or newest(path / "checkpoints")[0]
    if found is None:
        raise ConfigError(f"no checkpoint ({PREFIX}_N) in {path}: give the folder of a checkpoint or of an experiment")
    return found


def checkpoints_in(folder: Path, pattern: str = rf"{PREFIX}_\d+") -> list[Path]:
    """The checkpoints in `folder`, complete or not, highest step first. Raises CheckpointError if it cannot be read."""
    try:
        paths = patiently(lambda path: list(path.iterdir()), folder)
    except FileNotFoundError:
        return []
    return sorted((path for path in paths if re.fullmatch(pattern, path.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(re.findall(r"\d+", checkpoint.name)[0])


def why_torn(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint; None if it is complete, which means every file exists and has its size.

    Raises:
      CheckpointError: a file cannot be read, so that nobody knows; or it has what jaxpar does not write.
    """
    try:
        patiently(Path.stat, checkpoint / COMMITTED)
        read_manifest(checkpoint)
        for name, (size, _) in _read_checksums(checkpoint).items():
            found = patiently(Path.stat, checkpoint / name).st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except ValueError as error:
        return f"{MANIFEST} or {CHECKSUMS} is not JSON ({error})"
    return None


def check_saved(checkpoint: Path | None) -> None:
    """Raises CheckpointError if a checkpoint that was saved is not there any more, or not complete."""
    if checkpoint and (reason := why_torn(checkpoint)):
        raise CheckpointError(f"{checkpoint} was saved, but {reason}: something else has moved or removed it")


def remove_drafts(experiment: Path) -> None:
    """Removes a folder that holds nothing but unfinished saves: TensorStore makes a folder anew that was moved while it writes."""
    drafts = experiment / "checkpoints"
    with contextlib.suppress(OSError):
        if list(experiment.iterdir()) == [drafts] and all(
            path.name.endswith(".orbax-checkpoint-tmp") for path in drafts.iterdir()
        ):
            shutil.rmtree(experiment)


def damages(checkpoint: Path, share: int, num_shares: int) -> Iterator[str]:
    """Reads every `num_shares`-th file, starting with number `share`; yields a line for each that was altered.

    Raises:
      CheckpointError: a file cannot be read.
    """

    def damage(item: tuple[str, tuple[int, int]]) -> str:
        path = checkpoint / item[0]
        try:
            good = patiently(_checksum, path) == tuple(item[1])
        except FileNotFoundError:
            return f"{path} is missing"
        return "" if good else f"{path} is damaged: its checksum differs from the one that was written"

    with ThreadPoolExecutor(_THREADS) as threads:
        own_share = list(_read_checksums(checkpoint).items())[share::num_shares]
        yield from filter(None, threads.map(damage, own_share))


def _read_checksums(checkpoint: Path) -> Checksums:
    path = checkpoint / CHECKSUMS
    sums = json.loads(patiently(Path.read_bytes, path))
    entries = sums.values() if _is_dict(sums) else ()
    if not entries or not all(isinstance(e, list) and [type(number) for number in e] == [int, int] for e in entries):
        raise CheckpointError(f"{path} has no files with size and checksum: {_ADVICE}")
    return sums


def _checksum(file: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc
