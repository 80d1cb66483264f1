"""Reads and writes the decoder's adapters in a folder of PEFT's format: adapter_config.json and adapter_model.safetensors.

Source: `PeftModel.save_pretrained` of https://github.com/huggingface/peft (its tensors' names, and A as [rank, inputs], B as
[outputs, rank]).
"""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxpar.config import Architecture, ConfigError
from jaxpar.config.lora import ADAPTER_CONFIG, TARGETS, Lora
from jaxpar.models.hugging_face import NAMES, Parameter, find_problems, on_every_device, open_tensors
from jaxpar.models.lora import ADAPTERS
from jaxpar.models.protocol import Params
from jaxpar.models.weights import fill_params, named_params

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_adapters(path: str | Path, architecture: Architecture, shapes: Params, shardings: Params) -> Params:
    """Reads the adapters. Each device reads only its own slice of each tensor.

    Args:
      shapes: the decoder's, with None at everything that is no adapter.
      shardings: the same tree with a `jax.sharding.Sharding` at each leaf.

    Raises:
      ConfigError: a file cannot be read, or tensors are missing, unexpected, or of the wrong shape or dtype.
    """
    parameters, where = _parameters(shapes), f"actor.model.lora_path: {path}"
    if not (Path(path).expanduser() / ADAPTER_WEIGHTS).exists():
        raise ConfigError(f"{where}: has no {ADAPTER_WEIGHTS}: give a folder that PEFT's save_pretrained has written")
    stored = open_tensors(Path(path).expanduser(), where, ADAPTER_WEIGHTS)
    find_problems(stored, parameters, architecture, where).check()
    by_name = {parameter.name: parameter for parameter in parameters}
    return fill_params(shapes, shardings, lambda name, layer, index: by_name[name].read(stored, layer, index))


def save_adapters(
    path: str | Path, params: Params, architecture: Architecture, lora: Lora, base: str | None = None
) -> None:
    """Writes the adapters, for PEFT's `PeftModel.from_pretrained`, float32. All processes must call it; the first one writes.

    Args:
      path: a folder; it is created if needed.
      params: the decoder's parameters as global arrays, in any sharding; only the adapters are read.
      base: name or folder of the model that the adapters belong to.
    """
    writes, folder, contents = jax.process_index() == 0, Path(path).expanduser(), dict[str, np.ndarray]()
    adapters = {name: x for name, x in named_params(params).items() if name in _NAMES}
    for parameter in _parameters(adapters):
        for layer in parameter.layers:
            whole = on_every_device(parameter.value, layer, "float32")
            if writes:
                contents[parameter.pattern.format(layer)] = parameter.to_stored(np.asarray(whole), architecture)
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(contents, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))


def _names() -> dict[str, tuple[str, str, str]]:
    """The rows of `NAMES` for the adapters. Letter r: rank."""
    found = {}
    for name, (stored, dims, stored_dims) in NAMES.items():
        folder, _, matrix = name.rpartition("/")
        if matrix not in TARGETS.values():
            continue
        outputs, inputs = stored_dims.split()
        stored, path = f"base_model.model.{stored.removesuffix('.weight')}", f"{folder}/{ADAPTERS}/{matrix}"
        found[f"{path}/a"] = (f"{stored}.lora_A.weight", f"{inputs}r", f"r {inputs}")
        found[f"{path}/b"] = (f"{stored}.lora_B.weight", f"r{outputs}", f"{outputs} r")
        assert dims in (inputs + outputs, outputs + inputs)
    return found


_NAMES = _names()


def _parameters(tree: Params) -> list[Parameter]:
    return [Parameter(name, x, *_NAMES[name][:2], _NAMES[name][2].split()) for name, x in named_params(tree).items()]
