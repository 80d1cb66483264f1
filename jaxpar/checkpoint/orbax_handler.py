"""How Orbax writes and reads the state of a run: with manifest and checksums, in pieces, and in little memory."""

import contextlib
import ctypes
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxpar.checkpoint.manifest import merge_checksums, named_leaves, write_checksums, write_manifest

_PROCESS = "ocdbt.process_"  # Orbax's folder of what one process wrote
# A reader takes chunks whole, even those that it needs a part of.
CHUNK_BYTES = 2**24
_READ_AT_ONCE = 0.05  # of the state that a process restores: what is on its way from disk to the devices


class StateHandler(ocp.StandardCheckpointHandler):
    """Adds manifest and checksums to what Orbax writes, before its renaming makes the checkpoint visible."""

    manifest: dict[str, Any]

    def __init__(self, bytes_at_once: int = 10**9) -> None:
        super().__init__(restore_concurrent_gb=bytes_at_once / 10**9)

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        futures = await super().async_save(directory, *args, **kwargs)
        return [_Written(futures or [], Path(getattr(directory, "path", directory)))]

    def finalize(self, directory: Any) -> None:  # on process 0, when all have written
        super().finalize(directory)
        folder = Path(directory)
        rest = [path for path in folder.rglob("*") if not path.relative_to(folder).parts[0].startswith(_PROCESS)]
        write_checksums(folder, rest, "rest")
        merge_checksums(folder.parent)
        write_manifest(folder.parent, self.manifest)


@ocp.args.register_with_handler(StateHandler, for_save=True)
@dataclasses.dataclass
class StateSave(ocp.args.StandardSave): ...


@ocp.args.register_with_handler(StateHandler, for_restore=True)
@dataclasses.dataclass
class StateRestore(ocp.args.StandardRestore): ...


class _Written:
    """Orbax's future of this process's part of the state, which then gets its checksums."""

    def __init__(self, futures: Sequence[Any], folder: Path):
        self._futures, self._folder = futures, folder

    def result(self, timeout: float | None = None) -> None:
        for future in self._futures:
            future.result(timeout)
        name = f"{_PROCESS}{jax.process_index()}"
        write_checksums(self._folder, list((self._folder / name).rglob("*")), name)


def return_large_buffers() -> None:
    """What is read on the way goes back to the system at once: glibc's allocator would keep a part of it."""
    with contextlib.suppress(AttributeError, OSError):  # another libc
        for parameter, size in ((-3, 2**16), (-1, 2**17)):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, bytes
            ctypes.CDLL(None).mallopt(parameter, size)


def bytes_at_once(folder: Path, target: Any) -> int:
    """Least bytes that TensorStore must be allowed to read at a time: the largest shard, in whole chunks; or a share of
    all shards, if that is more."""
    stored = dict(named_leaves(StateHandler().metadata(folder).tree))
    shards = [
        _in_whole_chunks(index, leaf, stored[name].storage.chunk_shape)
        for name, leaf in named_leaves(target)
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    ]
    return max(max(shards) + 1, int(sum(shards) * _READ_AT_ONCE))


def _in_whole_chunks(index: Sequence[slice], leaf: jax.ShapeDtypeStruct, chunk: Sequence[int]) -> int:
    size = leaf.dtype.itemsize
    for where, length, step in zip(index, leaf.shape, chunk, strict=True):
        start, stop, _ = where.indices(length)
        size *= -(-stop // step) * step - start // step * step
    return size
