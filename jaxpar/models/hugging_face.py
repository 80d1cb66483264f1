"""Loads and saves the weights of the built-in decoder in a Hugging Face folder.

Sources: the tensor names in transformers' `modeling_llama.py`, which Mistral, Qwen2 and Qwen3 share; the file format in
https://huggingface.co/docs/safetensors.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxpar.config import Architecture, ConfigError
from jaxpar.config.errors import read_json
from jaxpar.models.lora import ADAPTERS
from jaxpar.models.protocol import Params
from jaxpar.models.weights import Problems, fill_params, named_params

# jaxpar's parameter → (Hugging Face's name, jaxpar's dimensions, Hugging Face's dimensions). Letters: e embed, h heads or
# kv heads, d head_dim, m mlp, v vocab. A word is one dimension: "hd e" has two, and the first merges heads and head_dim.
NAMES = {
    "embed/table": ("model.embed_tokens.weight", "ve", "v e"),
    "layers/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", "e", "e"),
    "layers/attention/query": ("model.layers.{}.self_attn.q_proj.weight", "ehd", "hd e"),
    "layers/attention/key": ("model.layers.{}.self_attn.k_proj.weight", "ehd", "hd e"),
    "layers/attention/value": ("model.layers.{}.self_attn.v_proj.weight", "ehd", "hd e"),
    "layers/attention/query_bias": ("model.layers.{}.self_attn.q_proj.bias", "hd", "hd"),
    "layers/attention/key_bias": ("model.layers.{}.self_attn.k_proj.bias", "hd", "hd"),
    "layers/attention/value_bias": ("model.layers.{}.self_attn.v_proj.bias", "hd", "hd"),
    "layers/attention/query_norm/scale": ("model.layers.{}.self_attn.q_norm.weight", "d", "d"),
    "layers/attention/key_norm/scale": ("model.layers.{}.self_attn.k_norm.weight", "d", "d"),
    "layers/attention/output": ("model.layers.{}.self_attn.o_proj.weight", "hde", "e hd"),
    "layers/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", "e", "e"),
    "layers/mlp/gate": ("model.layers.{}.mlp.gate_proj.weight", "em", "m e"),
    "layers/mlp/up": ("model.layers.{}.mlp.up_proj.weight", "em", "m e"),
    "layers/mlp/down": ("model.layers.{}.mlp.down_proj.weight", "me", "e m"),
    "head/norm/scale": ("model.norm.weight", "e", "e"),
    "head/weight": ("lm_head.weight", "ev", "v e"),
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
MAX_FILE_BYTES = 5 * 10**9


def has_weights(path: str | Path) -> bool:
    """Whether the folder has weights, including those in formats that `load_params` does not support."""
    return any((Path(path).expanduser() / name).exists() for name in (WEIGHTS, INDEX, *TORCH_WEIGHTS))


def load_params(path: str | Path, architecture: Architecture, shapes: Params, shardings: Params) -> Params:
    """Reads the decoder's parameters. Each device reads only its own slice of each tensor.

    Args:
      path: folder with `model.safetensors`, or `model.safetensors.index.json` and the files that it names. Tensors may be
        float64, float32, float16 or bfloat16.
      shapes: the decoder's `FunctionalModel.shapes`; layers are stacked, [num_layers, ...].
      shardings: the same tree with a `jax.sharding.Sharding` at each leaf.

    Returns:
      arrays of these shapes, dtypes and shardings. Rows that pad the vocabulary are zeros.

    Raises:
      ConfigError: the folder has no safetensors, a file cannot be read, or tensors are missing, unexpected, or of
        the wrong shape or dtype. All problems are reported at once, with one line for the same problem in several layers.
    """
    parameters, where = _parameters(shapes), f"actor.model.model_path: {path}"
    stored = open_tensors(Path(path).expanduser(), where)
    find_problems(stored, parameters, architecture, where).check()
    by_name = {parameter.name: parameter for parameter in parameters}
    return fill_params(shapes, shardings, lambda name, layer, index: by_name[name].read(stored, layer, index))


def save_params(path: str | Path, params: Params, architecture: Architecture, dtype: str = "bfloat16") -> None:
    """Writes config.json and safetensors files of at most 5 GB each, for transformers' `from_pretrained`.

    All processes must call it; the first one writes. Each device holds one whole tensor at a time, and the first process
    holds the tensors of one file in memory. The tokenizer and the vocabulary's padding are not written.

    Args:
      path: a folder; it is created if needed, and weights in it are replaced.
      params: the decoder's parameters as global arrays, in any sharding.
      dtype: "bfloat16", "float16", or "float32", which keeps every bit.

    Raises:
      ConfigError: no Hugging Face family has this architecture.
    """
    config = _config_json(architecture, dtype)
    folder, weight_map = Path(path).expanduser(), dict[str, str]()
    writes, buckets = jax.process_index() == 0, _buckets(params, architecture, dtype, MAX_FILE_BYTES)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, INDEX):  # otherwise readers could find the old ones
            (folder / name).unlink(missing_ok=True)
    for number, bucket in enumerate(buckets, 1):
        file = WEIGHTS if len(buckets) == 1 else f"model-{number:05}-of-{len(buckets):05}.safetensors"
        contents = dict[str, np.ndarray]()
        for parameter, layer in bucket:
            whole = on_every_device(parameter.value, layer, dtype)
            if writes:
                contents[parameter.pattern.format(layer)] = parameter.to_stored(np.asarray(whole), architecture)
        if writes:
            save_file(contents, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(contents, file)
    if writes:
        if len(buckets) > 1:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def export_params(
    params: Params, architecture: Architecture, dtype: str, bucket_bytes: int
) -> Iterator[dict[str, jax.Array]]:
    """The tensors that `save_params` writes, whole on every device, in buckets of at most `bucket_bytes`; a larger tensor has a
    bucket of its own. All processes must take all buckets."""
    for bucket in _buckets(params, architecture, dtype, bucket_bytes):
        yield {
            parameter.pattern.format(layer): parameter.to_stored(
                on_every_device(parameter.value, layer, dtype), architecture
            )
            for parameter, layer in bucket
        }


def _buckets(
    params: Params, architecture: Architecture, dtype: str, max_bytes: int
) -> list[list[tuple["Parameter", int | None]]]:
    """The tensors, (parameter, layer), in buckets of at most `max_bytes` where tensors are not larger."""
    buckets, room = list[list[tuple[Parameter, int | None]]](), 0
    for parameter in _parameters(params):
        num_bytes = math.prod(parameter.stored_shape(architecture)) * jnp.dtype(dtype).itemsize
        for layer in parameter.layers:
            if not buckets or num_bytes > room:
                buckets, room = [*buckets, []], max_bytes
            buckets[-1].append((parameter, layer))
            room -= num_bytes
    return buckets


@dataclass(frozen=True)
class Parameter:
    """One row of `NAMES` or of a table like it, with the array or shape of the parameter."""

    name: str
    value: Any
    pattern: str
    dims: str
    stored_dims: list[str]

    @property
    def layers(self) -> list[int] | list[None]:
        return list(range(self.value.shape[0])) if "{}" in self.pattern else [None]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.dims, self.value.shape[-len(self.dims) :], strict=True))

    def stored_shape(self, architecture: Architecture) -> list[int]:
        sizes = self.sizes | {"v": architecture.vocab_size}  # without the padding
        return [math.prod(sizes[letter] for letter in word) for word in self.stored_dims]

    def to_stored(self, value: Any, architecture: Architecture) -> Any:
        value = value.transpose([self.dims.index(letter) for letter in "".join(self.stored_dims)])
        value = value.reshape([math.prod(self.sizes[letter] for letter in word) for word in self.stored_dims])
        value = value[tuple(map(slice, self.stored_shape(architecture)))]
        # safetensors writes numpy's memory as it lies, whatever the strides.
        return np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value

    def read(self, tensors: Mapping[str, Any], layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        """A part of the parameter in float32, given its slice of each dimension; of one layer if it has layers."""
        tensor = tensors[self.pattern.format(layer)]
        sizes, letters = self.sizes, "".join(self.stored_dims)
        bounds = {letter: part.indices(sizes[letter])[:2] for letter, part in zip(self.dims, index, strict=True)}
        wanted, shape, cut = list[tuple[int, int]](), list[int](), list[slice]()
        for word in self.stored_dims:  # in a merged dimension, all parts but the first are read whole, then cut
            (start, stop), rest = bounds[word[0]], [sizes[letter] for letter in word[1:]]
            wanted.append((start * math.prod(rest), stop * math.prod(rest)))
            shape += [stop - start, *rest]
            cut += [slice(None), *(slice(*bounds[letter]) for letter in word[1:])]
        block = np.zeros([stop - start for start, stop in wanted], np.float32)
        stored = [(start, min(stop, size)) for (start, stop), size in zip(wanted, tensor.get_shape(), strict=True)]
        if all(start < stop for start, stop in stored):  # otherwise the block is only padding of the vocabulary
            part = tensor[tuple(slice(*bound) for bound in stored)]
            block[tuple(map(slice, part.shape))] = part
        return block.reshape(shape)[tuple(cut)].transpose([letters.index(letter) for letter in self.dims])


def _parameters(tree: Params) -> list[Parameter]:
    named = named_params(tree)
    if any(f"/{ADAPTERS}/" in name for name in named):
        raise ConfigError(
            "save_params: the parameters have adapters: give trainer.merged_params(), or use save_adapters"
        )
    if unknown := [name for name in named if name not in NAMES]:
        raise ConfigError(
            f"actor.model.model_path: only supported for the built-in decoder, which has no {', '.join(unknown)}"
        )
    return [Parameter(name, x, *NAMES[name][:2], NAMES[name][2].split()) for name, x in named.items()]


def open_tensors(folder: Path, where: str, name: str = WEIGHTS) -> dict[str, Any]:
    """A view of each tensor, by name. Reads only the headers of the files."""
    file, stored = folder / name, dict[str, Any]()
    try:
        files = [file]
        if not file.exists():
            file = folder / INDEX
            files = _files_of_index(file, where)
        for file in files:
            tensors = safe_open(file, framework="np")
            stored |= {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - it is not a mapping
    except (OSError, ValueError, SafetensorError) as error:
        problem = f"{file} cannot be read: {type(error).__name__}: {error}"
        if file.name == INDEX and not file.exists():
            torch = [name for name in TORCH_WEIGHTS if (folder / name).exists()]
            advice = f": convert {torch[0]} with transformers' from_pretrained and save_pretrained" if torch else ""
            problem = f"has neither {WEIGHTS} nor {INDEX}{advice}"
        raise ConfigError([f"{where}: {problem}"]) from None
    return stored


def _files_of_index(file: Path, where: str) -> list[Path]:
    """The files that an index names, which lie beside it."""
    names = read_json(file, where).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConfigError(
            [f"{where}: {file}: weight_map: {names!r}, expected the file of each tensor: download it again"]
        )
    for name in names.values():
        if not isinstance(name, str) or not name.isprintable() or Path(name).name != name:
            raise ConfigError([f"{where}: {file}: weight_map: {name!r} is no file in this folder: download it again"])
    return [file.parent / name for name in sorted(set(names.values()))]


def find_problems(
    stored: Mapping[str, Any], parameters: list[Parameter], architecture: Architecture, where: str
) -> Problems:
    problems = Problems(where)
    report = problems.report
    shapes = {name: list(tensor.get_shape()) for name, tensor in stored.items()}
    unexpected = {name for name in stored if not name.endswith("rotary_emb.inv_freq")}  # a constant in old files
    for parameter in parameters:
        expected = parameter.stored_shape(architecture)
        for name in map(parameter.pattern.format, parameter.layers):
            unexpected.discard(name)
            if name not in stored:
                report(name, f"{expected} is missing: it is needed for {parameter.name}")
            elif shapes[name] != expected:
                report(name, f"is {shapes[name]}, expected {expected} for {parameter.name}")
            elif stored[name].get_dtype() not in DTYPES:
                report(
                    name, f"is {stored[name].get_dtype()}, which is not supported: choose one of {', '.join(DTYPES)}"
                )
    table, head = NAMES["embed/table"][0], NAMES["head/weight"][0]
    if architecture.tie_word_embeddings and {table, head} <= stored.keys():  # some checkpoints hold both
        unexpected.discard(head)
        if not problems.lines and not np.array_equal(stored[table][:], stored[head][:]):
            report(head, f"differs from {table}: set actor.model.tie_word_embeddings: False")
    for name in sorted(unexpected):
        report(name, f"{shapes[name]} is unexpected: the architecture in config.json has no such weight")
    return problems


def on_every_device(value: jax.Array, layer: int | None, dtype: str) -> jax.Array:
    """A whole parameter, or one whole layer of it, on every device."""
    sharding = value.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P())
    return jax.jit(_take, static_argnames="dtype", out_shardings=sharding)(value, layer, dtype)


def _take(value: jax.Array, layer: jax.Array | None, dtype: str) -> jax.Array:
    if layer is not None:  # indexing would first gather the layers of all stages; a masked maximum is exact as well
        chosen = jnp.arange(value.shape[0]).reshape(-1, *[1] * (value.ndim - 1)) == layer
        value = jnp.where(chosen, value, -jnp.inf).max(0)
    return value.astype(dtype)


def _config_json(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """A config.json in the keys of transformers 4, which 5 reads too. The family is the one with these features."""
    arch, values = architecture, asdict(architecture)
    if arch.qk_norm and arch.attention_bias:
        raise ConfigError(
            "actor.model.add_qkv_bias: a qwen3 model with it cannot be saved, because in transformers' qwen3 the output "
            "projection has a bias too: train without it"
        )
    mistral = arch.sliding_window or arch.model_type == "mistral"
    family = "qwen3" if arch.qk_norm else "qwen2" if arch.attention_bias else "mistral" if mistral else "llama"
    if arch.rope_scaling:
        values["rope_scaling"] |= {"rope_type": "llama3"}
    unknown = () if arch.max_position_embeddings else ("max_position_embeddings",)
    return {key: x for key, x in values.items() if key not in ("padded_vocab_size", "qk_norm", *unknown)} | {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "use_sliding_window": arch.sliding_window is not None,
        "max_window_layers": 0,  # the window is on all layers
        "bos_token_id": None,  # unknown here, and the family's default could be another token
        "eos_token_id": None,
    }
