"""The decoder's architecture, from a Hugging Face config.json or from the config's own keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxpar.config.errors import ConfigError, describe_error, must_divide, one_of, read_json
from jaxpar.config.keys import Actor, ArchitectureFields

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION_KINDS = {"full_attention", "sliding_attention"}
BYTE_VOCAB_SIZE = 258  # 256 bytes, end of text (256), padding (257)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies (Hugging Face's `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Architecture:
    """A dense decoder, under Hugging Face's names.

    `attention_bias` applies to query, key and value; the output projection has no bias.
    """

    model_type: str
    vocab_size: int
    padded_vocab_size: int  # rows of the embedding; the same on every layout, so that checkpoints can change layouts
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None  # tokens that a query sees, including itself; None: all tokens before it
    max_position_embeddings: int = 0
    initializer_range: float = 0.02


def read_architecture(actor: Actor) -> tuple[Architecture | None, list[str]]:
    """The architecture that a config describes, or None if it describes none; and notes for the user.

    Raises:
      ConfigError: config.json cannot be read; a field is missing or wrong; the architecture is not supported.
    """
    found = _find_fields(actor)
    if found is None:
        return None, []
    fields, family, model = found.fields, found.family, actor.model
    if problems := list(_basic_problems(found)):
        raise ConfigError(problems)
    layers, heads, hidden = fields.num_hidden_layers, fields.num_attention_heads, fields.hidden_size
    vocab, mlp = fields.vocab_size, fields.intermediate_size
    assert layers and heads and hidden and vocab and mlp  # checked by _basic_problems
    kv_heads, head_dim = fields.num_key_value_heads or heads, fields.head_dim or hidden // heads
    problems = list(_support_problems(found, heads, kv_heads, hidden, head_dim))
    rope = _read_rope(found, problems)
    window = _read_window(found, layers, problems)
    if problems:
        raise ConfigError(problems)
    divisor = model.make_vocab_size_divisible_by
    bias = model.add_qkv_bias if fields.attention_bias is None and not found.stored else fields.attention_bias
    optional = {
        key: getattr(fields, key)
        for key in ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings", "initializer_range")
    }
    architecture = Architecture(
        model_type=family,
        vocab_size=vocab,
        padded_vocab_size=-(-vocab // divisor) * divisor,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_scaling=rope,
        sliding_window=window,
        qk_norm=family == "qwen3",
        attention_bias=family == "qwen2" if bias is None else bias,
        **{key: value for key, value in optional.items() if value is not None},
    )
    return architecture, found.notes


@dataclass(frozen=True)
class _Found:
    """The fields of an architecture and where they come from.

    Attributes:
      where: the path of config.json, or "actor.model"; error messages name it.
      stored: all of config.json; empty if the config gives no model_path.
      fields: config.json's fields, overridden by the config's own.
      family: one of `FAMILIES`, or an unsupported one.
      notes: what to tell the user; more are added while the fields are read.
    """

    where: str
    stored: Mapping[str, Any]
    fields: ArchitectureFields
    family: str
    notes: list[str]


def _find_fields(actor: Actor) -> _Found | None:
    """None if the config gives neither `model_path` nor a field."""
    model, notes = actor.model, list[str]()
    keys = ArchitectureFields.model_fields
    given = {key: getattr(model, key) for key in keys if getattr(model, key) is not None}
    if model.model_path is None and not given:
        return None
    where = "actor.model"
    stored: dict[str, Any] = {}
    defaults: dict[str, Any] = {}  # for keys that the config does not give
    if model.model_path is not None:
        where, stored = _read_hugging_face(model.model_path)
        defaults = {key: stored[key] for key in keys if stored.get(key) is not None}
        notes += [
            f"actor.model.{key} {value} overrides {defaults[key]} in {where}"
            for key, value in given.items()
            if defaults.get(key, value) != value
        ]
    elif "vocab_size" not in given and actor.tokenizer.tokenizer_model in (None, "byte"):
        defaults["vocab_size"] = BYTE_VOCAB_SIZE
        notes.append(f"actor.model.vocab_size is not given: using {BYTE_VOCAB_SIZE}, the size of the byte tokenizer")
    try:
        fields = ArchitectureFields.model_validate({**defaults, **given})
    except ValidationError as error:
        raise ConfigError([f"{where}: {describe_error(e)}" for e in error.errors()]) from None
    # config.json wins, because RLinf's files are less strict about the model_type that they give beside model_path.
    family = str(stored.get("model_type") or model.model_type or "llama")
    return _Found(where, stored, fields, "qwen2" if family == "qwen2.5" else family, notes)


def _basic_problems(found: _Found) -> Iterator[str]:
    """Problems that make all further checks impossible."""
    if found.family not in FAMILIES:
        yield f"{found.where}.model_type: {found.family} is not supported: {one_of(FAMILIES)}"
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if getattr(found.fields, key) is None:
            yield f"{found.where}.{key}: not given, but every architecture needs it: set it"


def _support_problems(found: _Found, heads: int, kv_heads: int, hidden: int, head_dim: int) -> Iterator[str]:
    where, fields, stored = found.where, found.fields, found.stored
    yield from must_divide(f"{where}.num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if fields.head_dim is None:
        yield from must_divide(f"{where}.num_attention_heads", heads, "hidden_size", hidden)
    if head_dim % 2:
        yield f"{where}.head_dim: {head_dim} is odd, but RoPE rotates pairs of dimensions: choose an even number"
    if fields.hidden_act not in (None, "silu", "swish"):
        yield f"{where}.hidden_act: {fields.hidden_act}, but the decoder only supports SwiGLU: set it to silu"
    # In Hugging Face's llama and qwen3 the same flag also adds a bias to the output projection.
    if (found.family != "qwen2" and stored.get("attention_bias")) or stored.get("mlp_bias"):
        yield (
            f"{where}: attention_bias {stored.get('attention_bias', False)}, mlp_bias {stored.get('mlp_bias', False)}: "
            f"{found.family} with biases is not supported: use a model without them"
        )


def _read_hugging_face(model_path: str) -> tuple[str, dict[str, Any]]:
    """Path and contents of the folder's config.json, in the keys of transformers 4 (5 has `rope_parameters`)."""
    file = Path(model_path).expanduser() / "config.json"
    try:
        values = read_json(file, "actor.model.model_path")
    except FileNotFoundError:
        raise ConfigError(
            [
                f"actor.model.model_path: {model_path} has no config.json: give the folder of a Hugging Face model, "
                "or set the architecture's keys instead"
            ]
        ) from None
    if not values.get("model_type"):
        raise ConfigError(
            [f"actor.model.model_path: {file} has no model_type: give the folder of a Hugging Face model"]
        )
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        values |= {"rope_theta": rope.get("rope_theta", values.get("rope_theta")), "rope_scaling": rope}
    return str(file), values


def _read_rope(found: _Found, problems: list[str]) -> RopeScaling | None:
    """None: no scaling, or a problem, which is then added to `problems`."""
    scaling = found.fields.rope_scaling
    if not scaling or set(scaling) == {"rope_theta"}:
        return None
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "default":
        return None
    if kind != "llama3":
        problems.append(f"{found.where}.rope_scaling: rope_type {kind} is not supported: choose one of default, llama3")
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    bad = [name for name in names if not _is_positive(scaling.get(name))]
    if bad:
        problems.append(
            f"{found.where}.rope_scaling: rope_type llama3 needs numbers for {', '.join(bad)}, above 0: set them"
        )
        return None
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        problems.append(
            f"{found.where}.rope_scaling: low_freq_factor {scaling['low_freq_factor']} is not below high_freq_factor "
            f"{scaling['high_freq_factor']}: lower it"
        )
        return None
    return RopeScaling(
        float(scaling["factor"]),
        float(scaling["low_freq_factor"]),
        float(scaling["high_freq_factor"]),
        int(scaling["original_max_position_embeddings"]),
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _read_window(found: _Found, layers: int, problems: list[str]) -> int | None:
    """The sliding window, which is the same on all layers. Qwen models only use it with `use_sliding_window`."""
    window, use = found.fields.sliding_window, found.fields.use_sliding_window
    qwen, stored = found.family.startswith("qwen"), found.stored
    if use is None and qwen:
        use = False
        if window and not stored:
            found.notes.append(
                f"actor.model.sliding_window {window} has no effect: {found.family} also needs use_sliding_window: True"
            )
    if window is None or use is False:
        return None
    kinds = stored.get("layer_types")
    if kinds is None and qwen and stored:  # the first max_window_layers layers use full attention
        full = stored.get("max_window_layers") or 0
        if not isinstance(full, int):
            problems.append(f"{found.where}.max_window_layers: {full!r}, expected a number of layers: correct it")
            return None
        full = min(max(full, 0), layers)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if kinds is None:
        return window
    if not isinstance(kinds, list) or not kinds or not set(map(str, kinds)) <= ATTENTION_KINDS:
        problems.append(
            f"{found.where}.layer_types: {kinds!r}, expected one of {', '.join(sorted(ATTENTION_KINDS))} for each layer: correct "
            "it, or set use_sliding_window: False"
        )
        return None
    if len(set(kinds)) > 1:
        problems.append(
            f"{found.where}.sliding_window: {window} on {kinds.count('sliding_attention')} of {len(kinds)} layers, but a "
            "window on only some of the layers is not supported: set use_sliding_window: False"
        )
    return None if kinds[0] == "full_attention" else window
