"""Reads YAML files with OmegaConf: Hydra's `defaults`, RLinf's resolvers, and values as plain dicts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from jaxpar.config.errors import ConfigError
from jaxpar.config.foreign import FOREIGN_KEYS, OPAQUE_SECTIONS
from jaxpar.config.yaml_text import MAX_CHARACTERS, MAX_DEPTH, UNREADABLE, message, parse

LONG = 2**63  # integers below it have 64 bits


def read_yaml(path: Path, including: tuple[Path, ...] = ()) -> DictConfig:
    """One file, merged over the files beside it that its Hydra `defaults` name.

    Args:
      including: the files whose `defaults` led to this one.

    Raises:
      ConfigError: a file cannot be read, is not YAML, includes itself, or needs Hydra.
    """
    values = _read(path)
    if path.resolve() in including:
        raise ConfigError([f"{path}: its defaults include the file itself: remove that entry"])
    merged: Any = OmegaConf.create({})
    for entry in _defaults(path, values):
        name, _, package = entry.partition("@")
        section, _, key = package.rpartition(".")
        if package and key not in FOREIGN_KEYS.get(section, ()) and package.split(".")[0] not in OPAQUE_SECTIONS:
            raise ConfigError(
                [
                    f"{path}: defaults: {entry} needs Hydra to compose it, which is not supported: write the keys of "
                    f"{package} into the file"
                ]
            )
        if not package and name != "_self_":
            merged = _merge(merged, read_yaml(path.parent / f"{name}.yaml", (*including, path.resolve())), path)
    return _merge(merged, values, path)


def _defaults(path: Path, values: DictConfig) -> list[str]:
    """Hydra's list: names, and of the entries with a value (`override hydra/job_logging: stdout`) those keys with a package."""
    plain: Any = OmegaConf.to_container(values, resolve=False)
    entries, names = plain.get("defaults") or [], list[str]()
    for entry in entries if isinstance(entries, list) else [None]:
        name: Any = next(iter(entry)) if isinstance(entry, dict) and entry else entry
        if not isinstance(name, str):
            raise ConfigError(
                [f"{path}: defaults: {entries}: expected a list of names of files beside this one, such as [base]"]
            )
        names += [str(name)] if name is entry or "@" in name else []
    return names


def _merge(base: DictConfig, values: DictConfig, path: Path) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(base, values))
    except UNREADABLE as error:
        raise ConfigError([f"{path}: {getattr(error, 'full_key', '')}: {message(error)}"]) from None


def _read(path: Path) -> DictConfig:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)  # the path may be that of a device
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file: give the path of a YAML file"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: is a directory: give the path of a YAML file in it"]) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that cannot be one
        raise ConfigError([f"{path}: cannot be read as text: {error}"]) from None
    return parse(text, str(path))


@dataclass(frozen=True)
class Resolved:
    """A file's values as plain dicts, and what was found while resolving them.

    Attributes:
      values: nested dicts without foreign keys; interpolations are resolved.
      ignored: the foreign keys, as dotted paths.
      problems: one line for each value that cannot be resolved.
      suspects: names of the keys of those values.
    """

    values: dict[str, Any]
    ignored: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)


def resolve(values: DictConfig) -> Resolved:
    """Resolves all values except those of foreign keys, whose interpolations may refer to keys that do not exist."""
    _register_resolvers()
    resolved = Resolved({})
    resolved.values.update(_resolve_section(values, "", resolved))
    return resolved


def _resolve_section(section: DictConfig, path: str, resolved: Resolved) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name in section:
        key = str(name)
        where = f"{path}.{key}".lstrip(".")
        if key in (FOREIGN_KEYS.get(path, ()) if path else OPAQUE_SECTIONS):
            resolved.ignored.append(where)
            continue
        try:
            value = section[name]
            if isinstance(value, ListConfig):
                value = OmegaConf.to_container(value, resolve=True)
        except MissingMandatoryValue:
            resolved.problems.append(f"{where}: is ???, which marks a value that must be given: set it")
            resolved.suspects.add(key)
            continue
        except UNREADABLE as error:
            raw: Any = OmegaConf.to_container(section, resolve=False)
            resolved.problems.append(
                f"{where}: {raw[name]} cannot be resolved: {message(error)}: correct it, or give a value"
            )
            resolved.suspects.add(key)
            continue
        if _has_long_integer(value):
            resolved.problems.append(f"{where}: an integer of more than 64 bits cannot be meant: write a smaller one")
            resolved.suspects.add(key)
            continue
        if isinstance(value, DictConfig) and where.count(".") > MAX_DEPTH:
            resolved.problems.append(
                f"{where}: more than {MAX_DEPTH} sections inside each other: does it refer to itself?"
            )
            continue
        plain[key] = _resolve_section(value, where, resolved) if isinstance(value, DictConfig) else value
    return plain


def _has_long_integer(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_long_integer, value))
    if isinstance(value, dict):
        return any(map(_has_long_integer, value.values()))
    return isinstance(value, int) and not -LONG <= value < LONG


def _register_resolvers() -> None:
    resolvers: dict[str, Callable[..., Any]] = {
        "multiply": lambda x, y: _number(x) * _number(y),
        "int_div": lambda x, y: _number(x) // _number(y),
        "subtract": lambda x, y: _number(x) - _number(y),
        "not": lambda x: not x,
        "torch.dtype": lambda name: name,  # in RLinf a torch.dtype; jaxpar only needs the name
        "now": lambda pattern="%Y-%m-%d": time.strftime(pattern),  # Hydra's
    }
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)  # renamed in OmegaConf 2.4
    for name, resolver in resolvers.items():
        register(name, resolver, replace=True)


def _number(value: Any) -> int | float:
    """Raises ValueError for what is no number: a text times 10⁹ would fill the memory."""
    if not isinstance(value, int | float) or not -LONG <= value < LONG:
        raise ValueError(f"{str(value)[:100]} is not a number of at most 64 bits")
    return value
