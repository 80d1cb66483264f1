"""`ConfigError`, and the error lines that several checks share: arithmetic, and pydantic's errors in our words."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from jaxpar.config.foreign import FOREIGN_KEYS, OPAQUE_SECTIONS
from jaxpar.config.keys import SECTIONS, Section

MAX_LINE, MAX_MESSAGE = 800, 3600  # characters and bytes: a screen
MAX_CHOICES = 40


class ConfigError(Exception):
    """The config is wrong. `problems` has one line for each thing to change; `str()` joins those lines.

    What is longer than a screen is cut: a line in its middle, and after the last line that fits.
    """

    def __init__(self, problems: str | Sequence[str]):
        lines = problems.splitlines() if isinstance(problems, str) else problems
        self.problems = _first_that_fit(list(dict.fromkeys(map(on_a_screen, lines))))
        super().__init__("\n".join(self.problems))


def on_a_screen(line: str, limit: int = MAX_LINE) -> str:
    """The line with escapes in the place of control characters, and without its middle if it is long."""
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    half = limit // 2
    return line if len(line) <= limit else f"{line[:half]} […] {line[-half:]}"


def _first_that_fit(lines: list[str]) -> list[str]:
    sizes = [len(line.encode()) + 1 for line in lines]
    fit = max(1, sum(size <= MAX_MESSAGE for size in accumulate(sizes)))
    return lines[:fit] + ([f"and {len(lines) - fit} more of these"] if fit < len(lines) else [])


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def listed(choices: Sequence[Any]) -> str:
    """The choices; of many, the first ones."""
    return ", ".join([*map(str, choices[:MAX_CHOICES]), *["…"] * (len(choices) > MAX_CHOICES)])


def one_of(choices: Sequence[Any]) -> str:
    return ("choose one of " if len(choices) > 1 else "choose ") + listed(choices)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The most similar name, if any, as the end of "… is unknown"."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def must_divide(key: str, size: int, what: str, total: int, choices: Sequence[int] = ()) -> Iterator[str]:
    """Yields a line if `size` does not divide `total`.

    Args:
      choices: sizes to suggest; default: all divisors of `total`.
    """
    if total % size:
        yield (
            f"{key}: {size} does not divide {what} {total} ({total} / {size} = {round(total / size, 2)}): "
            f"{one_of(choices or divisors(total))}"
        )


def must_be_multiple(key: str, value: int, factors: Sequence[tuple[str, int]]) -> Iterator[str]:
    """Yields a line if `value` is not a multiple of the product of `factors`, given as (name, value) pairs."""
    unit = math.prod(factor for _, factor in factors)
    if value % unit:
        names = " * ".join(name for name, _ in factors)
        numbers = f"{' * '.join(str(factor) for _, factor in factors)} = " if len(factors) > 1 else ""
        below = value // unit * unit
        yield (
            f"{key}: {value} is not a multiple of {names} = {numbers}{unit} ({value} / {unit} = "
            f"{round(value / unit, 2)}): choose {f'{below} or ' if below else ''}{below + unit}"
        )


_LIMITS = {  # pydantic's error type → (its name for the limit, our words)
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def describe_error(error: Any) -> str:
    """One line for one error of pydantic's `ValidationError.errors()`."""
    key, kind, value, context = _dotted(error), error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        meant = _did_you_mean(key)
        return f"{key}: unknown key" + (f": did you mean {meant}?" if meant else ": remove it")
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        return f"{key}: must be {words} {context[name]}, got {value!r}"
    if kind == "value_error":
        return f"{key}: {value!r} {context['error']}"
    expected = {
        "int": "an integer",
        "float": "a number",
        "finite": "a finite number",
        "bool": "True or False",
        "string": "text",
        "list": "a list",
        "dict": "keys with values",
        "model": "a section (keys below it)",
        "literal": f"one of {str(context.get('expected', '')).replace(' or ', ', ')}",
    }.get(kind.split("_")[0])
    return f"{key}: expected {expected}, got {value!r}" if expected else f"{key}: {error['msg']}, got {value!r}"


def suspect_keys(error: Any) -> set[str]:
    """Names of the keys whose value is not what the user meant, given one of pydantic's errors."""
    names = {part for part in error["loc"][-1:] if isinstance(part, str)}
    if error["type"] == "extra_forbidden" and (meant := _did_you_mean(_dotted(error))):
        names.add(meant.rpartition(".")[2])
    return names


def _dotted(error: Any) -> str:
    return ".".join(map(str, error["loc"]))


def _did_you_mean(key: str) -> str:
    """The same name in another section, else the most similar name in its own section; "" if nothing is similar."""
    path, _, name = key.rpartition(".")
    known = [k for top, section in SECTIONS.items() for k in (top, *_known_keys(section, f"{top}."))]
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    if elsewhere:
        return elsewhere[0]
    own = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == path]
    own += FOREIGN_KEYS.get(path, ()) if path else OPAQUE_SECTIONS
    close = difflib.get_close_matches(name, own, n=1)
    return f"{path}.{close[0]}".lstrip(".") if close else ""


def _known_keys(section: type[Section], path: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{path}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _known_keys(field.annotation, f"{path}{name}.")


def read_json(file: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ConfigError: the file cannot be read, is not JSON, or holds no object.
      FileNotFoundError: it does not exist.
    """
    try:
        with file.open(encoding="utf-8") as opened:
            values = json.load(opened)
    except FileNotFoundError:
        raise
    except RecursionError:
        raise ConfigError([f"{where}: {file} cannot be read: it is nested too deep"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{where}: {file} cannot be read: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{where}: {file} cannot be read: it holds no object: {values!r}"])
    return values
