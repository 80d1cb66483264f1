"""What a user gives for a part of a model → a `Part`."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx

from jaxpar.models.linen_part import LinenPart
from jaxpar.models.nnx_part import Build, NnxPart, build_module
from jaxpar.models.parts import Part


def part_of(
    name: str, build: Build, examples: tuple[Any, ...], arguments: Callable[..., tuple] = lambda *arrays: arrays
) -> Part:
    """The part that `build` makes.

    Args:
      examples: shapes that a Linen module needs to make its weights.
      arguments: arrays like the examples → what the module is called with.

    Raises:
      ConfigError: the module holds what cannot be trained with.
    """
    built: list[Any] = []

    def nnx_or_nothing() -> Any:
        built.append(build_module(name, build, jax.random.key(0)))
        return None if isinstance(built[0], linen.Module) else built[0]

    module = nnx.eval_shape(nnx_or_nothing)
    return LinenPart(name, built[0], examples, arguments) if module is None else NnxPart(name, build, module)
