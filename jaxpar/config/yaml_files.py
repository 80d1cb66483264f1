"""Reads YAML files with OmegaConf: Hydra's `defaults`, RLinf's resolvers, and values as plain dicts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from jaxpar.config.errors import ConfigError
from jaxpar.config.foreign import FOREIGN_KEYS, OPAQUE_SECTIONS


def read_yaml(path: Path, including: tuple[Path, ...] = ()) -> DictConfig:
    """One file, merged over the files beside it that its Hydra `defaults` name.

    Args:
      including: the files whose `defaults` led to this one.

    Raises:
      ConfigError: a file cannot be read, is not YAML, includes itself, or needs Hydra.
    """
    values = _parse(path)
    if path.resolve() in including:
        raise ConfigError([f"{path}: its defaults include the file itself: remove that entry"])
    merged: Any = OmegaConf.create({})
    for entry in values.get("defaults") or []:
        name, _, package = (entry if isinstance(entry, str) else next(iter(entry), "")).partition("@")
        section, _, key = package.rpartition(".")
        if package and key not in FOREIGN_KEYS.get(section, ()) and package.split(".")[0] not in OPAQUE_SECTIONS:
            raise ConfigError(
                [
                    f"{path}: defaults: {entry} needs Hydra to compose it, which is not supported: write the keys of "
                    f"{package} into the file"
                ]
            )
        if isinstance(entry, str) and not package and name != "_self_":
            merged = OmegaConf.merge(merged, read_yaml(path.parent / f"{name}.yaml", (*including, path.resolve())))
    merged = OmegaConf.merge(merged, values)
    return merged


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                [
                    f"{path}: expected sections (cluster, runner, data, actor) at the top level, got a plain "
                    f"{'list' if isinstance(root, yaml.SequenceNode) else 'value'}"
                ]
            )
        return OmegaConf.create(text)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file: give the path of a YAML file"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: is a directory: give the path of a YAML file in it"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read as text: {error}"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or first_line(error)
        raise ConfigError([f"{path}: invalid YAML{where}: {what}: correct it there"]) from None
    except OmegaConfBaseException as error:
        raise ConfigError([f"{path}: {getattr(error, 'full_key', '')}: {first_line(error)}"]) from None


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
        except OmegaConfBaseException as error:
            raw: Any = OmegaConf.to_container(section, resolve=False)
            resolved.problems.append(
                f"{where}: {raw[name]} cannot be resolved: {first_line(error)}: correct it, or give a value"
            )
            resolved.suspects.add(key)
            continue
        plain[key] = _resolve_section(value, where, resolved) if isinstance(value, DictConfig) else value
    return plain


def _register_resolvers() -> None:
    resolvers: dict[str, Callable[..., Any]] = {
        "multiply": lambda x, y: x * y,
        "int_div": lambda x, y: x // y,
        "subtract": lambda x, y: x - y,
        "not": lambda x: not x,
        "torch.dtype": lambda name: name,  # in RLinf a torch.dtype; jaxpar only needs the name
        "now": lambda pattern="%Y-%m-%d": time.strftime(pattern),  # Hydra's
    }
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)  # renamed in OmegaConf 2.4
    for name, resolver in resolvers.items():
        register(name, resolver, replace=True)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
