"""Which devices a collective joins → which mesh axes it runs over.

**Numbers in HLO are not device ids.** With `use_global_device_ids` an entry of `replica_groups` is
`replica · num_partitions + partition`, else a replica; `source_target_pairs` with a channel are partitions
(openxla/xla `service/collective_ops_utils.h`, `CollectiveOpGroupMode`). Under `jax.jit` there is one replica, and
partition p is the p-th device of the program's assignment, which for a mesh is `mesh.devices.flatten()`: its coordinates
are those of p in row-major order over the mesh's *shape*, wherever the devices stand (held by a test on a permuted mesh).
"""

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

Groups = list[tuple[int, ...]]

_LISTED = r"\{(?:\{[\d,]*\},?)*\}"
_IOTA = r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
_NAMED = r"mesh\[[^\]]*\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))? ?\{[^}]*\}"
REPLICA_GROUPS = rf"replica_groups=({_LISTED}|{_IOTA}|{_NAMED})"
SOURCE_TARGET_PAIRS = rf"source_target_pairs=({_LISTED})"


def parse_groups(text: str) -> Groups:
    """Groups in any of XLA's notations.

    - `{{0,1},{2,3}}`; `{}` is all in one group, returned as none;
    - `[2,4]<=[8]`, and `[2,4]<=[4,2]T(1,0)`: `arange(8).reshape(4, 2).transpose(1, 0).reshape(2, 4)`, a group a row;
    - `mesh['a'=2,'b'=4] {'b'}`, which jax 0.12 prints: slices along the axes in braces (see `_named_groups`).
    """
    if text.startswith("mesh"):
        return _named_groups(text)
    if text.startswith("{"):
        return [tuple(_integers(group)) for group in re.findall(r"\{([\d,]+)\}", text)]
    shape, source = text.split("<=")
    return _rows(_iota(source).reshape(_integers(shape.strip("[]"))))


def _named_groups(text: str) -> Groups:
    """`mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}` (openxla/xla `hlo/ir/mesh_and_axis.cc`).

    device_ids is left out where the ids count up. `'b':(2)2` is part of an axis: with b cut, major to minor, into 2 × 2,
    the second one.
    """
    # No match is XLA writing groups in a new way: an error, not a wrong count.
    mesh, ids, chosen = re.fullmatch(r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? ?\{(.*)\}", text).groups()  # type: ignore[union-attr]
    sizes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", mesh)}
    parts: list[int] = []  # the mesh's shape, with axes cut where a part of them is asked for
    along: list[int] = []  # of these, the ones that groups run along
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


def joined(groups: Groups, replicas: int, partitions: int, *, channel: bool, global_ids: bool, pairs: bool) -> Groups:
    """Groups of places in the device assignment, for each of XLA's ways to read them.

    Args:
      groups: as written; none means all.
      channel, global_ids: the instruction has a channel_id; has use_global_device_ids=true.
      pairs: of an all-to-all or a permute, which with a channel run among partitions.
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
    """Recognises groups of devices as slices of a mesh.

    Args:
      shape: size of each axis.
      axes: their names, in the same order.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[str]):
        self.shape, self.axes = tuple(shape), tuple(axes)
        places = np.arange(math.prod(self.shape)).reshape(self.shape)
        split = [i for i, size in enumerate(self.shape) if size > 1]
        self._by_groups: dict[frozenset[frozenset[int]], tuple[str, ...]] = {}
        for number in range(len(split), 0, -1):
            for chosen in itertools.combinations(split, number):
                members = math.prod(self.shape[i] for i in chosen)
                rows = np.moveaxis(places, chosen, range(-number, 0)).reshape(-1, members)
                self._by_groups[_as_sets(rows.tolist())] = tuple(self.axes[i] for i in chosen)

    def of_groups(self, groups: Groups) -> tuple[str, ...]:
        """Axes over which the groups are the mesh's slices; () where no set of axes gives them."""
        return self._by_groups.get(_as_sets(groups), ())

    def of_pairs(self, pairs: Groups) -> tuple[str, ...]:
        """Axes along which any sender's and receiver's coordinates differ: one, for a ring or an open chain along it."""
        ids = np.array(pairs).reshape(-1, 2)
        if ids.max(initial=0) >= math.prod(self.shape):
            return ()
        source, target = (np.stack(np.unravel_index(ids[:, i], self.shape)) for i in (0, 1))
        return tuple(axis for axis, moved in zip(self.axes, (source != target).any(1), strict=True) if moved)


def _as_sets(groups: Sequence[Sequence[int]]) -> frozenset[frozenset[int]]:
    return frozenset(frozenset(group) for group in groups)


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
