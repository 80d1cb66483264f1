"""A module of Flax as a pure function of its parameters: what nnx and Linen have in common."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxpar.config import ConfigError
from jaxpar.models.protocol import TokenInfo

Path = tuple[Any, ...]
Flat = dict[Path, Any]
Auxiliary = dict[str, jax.Array]  # outputs of a block beside its activations, by name


class Part(ABC):
    """One module, found without making its weights.

    Attributes:
      name: for messages, such as "layers".
      shapes: nested dict of ShapeDtypeStruct, float32.
      names: the same with the names of dimensions that stand on the parameters, or None.
      variables: what filters of nnx are asked about, by path: the parameter's `nnx.Variable`. Of Linen none.
      constants: what the module holds that is neither trained nor random, numpy arrays by path.
    """

    name: str
    shapes: dict[str, Any]
    names: dict[str, Any]
    variables: Mapping[Path, Any] = MappingProxyType({})
    constants: Mapping[Path, np.ndarray]

    @abstractmethod
    def init(self, key: jax.Array) -> dict[str, Any]:
        """Initial parameters, float32."""

    @abstractmethod
    def bind(self, params: Any, info: TokenInfo | None = None) -> Any:
        """The module with these parameters."""

    @abstractmethod
    def __call__(self, params: Any, *args: Any, info: TokenInfo | None = None) -> tuple[Any, Auxiliary]:
        """(what the module returns, its auxiliary outputs).

        Args:
          info: says where random numbers come from, and whether this is training.
        """

    def differs_in(self, other: "Part") -> str | None:
        """What makes the two different functions of their parameters; None if they are the same."""
        if type(self) is not type(other):
            return "their kind of module"
        if (self.shapes, self.names) != (other.shapes, other.names):
            return "their parameters"
        for path, x in self.constants.items():
            y = other.constants.get(path)
            if y is None or x.dtype != y.dtype or not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
                return f"the constant {joined(path)}"
        return self._module_differs_in(other)

    @abstractmethod
    def _module_differs_in(self, other: Any) -> str | None:
        """The same of two modules of one kind, with the same parameters and constants."""


def joined(path: Path) -> str:
    return "/".join(map(str, path))


def alike(x: Any, y: Any) -> bool:
    """Whether two static values are the same for a computation. Functions that are made anew for each block are compared by
    what they are made of."""
    if isinstance(x, functools.partial) and isinstance(y, functools.partial):
        return alike((x.func, x.args, x.keywords), (y.func, y.args, y.keywords))
    if isinstance(x, FunctionType) and isinstance(y, FunctionType) and x is not y:
        inside = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (x, y)]
        defaults = alike(x.__defaults__, y.__defaults__) and alike(x.__kwdefaults__, y.__kwdefaults__)
        return x.__code__ == y.__code__ and defaults and alike(*inside)
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(alike(value, y[name]) for name, value in x.items())
    if isinstance(x, tuple | list) and type(x) is type(y):
        return len(x) == len(y) and all(map(alike, x, y))
    try:
        return bool(x == y)
    except (TypeError, ValueError):  # arrays, and what cannot be compared
        return x is y


def added_up(sown: list[tuple[str, Any]]) -> Auxiliary:
    """Values of one name are added: those of several modules of a block."""
    total: Auxiliary = {}
    for name, value in sown:
        total[name] = total[name] + value if name in total else value
    return total


def constants_of(part: str, others: Callable[[jax.Array], Flat]) -> dict[Path, np.ndarray]:
    """The values of what a module holds besides parameters. XLA drops the making of the weights."""
    both = jax.jit(lambda a, b: (others(a), others(b)))(jax.random.key(0), jax.random.key(1))
    first, second = jax.tree.map(np.asarray, both)
    for path, x in first.items():
        if not np.array_equal(x, second[path], equal_nan=x.dtype.kind == "f"):
            raise ConfigError(
                f"model: {part}/{joined(path)} is random, and no nnx.Param: it would be neither saved nor restored. Make it an "
                f"nnx.Param, or make it of a fixed key"
            )
    return first


def names_mesh_axes(part: str, path: Path) -> ConfigError:
    return ConfigError(
        f"model: {part}/{joined(path)} names its dimensions with flax.linen.with_partitioning, whose names are mesh axes: use "
        f"flax.linen.with_logical_partitioning, or give `dims`"
    )


def refuse_statistics(part: str, found: list[tuple[Path, str]]) -> None:
    if found:
        names = ", ".join(f"{joined(path)} ({kind})" for path, kind in found)
        raise ConfigError(
            f"model: {part} holds running statistics: {names}. They are not supported: only parameters are trained and saved. "
            f"Use a normalization without them, such as LayerNorm or RMSNorm"
        )


def changes_state(part: str, path: Path, kind: str) -> ConfigError:
    return ConfigError(
        f"model: {part} changes {joined(path)} ({kind}) when it is called, and the change would be lost: only parameters are "
        f"trained and saved. Return it, or sow it, as an auxiliary output"
    )
