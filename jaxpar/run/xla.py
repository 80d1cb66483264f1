"""XLA and NCCL settings for GPU clusters, each with its reason and source.

This file must not import jax: the settings only take effect if they are in the environment before jax starts.

Sources: [jax] https://docs.jax.dev/en/latest/gpu_performance_tips.html, [xla] the flag's help in xla/xla.proto,
[nccl] https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html.
"""

import importlib.util
import mmap
import os
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxpar.config import ConfigError

MIB = 2**20
GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")  # the last one: WSL

# flag → (value, reason)
XLA_FLAGS: dict[str, tuple[str, str]] = {
    "xla_gpu_enable_latency_hiding_scheduler": (
        "true",
        "starts collectives early, so that compute hides them [jax]",
    ),
    # In bytes that each device receives. Combined tensors stay in memory until the last of them is ready: with 512 MiB,
    # Llama-3-8B on eight H100s takes 35.1 GB instead of 33.0 with ZeRO-2, and 19.9 instead of 19.6 with ZeRO-3.
    "xla_gpu_all_gather_combine_threshold_bytes": (
        str(128 * MIB),
        "one large transfer instead of many small ones [jax]",
    ),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": (str(32 * MIB), "the same for the gradient reduction [jax]"),
    "xla_gpu_all_reduce_combine_threshold_bytes": (str(128 * MIB), "the same for replicated parameters [jax]"),
    # The pipelined all-gather, reduce-scatter and all-reduce that [jax] recommends stay off. Parameters are gathered
    # and gradients reduced once a step, outside all loops. To pipeline the tensor group's own collectives, XLA (jaxlib
    # 0.10.2) runs each microbatch twice: Llama-3-8B compiled for 64 H100s with dp 8, SP 8 takes 1.21e15 FLOPs instead
    # of 6.1e14, and 15.3 GiB instead of 11.0.
    "xla_gpu_enable_pipelined_all_gather": ("false", "would run each microbatch twice, see jaxpar/run/xla.py"),
    "xla_gpu_enable_pipelined_reduce_scatter": ("false", "the same"),
    "xla_gpu_enable_pipelined_all_reduce": ("false", "the same"),
    # It can zero the result of a permute with several cycles, which a cp ring is when there are other mesh axes.
    "xla_gpu_enable_pipelined_p2p": ("false", "gives wrong numbers with several rings (openxla/xla issue 45222)"),
    # The config says what is computed again. XLA's estimate takes an update of a buffer in place for a second buffer.
    "xla_disable_hlo_passes": ("rematerialization", "would compute products again although the program fits"),
    "xla_gpu_enable_command_buffer": (
        "-collectives",
        "CUDA graphs for compute as by XLA's default, not for collectives: 30% slower (openxla/xla issue 35360)",
    ),
}
# NCCL chooses its protocol and buffers itself. [jax] recommends values from 2023, which could not be timed here.
ENVIRONMENT: dict[str, tuple[str, str]] = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": (
        "0.92",
        "leaves the rest to CUDA, NCCL and cuBLAS; jax's default of 0.75 wastes 20 GB",
    ),
    "NCCL_DEBUG": ("WARN", "reports which rank and network fail, and nothing else [nccl]"),
}
# Added for `cluster.deterministic`. Their cost has not been measured.
DETERMINISTIC_FLAG = (
    "xla_gpu_deterministic_ops",
    (
        "true",
        "cluster.deterministic: kernels without atomics, and no autotuning, whose choice varies between runs [xla]",
    ),
)
DETERMINISTIC_ENVIRONMENT = ("NCCL_ALGO", ("Ring", "cluster.deterministic: the same order of sums in every run [nccl]"))


