"""The types of values in a config file: what each accepts, and its bounds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field


def _number(value: Any) -> Any:
    """Accepts text that is a number: YAML 1.1 reads 2e-05 as text (it wants 2.0e-05), and quotes make text too."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path | int | float) and not isinstance(value, bool) else value


def _printable(value: str) -> str:
    """Refuses what no path, name or environment variable may hold."""
    if not value.isprintable():
        raise ValueError("has a character that cannot be printed: remove it")
    return value


def _flag(value: Any) -> Any:
    if not isinstance(value, str | bool | int):
        raise ValueError("is no value of a flag: give text, an integer, True or False")
    return _printable(value) if isinstance(value, str) else value


def _path(value: str) -> str:
    """Refuses a `~name` that is no user, so that `expanduser` cannot fail later, and what is too long for a file system."""
    try:
        parts = Path(value).expanduser().parts
    except RuntimeError:
        raise ValueError("there is no such user: write the folder's path") from None
    if len(os.fsencode(value)) > 4000 or any(len(os.fsencode(part)) > 255 for part in parts):
        raise ValueError("is too long for a path: shorten it")
    return value


def _name(value: str) -> str:
    """Refuses a name whose folder is not inside output_dir."""
    if value.startswith("~") or not (parts := Path(value).parts) or ".." in parts or Path(value).is_absolute():
        raise ValueError("is no folder inside runner.output_dir: give a name, such as llama3 or llama3/first")
    return value


def _in_float32(value: float) -> float:
    """Refuses what would be 0 or infinite in float32."""
    if value and not 1e-30 <= abs(value) <= 1e30:
        raise ValueError("cannot be meant: give a number between 1e-30 and 1e30")
    return value


def _precision(value: Any) -> Any:
    """Accepts the spellings of the three precisions in RLinf's files, torch and Lightning."""
    name = str(value).removeprefix("torch.")
    aliases = {
        "bf16-mixed": "bf16",
        "bfloat16": "bf16",
        "16": "fp16",
        "16-mixed": "fp16",
        "float16": "fp16",
        "half": "fp16",
        "32": "fp32",
        "32-true": "fp32",
        "float32": "fp32",
        "float": "fp32",
    }
    return aliases.get(name, name)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


# Bounds that no run comes near keep sums and products in 64 bits, and a mistyped size an error instead of a long wait.
Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
Width = Annotated[int, Field(gt=0, le=2**22)]  # of a matrix
NonNegative = Annotated[int, Field(ge=0, le=2**32 - 1)]
Interval = Annotated[int, Field(ge=-1, le=2**31 - 1)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False), AfterValidator(_in_float32)]
Number = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False), AfterValidator(_in_float32)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False), AfterValidator(_in_float32)]
Rate = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1000)]
Beta = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Printable = Annotated[str, AfterValidator(_printable)]
Flag = Annotated[Any, AfterValidator(_flag)]  # not a union, whose errors would name its members
Text = Annotated[Printable, BeforeValidator(_text)]
UserPath = Annotated[Text, AfterValidator(_path)]
AsList = BeforeValidator(_as_list)  # one value for a list of one
Paths = Annotated[list[UserPath], AsList]
Texts = Annotated[list[Text], AsList]
Precision = Annotated[Literal["bf16", "fp16", "fp32"], BeforeValidator(_precision)]
Name = Annotated[UserPath, AfterValidator(_name)]  # of a folder in output_dir
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
