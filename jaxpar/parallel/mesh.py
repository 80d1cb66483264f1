"""Five sizes → one `jax.sharding.Mesh`.

Axis names, everywhere in this order: `dp pp tp sp cp`. The tensor group of Megatron-LM is the product of `tp` and
`sp`: without sequence parallelism it is (tp=T, sp=1), with it (tp=1, sp=T), and weights are split over both, so the
weight shards are the same in the two modes.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxpar.config import Config, ConfigError, MeshSizes

AXES = ("dp", "pp", "tp", "sp", "cp")
TENSOR_AXES = ("tp", "sp")
REPLICA_AXES = ("dp", "cp")  # every parameter is the same on these: gradients are reduced over them


def device_grid(sizes: MeshSizes) -> np.ndarray:
    """Index of the device at each mesh coordinate, int array [dp, pp, tp, sp, cp].

    Neighbouring indices, which share a host, go to the chattiest group first: tensor group, cp, dp, pp. That is the
    order `tp-cp-ep-dp-pp` of Megatron-Core's parallel_state.py.
    """
    physical = np.arange(sizes.num_devices).reshape(sizes.pp, sizes.dp, sizes.cp, sizes.tp, sizes.sp)
    return physical.transpose(1, 0, 3, 4, 2)


def build_mesh(sizes: MeshSizes | Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The five-axis mesh over `devices` (default: all of `jax.devices()`).

    Args:
      sizes: the five sizes, or a config that holds them (then dp follows from the number of devices).
      devices: in order of hosts. On TPU they are first put into the order that its torus likes best.

    Raises:
      ConfigError: the product of the sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if isinstance(sizes, Config):
        sizes = sizes.mesh_sizes(len(devices))
    if sizes.num_devices != len(devices):
        product = " x ".join(f"{axis} {size}" for axis, size in sizes.as_dict().items())
        raise ConfigError(f"mesh {product} = {sizes.num_devices} devices, but there are {len(devices)}")
    if devices[0].platform == "tpu":
        flat = mesh_utils.create_device_mesh((sizes.num_devices,), devices)
    else:
        flat = np.asarray(devices)
    return Mesh(flat[device_grid(sizes)], AXES, axis_types=(AxisType.Auto,) * len(AXES))


def cross_host_warning(sizes: MeshSizes, devices_per_host: int) -> str | None:
    """A warning where a tensor group spans hosts, naming them; None where each group stays inside one."""
    groups = device_grid(sizes).transpose(0, 1, 4, 2, 3).reshape(-1, sizes.tensor) // devices_per_host
    torn = [sorted(set(group.tolist())) for group in groups if len(set(group.tolist())) > 1]
    if not torn:
        return None
    return (
        f"tensor group of {sizes.tensor} devices crosses hosts {torn[0]} (and {len(torn) - 1} more groups do): "
        f"its collectives then leave NVLink. A host has {devices_per_host} devices: "
        f"choose an actor.model.tensor_model_parallel_size that divides it"
    )