def apply(
    overrides: Mapping[str, str | bool | int], deterministic: bool = False, *, only_compiles: bool = False
) -> list[str]:
    """Sets these values in the environment, except those that the user has set there.

    Args:
      overrides: `cluster.xla_flags` of the config, flag → value; they win over the table.
      deterministic: adds the settings that make sums on a GPU the same in every run.
      only_compiles: the CUDA plugin is needed although there is no GPU.

    Returns:
      A line for each setting with its reason or origin, for `--verbose`.

    Raises:
      ConfigError: the installed jaxlib does not know a flag; jaxlib itself would abort.
    """
    if not any(Path(device).exists() for device in GPU_DEVICES) and _cuda_plugins():
        # The plugin is installed for `jaxpar compile`. Without a GPU it would print a traceback.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if os.environ["JAX_PLATFORMS"] == "cpu" and not only_compiles and "jax" not in sys.modules:
            _leave_out_cuda_plugin()
    flags = XLA_FLAGS | dict([DETERMINISTIC_FLAG] if deterministic else [])
    environment = ENVIRONMENT | dict([DETERMINISTIC_ENVIRONMENT] if deterministic else [])
    values = {flag: value for flag, (value, _) in flags.items()}
    values |= {flag.removeprefix("--"): _text(value) for flag, value in overrides.items()}
    users = os.environ.get("XLA_FLAGS", "").split()
    given = {flag.removeprefix("--").partition("=")[0] for flag in users if flag.startswith("--")}
    if unknown := _unknown([*values, *given]):
        from_config = {flag.removeprefix("--") for flag in overrides}
        raise ConfigError(
            [
                f"{'cluster.xla_flags' if flag in from_config else 'XLA_FLAGS'}: the installed jaxlib has no flag "
                f"{flag}: remove it"
                for flag in unknown
            ]
        )
    os.environ["XLA_FLAGS"] = " ".join([f"--{f}={v}" for f, v in values.items() if f not in given] + users)
    for name, (value, _) in environment.items():
        os.environ.setdefault(name, value)
    lines = [
        f"{flag}={value}  {flags[flag][1] if value == flags.get(flag, ('',))[0] else 'cluster.xla_flags'}"
        for flag, value in values.items()
        if flag not in given
    ]
    lines += [f"{flag.removeprefix('--')}  XLA_FLAGS of the environment" for flag in users]
    return lines + [f"{name}={os.environ[name]}  {reason}" for name, (_, reason) in environment.items()]


def apply_without_gpu(overrides: Mapping[str, str | bool | int], deterministic: bool = False) -> list[str]:
    """`apply` for compiling only: there is no GPU on which kernels could be tried, so XLA must not tune them."""
    return apply({"xla_gpu_autotune_level": 0, **overrides}, deterministic, only_compiles=True)


def _cuda_plugins() -> list[str]:
    """Names of the modules with which jax starts CUDA, `xla_cuda12` or `xla_cuda13`."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else None
    return [path.name for folder in folders or () for path in Path(folder).glob("xla_cuda*")]


def _leave_out_cuda_plugin() -> None:
    """Lets jax find no CUDA plugin in this process. Each of its four libraries would print that it finds no driver, past all
    settings for logs; nothing else is silenced."""
    for name in _cuda_plugins():
        idle: Any = types.ModuleType(f"jax_plugins.{name}")
        idle.initialize = lambda: None
        sys.modules[idle.__name__] = idle
        sys.modules[f"jax_{name.removeprefix('xla_')}_plugin"] = None  # type: ignore[assignment]  # importing it fails


def _text(value: str | bool | int) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(flags: Iterable[str]) -> list[str]:
    """The flags that jaxlib does not know. It has no list of its flags, so this searches its binary for their names."""
    unknown = list(flags)
    for library in _libraries():
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            unknown = [flag for flag in unknown if text.find(flag.encode() + b"\0") < 0]
    return unknown


def _libraries() -> list[Path]:
    spec = importlib.util.find_spec("jaxlib")
    assert spec and spec.submodule_search_locations
    return sorted(Path(spec.submodule_search_locations[0]).glob("libjax_common*"))
