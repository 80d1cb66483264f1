"""Compiling the real train step for a cluster that is not there.

XLA's GPU compiler needs a description of the GPUs, not the GPUs: with the CUDA plugin installed beside jax, and no driver,
`jax.experimental.topologies` gives devices that can be compiled for. What a layout needs is then read from the program.
"""

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from jaxpar.batch import DTYPES
from jaxpar.config import Config, ConfigError
from jaxpar.hlo import Collective, count
from jaxpar.mesh import AXES
from jaxpar.metrics import model_flops_per_token
from jaxpar.program import Program
from jaxpar.targets import GPUS

MEMORY_FRACTION = 0.92  # of a GPU that XLA may take; the rest is for CUDA, NCCL and cuBLAS


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. `peak`: the most in use at a time; `fits`: it is below MEMORY_FRACTION of `capacity`."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    capacity: int
    fits: bool


@dataclass(frozen=True)
class Report:
    """What one step of a config needs on a cluster; FLOPs and bytes are one device's.

    Attributes:
      flops: executed in matrix products and kernels, recompute and bubbles included.
      model_flops: useful ones, by `jaxpar.metrics.model_flops_per_token`; None for a user's own model.
      hlo: text of the optimized program.
      uncounted: what the counter could not count, and why.
    """

    devices: int
    mesh: dict[str, int]
    compile_seconds: float
    bubble_fraction: float
    flops: float
    model_flops: float | None
    memory: Memory
    collectives: list[Collective]
    hlo: str
    uncounted: list[str]

    def to_json(self) -> dict[str, Any]:
        keys = ["devices", "mesh", "compile_seconds", "bubble_fraction", "flops", "model_flops"]
        return {
            **{key: getattr(self, key) for key in keys},
            "memory": asdict(self.memory),
            "collectives": [
                {"kind": c.kind, "axes": list(c.axes), "count": c.count, "bytes": c.bytes} for c in self.collectives
            ],
        }


def gpu_devices(gpu: str, nodes: int, gpus_per_node: int) -> list[jax.Device]:
    """Compile-only devices of a cluster.

    Raises:
      ConfigError: the CUDA plugin is not installed.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=GPUS[gpu].target_config(), topology=f"1x{nodes}x{gpus_per_node}"
        )
    except RuntimeError as error:
        raise ConfigError(
            f"--gpu {gpu}: jax's CUDA plugin is needed (no GPU, no driver): pip install -e '.[compile]' ({error})"
        ) from None
    return list(topology.devices)


def tpu_devices(name: str) -> list[jax.Device]:
    """Compile-only devices of a TPU slice, such as "v5e:4x4".

    Raises:
      ConfigError: libtpu is not installed, or knows no such slice.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu raises whatever it likes
        raise ConfigError(
            f"--tpu {name}: needs libtpu (pip install libtpu), and a slice that it knows: {error}"
        ) from None


def compile_step(config: Config, devices: list[jax.Device], capacity: int) -> Report:
    """Compiles one train step for `devices`.

    Args:
      capacity: bytes of memory of one device.

    Raises:
      ConfigError: the config does not suit these devices.
    """
    program = Program(config, devices)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        program.state_shapes,
        program.state_shardings,
    )
    place = program.batch
    batch = {key: jax.ShapeDtypeStruct(place.shape, dtype, sharding=place.sharding) for key, dtype in DTYPES.items()}
    start = time.perf_counter()
    compiled = program.train_step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    text = compiled.as_text() or ""
    # Programs name devices by their place in the mesh, not by their ids.
    counted = count(text, np.arange(program.mesh.size).reshape(tuple(program.mesh.shape.values())), AXES)
    model_flops = None
    if program.architecture:
        tokens = place.shape[0] * place.shape[1]
        per_token = model_flops_per_token(program.architecture, program.num_params, config.row_length)
        model_flops = per_token * tokens / len(devices)
    return Report(
        devices=len(devices),
        mesh=dict(program.mesh.shape),
        compile_seconds=seconds,
        bubble_fraction=program.schedule.bubble_fraction(),
        flops=counted.flops,
        model_flops=model_flops,
        memory=_memory(compiled.memory_analysis(), capacity),
        collectives=counted.collectives,
        hlo=text,
        uncounted=counted.uncounted,
    )


def _memory(analysis: Any, capacity: int) -> Memory:
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    aliased, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    peak = getattr(analysis, "peak_memory_in_bytes", 0) or arguments + outputs - aliased + temporaries
    return Memory(arguments, outputs, aliased, temporaries, peak, capacity, peak <= MEMORY_FRACTION * capacity)
