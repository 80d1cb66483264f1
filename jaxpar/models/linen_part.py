"""A module of Linen as a `Part`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core import meta

from jaxpar.models.parts import (
    Auxiliary,
    Flat,
    Part,
    added_up,
    alike,
    changes_state,
    constants_of,
    names_mesh_axes,
    refuse_statistics,
)
from jaxpar.models.protocol import TokenInfo


class LinenPart(Part):
    """Args: `examples` and `arguments`, as in `jaxpar.models.part_of`."""

    def __init__(self, name: str, module: linen.Module, examples: tuple[Any, ...], arguments: Callable[..., tuple]):
        self.name, self._module, self._examples, self._arguments = name, module, examples, arguments
        variables = jax.eval_shape(self._variables, jax.random.key(0), *examples)
        boxed = variables.pop("params", {})
        is_box = lambda x: isinstance(x, meta.AxisMetadata)  # noqa: E731
        flat = nnx.traversals.flatten_mapping(boxed, is_leaf=lambda _, x: is_box(x))
        for path, x in flat.items():
            if type(x) is linen.Partitioned:
                raise names_mesh_axes(name, path)
        self.shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), _unboxed(boxed))
        self.names = nnx.traversals.unflatten_mapping({path: getattr(x, "names", None) for path, x in flat.items()})
        refuse_statistics(name, [(("batch_stats",), "batch_stats")] if "batch_stats" in variables else [])
        self.constants = constants_of(name, self._others) if self._without_sown(variables) else {}

    def _variables(self, key: jax.Array, *examples: Any) -> dict[str, Any]:
        return dict(self._module.init(key, *self._arguments(*examples)))

    def _initial(self, key: jax.Array) -> dict[str, Any]:
        return self._variables(key, *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._examples))

    def _others(self, key: jax.Array) -> Flat:
        variables = self._initial(key)
        variables.pop("params", None)
        return self._without_sown(variables)

    @staticmethod
    def _without_sown(variables: dict[str, Any]) -> Flat:
        """Arrays by path. What a module sows is a tuple."""
        flat = nnx.traversals.flatten_mapping(_unboxed(variables))
        return {path: x for path, x in flat.items() if not isinstance(x, tuple)}

    def init(self, key: jax.Array) -> dict[str, Any]:
        return jax.tree.map(lambda x: x.astype(jnp.float32), _unboxed(self._initial(key).get("params", {})))

    def _all(self, params: Any) -> dict[str, Any]:
        constants = {path: jnp.asarray(x) for path, x in self.constants.items()}
        return {"params": params, **nnx.traversals.unflatten_mapping(constants)}

    def bind(self, params: Any, info: TokenInfo | None = None) -> Any:
        return self._module.bind(self._all(params))

    def __call__(self, params: Any, *args: Any, info: TokenInfo | None = None) -> tuple[Any, Auxiliary]:
        rngs = {"params": info.random.key} if info is not None and info.train and info.random is not None else None
        variables = self._all(params)
        output, after = self._module.apply(variables, *args, rngs=rngs, mutable=True)
        before = nnx.traversals.flatten_mapping(variables)
        sown: list[tuple[str, Any]] = []
        for path, x in nnx.traversals.flatten_mapping(_unboxed(dict(after))).items():
            if isinstance(x, tuple):
                sown += [(str(path[-1]), value) for value in x]
            elif path[0] != "params" and x is not before.get(path):
                raise changes_state(self.name, path, str(path[0]))
        return output, added_up(sown)

    def _module_differs_in(self, other: Any) -> str | None:
        a, b = self._module, other._module
        if type(a) is not type(b):
            return "their classes"
        fields = [one.name for one in dataclasses.fields(a) if one.name not in ("parent", "name")]
        found = (name for name in fields if not alike(getattr(a, name), getattr(b, name)))
        return next((f"the attribute {name}" for name in found), None)


def _unboxed(tree: Any) -> Any:
    is_box = lambda x: isinstance(x, meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)
