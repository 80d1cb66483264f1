"""From a YAML file in RLinf's shape, with Megatron-LM's key names, to a validated `Config`. Does not import jax.

`load_config` reads the file, resolves its interpolations and checks names and types. `Config.mesh_sizes` and
`Config.check_train` check the arithmetic that needs the number of devices. All of them raise `ConfigError` with every
problem that they can see; each problem names the key, shows the arithmetic and says what to change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from jaxpar.config.config import Config
from jaxpar.config.errors import ConfigError, describe_error, suspect_keys
from jaxpar.config.keys import Section
from jaxpar.config.yaml_files import read_yaml, resolve
from jaxpar.config.yaml_text import UNREADABLE, message, parse


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file.

    Args:
      path: the file. Interpolation is OmegaConf's, with RLinf's resolvers; Hydra's `defaults` may name files beside it.
      overrides: `key.path=value` each, the value in YAML; they win over the file.

    Raises:
      ConfigError: with every problem of the file and of the overrides.
    """
    problems: list[str] = []
    values = read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            problems.append(f"override {override!r}: expected key.path=value, such as runner.max_steps=100")
            continue
        try:
            value = OmegaConf.to_container(parse(f"value: {text}", f"override {override!r}"), resolve=False)
            assert isinstance(value, dict)
            if list(value) != ["value"]:
                raise ConfigError([f"override {override!r}: expected one value"])
            OmegaConf.update(values, key, value["value"], merge=True)
        except ConfigError as error:
            problems += error.problems
        except UNREADABLE as error:
            problems.append(f"override {override!r}: {message(error)}")
    return _build(values, problems)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The config that `load_config` would read from a file with these contents, given as nested dicts.

    Raises:
      ConfigError: with every problem.
    """
    try:
        return _build(OmegaConf.create(dict(values)), [])
    except UNREADABLE as error:
        raise ConfigError([f"{getattr(error, 'full_key', '')}: {message(error)}"]) from None


def _build(values: DictConfig, problems: list[str]) -> Config:
    """Resolves and validates. Collects every problem before it raises."""
    resolved = resolve(values)
    plain, suspects = resolved.values, set(resolved.suspects)  # suspects: their values are not what the user meant
    problems = [*problems, *resolved.problems]
    try:
        config = Config.model_validate(plain)
    except ValidationError as error:
        for e in error.errors():
            problems.append(describe_error(e))
            suspects |= suspect_keys(e)
            _drop(plain, e["loc"])
        config = Config.model_validate(plain)
    if config.actor.model.seq_length and not config.runner.seq_length:  # as in RLinf's files for supervised training
        config = config.model_copy(
            update={"runner": config.runner.model_copy(update={"seq_length": config.actor.model.seq_length})}
        )
    config._ignored = tuple(resolved.ignored)
    if problems and (config.actor.micro_batch_size or config.actor.global_batch_size):  # not reinforcement learning
        problems += _arithmetic_problems(config, suspects)
    if problems:
        raise ConfigError(problems)
    return config


def _arithmetic_problems(config: Config, suspects: set[str]) -> list[str]:
    """The problems of `prepare_train`, so that a file with other mistakes need not be corrected in two rounds.

    Leaves out problems that involve a suspect key, whose true value is unknown.
    """
    model = config.actor.model
    product = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    try:
        config.prepare_train(config.num_configured_devices() or product)
    except ConfigError as error:
        return [p for p in error.problems if not suspects & set(re.findall(r"\w+", p))]
    return []


def _drop(plain: dict[str, Any], loc: Sequence[Any]) -> None:
    """Removes the setting at `loc`, whole: what is wrong in a list or a dict is a part of one."""
    section: type[Section] = Config
    for part in loc:
        below = section.model_fields[part].annotation if part in section.model_fields else None
        inside = isinstance(below, type) and issubclass(below, Section) and isinstance(plain.get(part), dict)
        if not inside or part is loc[-1]:
            plain.pop(part, None)
            return
        plain, section = plain[part], cast(type[Section], below)
