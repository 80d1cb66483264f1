"""From the devices that a collective connects to the mesh axes that it runs over.

**Numbers in HLO are not device ids.** With `use_global_device_ids`, an entry of `replica_groups` is
`replica · num_partitions + partition`; without it, it is a replica. `source_target_pairs` with a channel are partitions
(openxla/xla `service/collective_ops_utils.h`, `CollectiveOpGroupMode`). Under `jax.jit` there is one replica, and
partition p is the p-th device of the program's assignment. For a mesh that is `mesh.devices.flatten()`, so the coordinates
of partition p are those of p in row-major order over the mesh's *shape*, whatever the ids of the devices (a test checks
this on a permuted mesh).
"""

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from jaxpar.measure.hlo.parse import Instruction, Module

Groups = list[tuple[int, ...]]

_LISTED = r"\{(?:\{[\d,]*\},?)*\}"
_IOTA = r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
_NAMED = r"mesh\[[^\]]*\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))? ?\{[^}]*\}"
REPLICA_GROUPS = rf"replica_groups=({_LISTED}|{_IOTA}|{_NAMED})"
SOURCE_TARGET_PAIRS = rf"source_target_pairs=({_LISTED})"


def groups_text(instruction: Instruction, kind: str) -> str:
    """The attributes that determine a collective's groups. There are thousands of ids, but few distinct texts."""
    text = instruction.attribute(SOURCE_TARGET_PAIRS if kind == "collective-permute" else REPLICA_GROUPS)
    channel = "channel_id=" in instruction.attributes
    return f"{text} {channel} {'use_global_device_ids=true' in instruction.attributes}"


def collective_groups(module: Module, instruction: Instruction, kind: str) -> Groups | None:
    """The groups of places in the device assignment that a collective joins; of a permute, the pairs that differ. None:
    they are in an unknown notation."""
    permute = kind == "collective-permute"
    text = instruction.attribute(SOURCE_TARGET_PAIRS if permute else REPLICA_GROUPS)
    if text is None:
        return None
    groups = device_groups(
        parse_groups(text),
        module.num_replicas,
        module.num_partitions,
        channel="channel_id=" in instruction.attributes,
        global_ids="use_global_device_ids=true" in instruction.attributes,
        pairs=permute or kind == "all-to-all",
    )
    return [pair for pair in groups if pair[0] != pair[1]] if permute else groups


def parse_groups(text: str) -> Groups:
    """Reads groups in any of XLA's notations.

    - `{{0,1},{2,3}}`. `{}` means all devices in one group and returns [].
    - `[2,4]<=[8]`, and `[2,4]<=[4,2]T(1,0)`: `arange(8).reshape(4, 2).transpose(1, 0).reshape(2, 4)`, a group per row.
    - `mesh['a'=2,'b'=4] {'b'}`, printed by jax 0.12: slices along the axes in braces (see `_named_groups`).
    """
    if text.startswith("mesh"):
        return _named_groups(text)
    if text.startswith("{"):
        return [tuple(_integers(group)) for group in re.findall(r"\{([\d,]+)\}", text)]
    shape, source = text.split("<=")
    return _rows(_iota(source).reshape(_integers(shape.strip("[]"))))


