"""How Orbax writes and reads the state of a run: with manifest and checksums, in small chunks, in little memory."""

import contextlib
import ctypes
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxpar.checkpoint.manifest import check_saved, merge_checksums, named_leaves, write_checksums, write_manifest

_PROCESS = "ocdbt.process_"  # prefix of the folder in which Orbax puts what one process writes
_ALIGNMENT = 64  # bytes; jax copies what begins elsewhere once more
# A reader reads whole chunks, even if it needs only part of them, so they must not be large.
CHUNK_BYTES = 2**24
_READ_AT_ONCE = (
    0.05  # fraction of the state that a process restores which may be on its way from disk to the devices at a time
)


class StateHandler(ocp.StandardCheckpointHandler):
    """Adds manifest and checksums to what Orbax writes, before its renaming makes the checkpoint visible.

    Attributes:
      manifest: content of `manifest.json`; set it before each save.
      earlier: the checkpoint that was saved before, if any; set it before each save. While the next one is written, process 0
        looks whether it is still there.
    """

    manifest: dict[str, Any]
    earlier: Path | None = None

    def __init__(self, bytes_at_once: int = 10**9) -> None:
        super().__init__(restore_concurrent_gb=bytes_at_once / 10**9)

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        futures = await super().async_save(directory, *args, **kwargs)
        return [_Written(futures or [], Path(getattr(directory, "path", directory)), self.earlier)]

    def finalize(self, directory: Any) -> None:  # runs on process 0 after all processes have written
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
    """A future for Orbax: waits until this process has written its part of the state, then writes its checksums."""

    def __init__(self, futures: Sequence[Any], folder: Path, earlier: Path | None):
        self._futures, self._folder, self._earlier = futures, folder, earlier

    def result(self, timeout: float | None = None) -> None:
        for future in self._futures:
            future.result(timeout)
        name = f"{_PROCESS}{jax.process_index()}"
        write_checksums(self._folder, list((self._folder / name).rglob("*")), name)
        if jax.process_index() == 0:
            check_saved(self._earlier)


def in_its_own_memory(state: Any) -> Any:
    """The same arrays in memory that the next step is not given.

    Orbax copies from devices to host memory, but of a CPU it takes views. XLA would then copy what is donated to the next step, in
    that step's time. What has replicas, Orbax cuts into pieces, which are copies.
    """
    if jax.default_backend() != "cpu":
        return state

    def copied(x: jax.Array) -> jax.Array:
        if any(shard.replica_id for shard in x.addressable_shards):
            return x
        shards = [_copied(shard.data) for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)

    return jax.tree.map(copied, state)


def _copied(shard: jax.Array) -> jax.Array:
    """A copy by numpy, because the memory that numpy asks for has large pages, so that the system gives it more quickly."""
    memory = np.empty(shard.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + shard.nbytes].view(shard.dtype).reshape(shard.shape)
    np.copyto(copy, shard)
    return jax.device_put(copy, shard.sharding)


def return_large_buffers() -> None:
    """Makes glibc return freed read buffers to the system at once; by default its allocator keeps some of them."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        for parameter, size in ((-3, 2**16), (-1, 2**17)):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, bytes
            ctypes.CDLL(None).mallopt(parameter, size)


def bytes_at_once(folder: Path, target: Any) -> int:
    """How many bytes TensorStore may read at a time.

    At least the largest shard, counted in whole chunks, because it cannot read less; or a fixed fraction of all shards,
    if that is more.

    Args:
      folder: `state` of the checkpoint.
      target: tree of `jax.ShapeDtypeStruct` with the shardings that the state will have.
    """
    stored = dict(named_leaves(StateHandler().metadata(folder).tree))
    shards = [
        _in_whole_chunks(index, leaf, stored[name].storage.chunk_shape)
        for name, leaf in named_leaves(target)
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    ]
    return max(max(shards) + 1, int(sum(shards) * _READ_AT_ONCE))


def _in_whole_chunks(index: Sequence[slice], leaf: jax.ShapeDtypeStruct, chunk: Sequence[int]) -> int:
    """Bytes of all stored chunks that overlap the slice `index` of an array."""
    size = leaf.dtype.itemsize
    for where, length, step in zip(index, leaf.shape, chunk, strict=True):
        start, stop, _ = where.indices(length)
        size *= -(-stop // step) * step - start // step * step
    return size
