"""Which folders are checkpoints, and what a checkpoint says about itself.

`manifest.json` is for people and tools: step, data position, mesh, versions, the tree with shapes and dtypes, the
config. `checksums.json` has size and CRC-32 of every file: by the sizes a torn checkpoint is known from a complete one
at a glance, by the sums flipped bits are found.
"""

import json
import platform
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxpar.config import Config, ConfigError

PREFIX = "global_step"
MANIFEST, CHECKSUMS = "manifest.json", "checksums.json"
COMMITTED = "commit_success.txt"  # Orbax's, the last file that it writes
_PARTS = "checksums.part."
_PIECE = 2**22  # bytes read at once
_THREADS = 8

Checksums = dict[str, tuple[int, int]]  # path inside of the checkpoint → bytes, CRC-32


def build_manifest(config: Config, step: int, state: Any, batch: int, val_loss: float | None) -> dict[str, Any]:
    """The content of `manifest.json`.

    Args:
      state: arrays; its `step` tells the mesh.
      batch: global batches read so far, the position in the data.
    """
    packages = ("jaxpar", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "step": step,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "val_loss": val_loss,
        "data": {"batch": batch, "global_batch_size": config.actor.global_batch_size},
        "mesh": dict(state["step"].sharding.mesh.shape),
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "tree": {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in named_leaves(state)},
        "config": config.model_dump(),
    }


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Raises OSError or ValueError if it is not there or no JSON."""
    return json.loads((checkpoint / MANIFEST).read_text())


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def write_checksums(folder: Path, paths: Sequence[Path], part: str) -> None:
    """Reads the files among `paths` back, several at a time.

    Args:
      folder: `state` of the checkpoint, under the name that it has while it is written.
      part: name of this part, for `merge_checksums`.
    """
    files = [path for path in sorted(paths) if path.is_file()]
    names = [f"state/{path.relative_to(folder)}" for path in files]
    with ThreadPoolExecutor(_THREADS) as threads:  # zlib works without the interpreter's lock
        sums = dict(zip(names, threads.map(_checksum, files), strict=True))
    (folder.parent / f"{_PARTS}{part}").write_text(json.dumps(sums))


def merge_checksums(checkpoint: Path) -> None:
    parts = list(checkpoint.glob(f"{_PARTS}*"))
    sums: Checksums = {name: entry for part in parts for name, entry in json.loads(part.read_text()).items()}
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(sums.items())]
    (checkpoint / CHECKSUMS).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for part in parts:
        part.unlink()


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete one, and a line for each torn one that is newer."""
    torn = dict.fromkeys(checkpoints_in(folder, rf"{PREFIX}_\d+\..*tmp.*"), "it was not written to its end")
    found = None
    for path in checkpoints_in(folder):
        reason = why_torn(path)
        if reason is None:
            found = path
            break
        torn[path] = reason
    newer = {path: reason for path, reason in torn.items() if not found or step_of(path) > step_of(found)}
    return found, [f"{path} is torn and passed over: {reason}" for path, reason in newer.items()]


def resolve(path: Path) -> Path:
    """A checkpoint's folder, or the newest complete one in a folder of them or of an experiment.

    Raises:
      ConfigError: there is none.
    """
    path = path.expanduser().absolute()
    if re.fullmatch(rf"{PREFIX}_\d+", path.name) and path.is_dir():
        return path
    found = newest(path)[0] or newest(path / "checkpoints")[0]
    if found is None:
        raise ConfigError(
            f"no checkpoint ({PREFIX}_N) in {path}: give a checkpoint's folder, or the folder of an experiment"
        )
    return found


def checkpoints_in(folder: Path, pattern: str = rf"{PREFIX}_\d+") -> list[Path]:
    """Highest step first, complete or not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(pattern, p.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(re.findall(r"\d+", checkpoint.name)[0])


def why_torn(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint, or None if it is complete: every file is there with its size."""
    if not (checkpoint / COMMITTED).exists():
        return f"{COMMITTED} is missing"
    try:
        read_manifest(checkpoint)
        for name, (size, _) in _read_checksums(checkpoint).items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def damages(checkpoint: Path, share: int, num_shares: int) -> Iterator[str]:
    """Reads every `num_shares`-th file, from the `share`-th on; a line for each that is not what was written."""

    def damage(item: tuple[str, tuple[int, int]]) -> str:
        path = checkpoint / item[0]
        try:
            good = _checksum(path) == tuple(item[1])
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        return "" if good else f"{path} is damaged: its checksum is not the one that was written"

    with ThreadPoolExecutor(_THREADS) as threads:
        mine = list(_read_checksums(checkpoint).items())[share::num_shares]
        yield from filter(None, threads.map(damage, mine))


def _read_checksums(checkpoint: Path) -> Checksums:
    return json.loads((checkpoint / CHECKSUMS).read_text())


def _checksum(file: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc
