"""The decoder that a config describes, from a Hugging Face config.json or from the config's own fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxpar.config.keys import ARCHITECTURE_KEYS, Actor, ConfigError, Model, describe_error, must_divide, one_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
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
    """A dense decoder, under Hugging Face's names. `attention_bias` is of q, k and v; the output has none."""

    model_type: str
    vocab_size: int
    padded_vocab_size: int  # rows of the embedding: independent of the layout, so checkpoints move between layouts
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
    sliding_window: int | None = None  # tokens that a query sees, itself included; None: all before it
    max_position_embeddings: int = 0
    initializer_range: float = 0.02


def read_architecture(actor: Actor) -> tuple[Architecture | None, list[str]]:
    """The architecture and what to tell about it."""
    model, notes = actor.model, list[str]()
    given = {key: getattr(model, key) for key in ARCHITECTURE_KEYS if getattr(model, key) is not None}
    if model.model_path is None and not given:
        return None, notes
    where = "actor.model"
    extra: dict[str, Any] = {}  # all of config.json
    stored: dict[str, Any] = {}  # what of it has a key of ours
    if model.model_path is not None:
        where, extra = _read_hugging_face(model.model_path)
        stored = {key: extra[key] for key in ARCHITECTURE_KEYS if extra.get(key) is not None}
        notes += [
            f"actor.model.{key} {value} takes the place of {stored[key]} in {where}"
            for key, value in given.items()
            if stored.get(key, value) != value
        ]
    elif "vocab_size" not in given and actor.tokenizer.tokenizer_model in (None, "byte"):
        stored["vocab_size"] = BYTE_VOCAB_SIZE
        notes.append(f"actor.model.vocab_size is not given: {BYTE_VOCAB_SIZE}, of the byte tokenizer")
    try:
        fields = Model.model_validate({**stored, **given})
    except ValidationError as error:
        raise ConfigError([f"{where}: {describe_error(e)}" for e in error.errors()]) from None

    family = str(extra.get("model_type") or model.model_type or "llama")  # RLinf's name beside model_path is looser
    family = "qwen2" if family == "qwen2.5" else family
    problems = []
    if family not in FAMILIES:
        problems.append(
            f"{where if extra else 'actor.model'}.model_type: {family} is not there yet: {one_of(FAMILIES)}"
        )
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in required if getattr(fields, key) is None]
    problems += [f"{where}.{key}: not given: the architecture needs it" for key in missing]
    if missing or problems:
        raise ConfigError(problems)
    layers, heads, hidden = fields.num_hidden_layers, fields.num_attention_heads, fields.hidden_size
    vocab, mlp = fields.vocab_size, fields.intermediate_size
    assert layers and heads and hidden and vocab and mlp  # just checked
    kv_heads = fields.num_key_value_heads or heads
    problems += must_divide(f"{where}.num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if fields.head_dim is None:
        problems += must_divide(f"{where}.num_attention_heads", heads, "hidden_size", hidden)
    head_dim = fields.head_dim or hidden // heads
    if head_dim % 2:
        problems.append(f"{where}.head_dim: {head_dim} is odd, and RoPE rotates pairs: choose an even one")
    if fields.hidden_act not in (None, "silu", "swish"):
        problems.append(f"{where}.hidden_act: {fields.hidden_act}, but the decoder has SwiGLU only: set it to silu")
    # Hugging Face's llama and qwen3 put a bias on the output projection too, by the same flag.
    if (family != "qwen2" and extra.get("attention_bias")) or extra.get("mlp_bias"):
        problems.append(
            f"{where}: attention_bias {extra.get('attention_bias', False)}, mlp_bias "
            f"{extra.get('mlp_bias', False)}: {family} with biases is not there yet: use a model without"
        )
    rope = _read_rope(fields.rope_scaling, where, problems)
    window = _read_window(fields, family, extra, where, problems, notes)
    if problems:
        raise ConfigError(problems)
    divisor = model.make_vocab_size_divisible_by
    qkv_bias = model.add_qkv_bias if fields.attention_bias is None and not extra else fields.attention_bias
    optional = {
        key: getattr(fields, key)
        for key in ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings", "initializer_range")
    }
    return Architecture(
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
        attention_bias=family == "qwen2" if qkv_bias is None else qkv_bias,
        **{key: value for key, value in optional.items() if value is not None},
    ), notes


def _read_hugging_face(model_path: str) -> tuple[str, dict[str, Any]]:
    """Name and contents of the folder's config.json, in the keys of transformers 4 (5 has `rope_parameters`)."""
    file = Path(model_path).expanduser() / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            [
                f"actor.model.model_path: {model_path} has no config.json: give a folder with a Hugging "
                "Face model, or the architecture's fields instead"
            ]
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"actor.model.model_path: {file} cannot be read: {error}"]) from None
    if not isinstance(values, dict) or not values.get("model_type"):
        raise ConfigError([f"actor.model.model_path: {file} names no model_type: give a Hugging Face model's folder"])
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        values |= {"rope_theta": rope.get("rope_theta", values.get("rope_theta")), "rope_scaling": rope}
    return str(file), values


def _read_rope(scaling: Mapping[str, Any] | None, where: str, problems: list[str]) -> RopeScaling | None:
    if not scaling or set(scaling) == {"rope_theta"}:
        return None
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "default":
        return None
    if kind != "llama3":
        problems.append(f"{where}.rope_scaling: rope_type {kind} is not there yet: choose one of default, llama3")
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    bad = [name for name in names if type(scaling.get(name)) not in (int, float)]
    if bad:
        problems.append(f"{where}.rope_scaling: rope_type llama3 needs numbers for {', '.join(bad)}")
        return None
    return RopeScaling(
        float(scaling["factor"]),
        float(scaling["low_freq_factor"]),
        float(scaling["high_freq_factor"]),
        int(scaling["original_max_position_embeddings"]),
    )


def _read_window(
    fields: Model, family: str, extra: Mapping[str, Any], where: str, problems: list[str], notes: list[str]
) -> int | None:
    """One window for all layers or none. In the Qwen families it counts only with `use_sliding_window`."""
    window, use = fields.sliding_window, fields.use_sliding_window
    if use is None and family.startswith("qwen"):
        use = False
        if window and not extra:
            notes.append(f"actor.model.sliding_window {window} is off: {family} needs use_sliding_window: True")
    if window is None or use is False:
        return None
    layers = fields.num_hidden_layers or 0
    kinds = extra.get("layer_types")
    if kinds is None and family.startswith("qwen") and extra:  # the first max_window_layers see everything
        full = min(int(extra.get("max_window_layers") or 0), layers)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if kinds and len(set(kinds)) > 1:
        problems.append(
            f"{where}.sliding_window: {window} on {kinds.count('sliding_attention')} of {len(kinds)} "
            "layers: a window on some layers only is not there yet: set use_sliding_window: False"
        )
    return None if kinds and kinds[0] == "full_attention" else window
