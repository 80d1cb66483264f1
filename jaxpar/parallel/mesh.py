"""The five-axis `jax.sharding.Mesh`.

The axes are `dp pp tp sp cp`, everywhere in this order. Megatron-LM's tensor group is the product of `tp` and `sp`:
(tp=T, sp=1) without sequence parallelism and (tp=1, sp=T) with it. Weights are split over both axes, so their shards
are the same in the two modes.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxpar.config import Config, ConfigError, MeshSizes

AXES = ("dp", "pp", "tp", "sp", "cp")
TENSOR_AXES = ("tp", "sp")
REPLICA_AXES = ("dp", "cp")  # every parameter is the same along these, and gradients are reduced over them


def device_grid(sizes: MeshSizes) -> np.ndarray:
    """The index of the device at each mesh coordinate, int [dp, pp, tp, sp, cp].

    Devices with neighbouring indices share a host, so they go to the axes that communicate most: first the tensor group,
    then cp, dp and pp. Megatron-Core's parallel_state.py has the same order, `tp-cp-ep-dp-pp`.
    """
    physical = np.arange(sizes.num_devices).reshape(sizes.pp, sizes.dp, sizes.cp, sizes.tp, sizes.sp)
    return physical.transpose(1, 0, 3, 4, 2)


def build_mesh(sizes: MeshSizes | Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the five-axis mesh.

    Args:
      sizes: the five sizes, or a config with the other four, from which dp follows.
      devices: in the order of their hosts; default: `jax.devices()`. TPUs are reordered to suit their torus.

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
    """A warning that names the hosts if a tensor group spans several; None if every group stays inside one."""
    groups = device_grid(sizes).transpose(0, 1, 4, 2, 3).reshape(-1, sizes.tensor) // devices_per_host
    spread = groups[groups.min(1) < groups.max(1)]
    if not len(spread):
        return None
    more = f" (and {len(spread) - 1} more groups do)" if len(spread) > 1 else ""
    return (
        f"tensor group of {sizes.tensor} devices crosses hosts {np.unique(spread[0]).tolist()}{more}: "
        f"its collectives then leave NVLink. A host has {devices_per_host} devices: "
        f"choose an actor.model.tensor_model_parallel_size that divides it"
    )
