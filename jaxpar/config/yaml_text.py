"""The text of YAML → plain values. What YAML 1.1 reads in a way that nobody means is an error that names the line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jaxpar.config.errors import ConfigError

MAX_CHARACTERS = 200_000  # some 2 s to read; the largest file of RLinf has 10,000
MAX_DEPTH = 32  # sections and lists inside each other
MAX_VALUES = 100_000  # with every alias written out
# What OmegaConf raises for values that it cannot read; ValueError: an integer of thousands of digits; RecursionError: ${ in ${
UNREADABLE = (OmegaConfBaseException, ValueError, RecursionError)
_OCTAL, _BASE_60 = (
    re.compile(r"[-+]?0[0-7_]+"),
    re.compile(r"[-+]?([1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)"),
)


def parse(text: str, where: str) -> DictConfig:
    """Reads sections.

    Args:
      where: what error lines begin with, such as the path of the file.

    Raises:
      ConfigError: the text is too long, is not YAML or is no section; it has tags (`!!int`), or a number such as 0200 or
        1:30, which YAML 1.1 takes for 128 and 90.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError([f"{where}: longer than {MAX_CHARACTERS:,} characters: give a config"])
    try:
        problems = list(_problems(text))
        if not problems:
            return cast(DictConfig, OmegaConf.create(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or message(error)
        problems = [f"invalid YAML{at}: {problem}: correct it there"]
    except UNREADABLE as error:
        problems = [f"{getattr(error, 'full_key', '') or 'invalid YAML'}: {message(error)}"]
    raise ConfigError([f"{where}: {problem}" for problem in problems])


def message(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _problems(text: str) -> Iterator[str]:
    """Reads the events of the parser, which, unlike values, can neither nest too deep nor grow by aliases."""
    sizes, anchors, counts, top = dict[str, int](), list[str | None](), [0], True
    event: Any
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        at = f"line {event.start_mark.line + 1}"
        tag, anchor = getattr(event, "tag", None), getattr(event, "anchor", None)
        if top and isinstance(event, yaml.SequenceStartEvent | yaml.ScalarEvent):
            kind = "list" if isinstance(event, yaml.SequenceStartEvent) else "value"
            yield f"expected sections (cluster, runner, data, actor) at the top level, got a plain {kind}"
            return
        top = top and not isinstance(event, yaml.NodeEvent)
        if tag not in (None, "tag:yaml.org,2002:str"):
            yield f"{at}: the tag {tag} is not supported: remove it"
        if isinstance(event, yaml.CollectionStartEvent):
            counts, anchors = [*counts, 0], [*anchors, anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            *counts, size = counts
            *anchors, anchor = anchors
            counts[-1] += size + 1
            sizes |= {anchor: size + 1} if anchor else {}
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                yield f"{at}: *{anchor} is not known, or is part of itself: write the value out"
                return
            counts[-1] += sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            counts[-1] += 1
            sizes |= {anchor: 1} if anchor else {}
            plain = event.style is None and tag is None
            if plain and _OCTAL.fullmatch(event.value):
                yield f"{at}: {event.value} is octal in YAML 1.1: write it without the 0, or '{event.value}' for text"
            if plain and _BASE_60.fullmatch(event.value):
                yield f"{at}: {event.value} is a number in base 60 in YAML 1.1: write '{event.value}' for text"
        if len(counts) > MAX_DEPTH:
            yield f"{at}: more than {MAX_DEPTH} sections or lists inside each other: remove some"
            return
        if sum(counts) > MAX_VALUES:
            yield f"{at}: more than {MAX_VALUES:,} values: remove some"
            return
