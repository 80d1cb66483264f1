"""Compiles the real train step for a cluster that is not there, and reads from the program what it needs.

XLA's GPU compiler needs a description of the GPUs, not the GPUs themselves. With the CUDA plugin installed beside jax, and
no driver, `jax.experimental.topologies` gives devices to compile for.
"""

import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from jaxpar.blueprint import UserModel
from jaxpar.config import Config, ConfigError
from jaxpar.hardware import GPUS, TPU_MEMORY, Gpu
from jaxpar.measure.baseline import BaselineProgram
from jaxpar.measure.hlo import Collective, count
from jaxpar.measure.hlo.groups import MeshAxes
from jaxpar.measure.roofline import Roofline, roofline
from jaxpar.parallel.mesh import AXES, device_grid
from jaxpar.pipeline.tick_scope import taken_fraction
from jaxpar.program import Program

FIT_ADVICE = (
    "try: actor.model.recompute_granularity=full recompute_method=uniform recompute_num_layers=1 recompute_modules=null, "
    "a larger pipeline_model_parallel_size, tensor_model_parallel_size with sequence_parallel, or context_parallel_size, "
    "or a smaller actor.micro_batch_size"
)
MEMORY_FRACTION = 0.92  # the share of a GPU that XLA may take; the rest is for CUDA, NCCL and cuBLAS


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. `peak`: the most in use at any time. `fits`: peak is at most MEMORY_FRACTION of `capacity`."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    capacity: int
    fits: bool


@dataclass(frozen=True)
class Report:
    """What one step of a config needs on a cluster. FLOPs and bytes are those of one device.

    Attributes:
      flops: executed in matrix products and kernels, including recompute and bubbles.
      model_flops: useful FLOPs, see `jaxpar.models.flops`; None for a user's own model.
      hlo: text of the optimized program.
      uncounted: what the counter could not count, and why.
      host_bytes: pinned memory of the host, for each device.
      roofline: the least time of the step; None if the devices are no GPUs of `jaxpar.hardware`.
      attention: what computes the blocks of attention → why, see `jaxpar.attention.choose`.
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
    host_bytes: int = 0
    roofline: Roofline | None = None
    attention: Mapping[str, str] = field(default_factory=dict)

    @property
    def advice(self) -> str:
        """What to change if it does not fit."""
        return FIT_ADVICE

    def to_json(self) -> dict[str, Any]:
        keys = ["devices", "mesh", "compile_seconds", "bubble_fraction", "flops", "model_flops"]
        return {
            **{key: getattr(self, key) for key in keys},
            "memory": asdict(self.memory),
            "collectives": [
                {"kind": c.kind, "axes": list(c.axes), "count": c.count, "bytes": c.bytes} for c in self.collectives
            ],
            "roofline": self.roofline.to_json() if self.roofline else None,
            "attention": dict(self.attention),
        }


def gpu_devices(gpu: str, nodes: int, gpus_per_node: int) -> list[jax.Device]:
    """The devices of a cluster of GPUs, for compiling only.

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


def tpu_devices(name: str) -> tuple[list[jax.Device], int]:
    """The devices of a TPU slice, such as "v5e:4x4", for compiling only, and the bytes of memory of each.

    Raises:
      ConfigError: libtpu is not installed, or there is no such slice.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name, re.ASCII)
    if not found or found[1] not in TPU_MEMORY:
        raise ConfigError(
            f"--tpu: {name!r} is not KIND:CHIPS, such as v5e:4x4; kinds: {', '.join(TPU_MEMORY)}, chips: 2x4, or 2x2x4 for "
            f"a kind with a torus of three dimensions"
        )
    # There is no TPU here, so libtpu must not ask the cloud for its metadata.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu raises whatever it likes
        raise ConfigError(
            f"--tpu {name}: needs libtpu (pip install -e '.[tpu]'), and a slice that it knows: {str(error).splitlines()[0]}"
        ) from None
    # For some kinds, libtpu makes each half of a chip a device of its own.
    chips = math.prod(int(size) for size in found[2].split("x"))
    return devices, TPU_MEMORY[found[1]] * chips // len(devices)


def devices_to_compile_for(config: Config, gpu: str, tpu: str | None) -> tuple[list[jax.Device], int, Gpu | None]:
    """(devices, bytes of memory of each, what GPU they are) of the config's cluster of GPUs, or of a TPU slice."""
    if tpu:
        return *tpu_devices(tpu), None
    cluster = config.cluster
    return gpu_devices(gpu, cluster.num_nodes, cluster.num_gpus_per_node or 8), GPUS[gpu].memory, GPUS[gpu]


