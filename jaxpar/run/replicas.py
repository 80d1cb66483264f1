"""Checks that all devices that hold the same part of a parameter hold the same bits."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


class ReplicaError(Exception):
    """Replicas of a parameter differ. The message names the parameter and the devices."""


def check_replicas(params: Any) -> None:
    """Compares checksums of the replicas of each array's shards.

    A shard that only one device holds, such as a shard of a parameter that ZeRO splits, has no replica to compare with.

    Args:
      params: tree of arrays of floats on one mesh.

    Raises:
      ReplicaError: some replicas differ; raised in all processes.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    mesh = named[0][1].sharding.mesh
    axes = tuple(mesh.axis_names)

    def local(leaves: list[jax.Array]) -> jax.Array:
        bits = [lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}") for leaf in leaves]
        return jnp.stack([x.sum(dtype=jnp.uint32) for x in bits])[None]

    leaves = [leaf for _, leaf in named]
    specs = [leaf.sharding.spec for leaf in leaves]
    # check_vma=False: jax would assume that replicas are equal, which is the very thing to be checked.
    sums = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P(axes), check_vma=False)
    table = np.asarray(jax.jit(sums, out_shardings=NamedSharding(mesh, P()))(leaves))  # [devices, leaves]
    differences = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} on {', '.join(map(str, devices))}"
        for (path, leaf), column in zip(named, table.T, strict=True)
        if (devices := list(_differing_devices(leaf, column, mesh)))
    ]
    if differences:
        raise ReplicaError(
            f"{len(differences)} of {len(leaves)} parameters differ between devices that should hold the same values: "
            f"{'; '.join(differences[:3])}. A device or a link is faulty: take that machine out and resume from "
            f"the newest checkpoint before this step"
        )


def _differing_devices(leaf: jax.Array, sums: np.ndarray, mesh: jax.sharding.Mesh) -> Iterator[jax.Device]:
    """Devices whose checksum differs from the most common one among the devices that hold the same slice."""
    slices = leaf.sharding.devices_indices_map(leaf.shape)
    of_device = dict(zip(mesh.devices.flatten(), sums.tolist(), strict=True))
    groups: dict[str, list[jax.Device]] = {}
    for device, index in slices.items():
        groups.setdefault(str(index), []).append(device)
    for devices in groups.values():
        usual, _ = Counter(of_device[device] for device in devices).most_common(1)[0]
        yield from (device for device in devices if of_device[device] != usual)
