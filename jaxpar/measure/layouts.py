"""Layouts on the command line, such as `pp4,dp2,schedule=1f1b,microbatches=8`, for commands that compare layouts."""

import math
import re
from collections.abc import Sequence

from jaxpar.config import Config, ConfigError

_OVERRIDE = re.compile(r"[\w-]+(\.[\w-]+)+=.*", re.DOTALL)
_PART = re.compile(
    r"(dp|pp|tp|sp|cp)=?([1-9]\d*)|(schedule)=(\w+)|(microbatches|chunks)=([1-9]\d*)|(zero)=([0-3])", re.ASCII
)
_EXAMPLE = "pp4,dp2,schedule=1f1b,microbatches=8"


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments after CONFIG on a command line into (settings `key.path=value`, layouts)."""
    overrides = [text for text in arguments if _OVERRIDE.fullmatch(text)]
    return overrides, [text for text in arguments if text not in overrides]


def layout_overrides(text: str, config: Config, num_devices: int) -> list[str]:
    """The settings `key.path=value` that give `config` this layout on `num_devices` devices.

    Args:
      text: parts joined by commas, in any order: the sizes of the mesh's axes (`dp8`, `pp4`, `tp2`, `cp2`; `sp2` is a
        tensor group of 2 with sequence parallelism), `schedule=`, `chunks=` (virtual stages), `microbatches=` and
        `zero=` (the ZeRO stage). A size that is not given is 1, but dp takes the devices that the other axes leave.
        Everything else that is not given stays as in the config.

    Raises:
      ConfigError: the text is not a layout, or it does not fit the devices or the batch.
    """
    parts = _parts(text)
    sizes = {axis: int(parts.get(axis, 1)) for axis in ("dp", "pp", "tp", "sp", "cp")}
    if sizes["tp"] > 1 and sizes["sp"] > 1:
        raise ConfigError(
            f"layout {text!r}: tp and sp are one tensor group, without and with sequence parallelism: give only one of them"
        )
    if "dp" not in parts:
        sizes["dp"] = max(1, num_devices // math.prod(sizes.values()))
    if math.prod(sizes.values()) != num_devices:
        product = " * ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"
        raise ConfigError(
            f"layout {text!r}: {product} = {math.prod(sizes.values())} devices, but there are {num_devices}: change the "
            f"sizes, or cluster.num_nodes and cluster.num_gpus_per_node"
        )
    overrides = {
        "tensor_model_parallel_size": sizes["tp"] * sizes["sp"],
        "sequence_parallel": sizes["sp"] > 1,
        "pipeline_model_parallel_size": sizes["pp"],
        "context_parallel_size": sizes["cp"],
        "virtual_pipeline_model_parallel_size": parts.get("chunks", "null"),
    }
    if "schedule" in parts:
        overrides["pipeline_schedule"] = parts["schedule"]
    lines = [f"actor.model.{key}={value}" for key, value in overrides.items()]
    if "zero" in parts:
        lines.append(f"actor.optim.zero_stage={parts['zero']}")
    if "microbatches" in parts:
        lines.append(f"actor.micro_batch_size={_micro_batch(text, config, sizes['dp'], int(parts['microbatches']))}")
    return lines


def _parts(text: str) -> dict[str, str]:
    """Name of each part → its value, such as {"pp": "4", "schedule": "1f1b"}."""
    parts: dict[str, str] = {}
    for word in text.split(","):
        found = _PART.fullmatch(word)
        if not found:
            raise ConfigError(
                f"layout {text!r}: {word!r} is not a part of a layout, as in {_EXAMPLE}, and not key.path=value"
            )
        name, value = (group for group in found.groups() if group is not None)
        if name in parts:
            raise ConfigError(f"layout {text!r}: {name} is given twice: remove one")
        parts[name] = value
    return parts


def one_device(config: Config) -> list[str]:
    """The settings `key.path=value` that put all of `config` on one device."""
    return [*layout_overrides("dp1", config, 1), "cluster.num_nodes=1", "cluster.num_gpus_per_node=1"]


def _micro_batch(text: str, config: Config, dp: int, microbatches: int) -> int:
    total = config.actor.global_batch_size
    if total % (dp * microbatches):
        raise ConfigError(
            f"layout {text!r}: actor.global_batch_size {total} is not a multiple of dp {dp} * {microbatches} microbatches "
            f"= {dp * microbatches} ({total} / {dp * microbatches} = {total / (dp * microbatches):.2f}): choose a number "
            f"of microbatches that divides {total / dp:g}"
        )
    return total // (dp * microbatches)
