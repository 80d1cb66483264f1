"""LoRA's settings: rank, scale, and which matrices get adapters; from the config, or from a folder in PEFT's format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpar.config.errors import ConfigError, did_you_mean, one_of, read_json
from jaxpar.config.keys import Model

# Hugging Face's name of a matrix → the decoder's
TARGETS = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
ALL = "all-linear"  # PEFT's name for all of them
RANK = 32  # RLinf's default
ADAPTER_CONFIG = "adapter_config.json"
# Keys of adapter_config.json whose other values mean another computation
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "fan_in_fan_out": (False, None), "use_rslora": (False, None),
    "use_dora": (False, None), "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "modules_to_save": (None, []),
    "layers_to_transform": (None, []), "exclude_modules": (None, []),
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al., 2021, arXiv:2106.09685).

    Attributes:
      rank: columns of A, rows of B.
      alpha: the product A B is multiplied by alpha / rank.
      targets: names in `TARGETS` of the matrices that have adapters.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(TARGETS)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def read_lora(model: Model) -> Lora | None:
    """The settings of `actor.model`; None without is_lora.

    Raises:
      ConfigError: a setting is not supported, or differs from that of the folder `lora_path`.
    """
    if not model.is_lora:
        return None
    problems = list(_problems(model))
    stored: dict[str, Any] = {}
    if model.lora_path is not None:
        try:
            stored = _read_folder(model.lora_path)
        except ConfigError as error:
            problems += error.problems
    targets = model.lora_target_modules
    given = {"r": model.lora_rank, "lora_alpha": model.lora_alpha, "target_modules": targets and _all(targets)}
    keys = {"r": "lora_rank", "lora_alpha": "lora_alpha", "target_modules": "lora_target_modules"}
    for name, value in given.items():
        if stored and value not in (None, stored[name]):
            problems.append(
                f"actor.model.{keys[name]}: {value}, but {model.lora_path} has {name} {stored[name]}: remove the key, and the "
                f"folder's is taken"
            )
    if problems:
        raise ConfigError(problems)
    found: dict[str, Any] = {name: stored.get(name) if value is None else value for name, value in given.items()}
    rank = found["r"] or RANK
    return Lora(rank, found["lora_alpha"] or rank, tuple(_all(found["target_modules"] or [ALL])))


def lora_note(model: Model) -> str | None:
    """What to tell the user of settings that have no effect."""
    names = ("lora_rank", "lora_path", "lora_alpha", "lora_target_modules")
    given = [name for name in names if getattr(model, name) is not None]
    return f"actor.model: {', '.join(given)} have no effect without is_lora" if given and not model.is_lora else None


def _all(targets: list[str]) -> list[str]:
    """In the order of `TARGETS`, so that two lists of the same names are equal."""
    return [name for name in TARGETS if name in targets or ALL in targets]


def _problems(model: Model) -> Iterator[str]:
    if model.lora_dropout:
        yield f"actor.model.lora_dropout: {model.lora_dropout}, but dropout in adapters is not supported: set it to 0"
    known = (*TARGETS, ALL)
    for name in model.lora_target_modules or ():
        if name not in known:
            yield f"actor.model.lora_target_modules: {name} is unknown{did_you_mean(name, known)}: {one_of(known)}"
    if model.lora_target_modules == []:
        yield f"actor.model.lora_target_modules: [] names nothing: {one_of(known)}"


def _read_folder(path: str) -> dict[str, Any]:
    """`r`, `lora_alpha` and `target_modules` of the folder's adapter_config.json."""
    file = Path(path).expanduser() / ADAPTER_CONFIG
    where = f"actor.model.lora_path: {file}"
    try:
        stored = read_json(file, "actor.model.lora_path")
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file: give a folder with adapters in PEFT's format") from None
    rank, alpha, targets = stored.get("r"), stored.get("lora_alpha"), stored.get("target_modules")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < 2**20:
        raise ConfigError(f"{where}: r: {rank!r}, expected the rank of the adapters: correct it")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 2**20:
        raise ConfigError(f"{where}: lora_alpha: {alpha!r}, expected a number above 0: correct it")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ConfigError(f"{where}: target_modules: {targets!r}, expected names of matrices: correct it")
    found = {"r": rank, "lora_alpha": float(alpha)}
    problems = [
        f"{where}: {key} {stored[key]} is not supported: adapters must be plain LoRA on linear layers of attention and MLP"
        for key, plain in _PLAIN.items()
        if key in stored and stored[key] not in plain
    ]
    if unknown := [name for name in targets if name not in (*TARGETS, ALL)]:
        problems.append(f"{where}: target_modules {', '.join(unknown)}: not supported: {one_of(tuple(TARGETS))}")
    if problems:
        raise ConfigError(problems)
    return {**found, "target_modules": _all(targets)}