def _named_groups(text: str) -> Groups:
    """Reads `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}` (openxla/xla `hlo/ir/mesh_and_axis.cc`).

    Without device_ids, the ids count up. `'b':(2)2` is a part of an axis: b is split, major to minor, into 2 × 2, and
    this is the second part.
    """
    # If XLA writes groups in a new way, there is no match: an error is better than a wrong count.
    mesh, ids, chosen = re.fullmatch(r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? ?\{(.*)\}", text).groups()  # type: ignore[union-attr]
    sizes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", mesh)}
    parts: list[int] = []  # the mesh's shape, with axes split where only a part of them is used
    along: list[int] = []  # indices of the parts that the groups run along
    for axis, size in sizes.items():
        asked = re.findall(rf"{re.escape(axis)}(?:,|$|:\((\d+)\)(\d+))", chosen)
        spans = [(int(before), int(before) * int(width)) if before else (1, size) for before, width in asked]
        cuts = sorted({1, size, *(cut for span in spans for cut in span)})
        for low, high in itertools.pairwise(cuts if size > 1 else [1, 1]):
            if any(start <= low and high <= end for start, end in spans):
                along.append(len(parts))
            parts.append(high // low)
    order = (
        np.arange(math.prod(parts)) if ids is None else _iota(ids) if ids.startswith("[") else np.array(_integers(ids))
    )
    rows = np.moveaxis(order.reshape(parts), along, range(-len(along), 0))
    return _rows(rows.reshape(-1, math.prod(parts[i] for i in along)))


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)` → arange(8).reshape(4, 2).transpose(1, 0)."""
    shape, *order = (_integers(part) for part in re.findall(r"[\[(]([\d,]+)[\])]", text))
    return np.arange(math.prod(shape)).reshape(shape).transpose(order[0] if order else range(len(shape)))


def _rows(ids: np.ndarray) -> Groups:
    return [tuple(row) for row in ids.tolist()]


def device_groups(
    groups: Groups, replicas: int, partitions: int, *, channel: bool, global_ids: bool, pairs: bool
) -> Groups:
    """Groups as positions in the device assignment, for each of XLA's ways to number the members.

    Args:
      groups: as written; [] means one group of all.
      channel: the instruction has a channel_id.
      global_ids: the instruction has use_global_device_ids=true.
      pairs: the instruction is an all-to-all or a permute, which with a channel runs among partitions.
    """
    if global_ids:
        return groups or [tuple(range(replicas * partitions))]
    if channel and pairs:
        groups = groups or [tuple(range(partitions))]
        return [tuple(r * partitions + p for p in group) for r in range(replicas) for group in groups]
    groups = groups or [tuple(range(replicas))]
    if channel:
        return [tuple(r * partitions + p for r in group for p in range(partitions)) for group in groups]
    return [tuple(r * partitions + p for r in group) for p in range(partitions) for group in groups]


class MeshAxes:
    """Recognizes groups of devices as slices of a mesh.

    Args:
      shape: size of each axis.
      axes: names of the axes, in the same order.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[str]):
        self.shape, self.axes = tuple(shape), tuple(axes)
        positions = np.arange(math.prod(self.shape)).reshape(self.shape)
        split = [i for i, size in enumerate(self.shape) if size > 1]
        self._by_groups: dict[frozenset[frozenset[int]], tuple[str, ...]] = {}
        for number in range(len(split), 0, -1):
            for chosen in itertools.combinations(split, number):
                members = math.prod(self.shape[i] for i in chosen)
                rows = np.moveaxis(positions, chosen, range(-number, 0)).reshape(-1, members)
                self._by_groups[_as_sets(rows.tolist())] = tuple(self.axes[i] for i in chosen)

    def of_groups(self, groups: Groups) -> tuple[str, ...]:
        """The axes along which the groups are slices of the mesh; () if there are no such axes."""
        return self._by_groups.get(_as_sets(groups), ())

    def of_pairs(self, pairs: Groups) -> tuple[str, ...]:
        """The axes along which some sender and receiver differ: for a ring or an open chain along an axis, that axis."""
        ids = np.array(pairs).reshape(-1, 2)
        if ids.max(initial=0) >= math.prod(self.shape):
            return ()
        source, target = (np.stack(np.unravel_index(ids[:, i], self.shape)) for i in (0, 1))
        return tuple(axis for axis, moved in zip(self.axes, (source != target).any(1), strict=True) if moved)


def _as_sets(groups: Sequence[Sequence[int]]) -> frozenset[frozenset[int]]:
    return frozenset(frozenset(group) for group in groups)


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