def compile_step(
    config: Config,
    devices: list[jax.Device],
    capacity: int,
    gpu: Gpu | None = None,
    model: UserModel | None = None,
) -> Report:
    """Compiles one train step for `devices`.

    Args:
      capacity: bytes of memory of one device.
      gpu: what the devices are, for the roofline.
      model: the user's own, as in `jaxpar.blueprint.Blueprint`.

    Raises:
      ConfigError: the config does not suit these devices, or XLA refuses the program because it needs too much memory.
    """
    program = Program(config, devices, model)
    return read_report(program, *compile_train_step(program), capacity, gpu)


def compile_train_step(program: Program | BaselineProgram) -> tuple[jax.stages.Compiled, float]:
    """Compiles the train step of a program for its devices; also returns the seconds that tracing and compiling took."""
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        program.state_shapes,
        program.state_shardings,
    )
    start = time.perf_counter()
    try:
        compiled = program.train_step.lower(state, program.batch_layout.shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        if problem := too_large(str(error)):
            raise ConfigError(problem) from None
        raise
    return compiled, time.perf_counter() - start


def too_large(message: str) -> str | None:
    """What to tell the user if XLA refuses a program for its memory, as it does for TPUs; None for other errors."""
    found = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", message)
    if not found:
        return None
    gib = {"K": 2**-20, "M": 2**-10, "G": 1.0}
    needed, available = float(found[1]) * gib[found[2]], float(found[3]) * gib[found[4]]
    return f"does not fit: needs {needed:.1f} of {available:.1f} GiB a device; {FIT_ADVICE}"


def read_report(
    program: Program, compiled: jax.stages.Compiled, seconds: float, capacity: int, gpu: Gpu | None = None
) -> Report:
    """What a compiled train step needs. Arguments as in `compile_step`, and as `compile_train_step` returns them."""
    text, devices = compiled.as_text() or "", program.mesh.size
    # Programs name devices by their index in the mesh, not by their ids.
    grid = np.arange(program.mesh.size).reshape(tuple(program.mesh.shape.values()))
    counted = count(text, grid, AXES, taken=taken_fraction)
    per_token = program.blueprint.flops_per_token
    model_flops = None if per_token is None else per_token * math.prod(program.batch_layout.shape) / devices
    analysis: Any = compiled.memory_analysis()
    return Report(
        devices=devices,
        mesh=dict(program.mesh.shape),
        compile_seconds=seconds,
        bubble_fraction=program.blueprint.schedule.bubble_fraction(),
        flops=counted.flops,
        model_flops=model_flops,
        memory=read_memory(compiled, capacity),
        collectives=counted.collectives,
        hlo=text,
        uncounted=counted.uncounted,
        host_bytes=analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes,
        roofline=_read_roofline(program, text, gpu, model_flops) if gpu else None,
        attention=program.attention_choices,
    )


def _read_roofline(program: Program, text: str, gpu: Gpu, model_flops: float | None) -> Roofline:
    blueprint = program.blueprint
    places = device_grid(blueprint.sizes).reshape(-1).tolist()
    per_node = blueprint.num_devices // blueprint.config.cluster.num_nodes
    mesh = MeshAxes(tuple(program.mesh.shape.values()), AXES)
    return roofline(text, gpu, places, per_node, mesh=mesh, model_flops=model_flops, taken=taken_fraction)


def read_memory(compiled: jax.stages.Compiled, capacity: int) -> Memory:
    analysis: Any = compiled.memory_analysis()
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    aliased, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    together = arguments + outputs - aliased + temporaries
    peak = getattr(analysis, "peak_memory_in_bytes", 0)
    if peak < temporaries:  # XLA for CPU does not know the peak, and gives one that is too small
        peak = together
    peak -= analysis.host_argument_size_in_bytes  # XLA includes them
    return Memory(arguments, outputs, aliased, temporaries, peak, capacity, peak <= MEMORY_FRACTION * capacity)
