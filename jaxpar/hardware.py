"""GPUs and TPUs for which a program can be compiled on a machine that does not have them.

The numbers are those of the SXM boards, from NVIDIA's data sheets and architecture white papers. The fields are those of
XLA's GpuTargetConfigProto (xla/stream_executor/device_description.proto and xla/tools/hlo_opt).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU, as XLA's compiler describes it.

    Attributes:
      description: NVIDIA's name of the device, which is also jax's `device_kind`.
      shared_memory_per_core, memory, l2_cache: bytes.
      memory_bandwidth: bytes/s.
      peak_flops: dense bf16 FLOP/s.
      nvlink_bandwidth: bytes/s in one direction (NVIDIA's data sheets give the sum of both).
      network_bandwidth: bytes/s in one direction for each GPU, of the network adapters of NVIDIA's own DGX nodes.
    """

    description: str
    compute_capability: tuple[int, int]
    core_count: int
    fpus_per_core: int
    shared_memory_per_core: int
    memory: int
    memory_bandwidth: float
    l2_cache: int
    clock_ghz: float
    peak_flops: float
    nvlink_bandwidth: float
    network_bandwidth: float

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s of products of a dtype in XLA's spelling: TF32, which XLA takes for float32, has half of the bf16
        peak, and an 8-bit float twice of it (from Hopper on)."""
        if dtype in ("f32", "f64"):
            return self.peak_flops / 2
        return self.peak_flops * (2 if dtype.startswith("f8") and self.compute_capability >= (8, 9) else 1)

    def target_config(self) -> str:
        """The GpuTargetConfigProto in text form."""
        major, minor = self.compute_capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {self.shared_memory_per_core}
  shared_memory_per_block_optin: {self.shared_memory_per_core - 1024}
  core_count: {self.core_count}  fpus_per_core: {self.fpus_per_core}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.memory_bandwidth)}  l2_cache_size: {self.l2_cache}  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
runtime_version {{ major: 12 minor: 9 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{self.description}"
"""


# Memory of one chip in bytes, by libtpu's name of the kind, from the kind's page at https://cloud.google.com/tpu/docs.
TPU_MEMORY = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30, "tpu7x": 192 * 2**30}

_MIB = 2**20
GPUS = {
    "a100-40g": Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 167936, 40536 * _MIB, 1.555e12, 40 * _MIB, 1.41, 312e12, 300e9, 25e9
    ),
    "a100-80g": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 81251 * _MIB, 2.039e12, 40 * _MIB, 1.41, 312e12, 300e9, 25e9
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        132,
        128,
        233472,
        80995 * _MIB,
        3.352e12,
        50 * _MIB,
        1.98,
        989.4e12,
        450e9,
        50e9,
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 233472, 143167 * _MIB, 4.8e12, 60 * _MIB, 1.98, 989.4e12, 450e9, 50e9),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), 148, 128, 233472, 182642 * _MIB, 8.0e12, 126 * _MIB, 1.965, 2250e12, 900e9, 50e9
    ),
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, by jax's `device_kind`; None for a kind that is not listed here."""
    return next((gpu.peak_flops for gpu in GPUS.values() if gpu.description == device_kind), None)
