"""A module of nnx as a `Part`."""

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxpar.config import ConfigError
from jaxpar.models.parts import (
    Auxiliary,
    Flat,
    Part,
    Path,
    added_up,
    alike,
    changes_state,
    constants_of,
    joined,
    names_mesh_axes,
    refuse_statistics,
)
from jaxpar.models.protocol import TokenInfo

Build = Callable[[nnx.Rngs], Any]


class NnxPart(Part):
    """Args: `module`, what `build` makes, with shapes for arrays."""

    def __init__(self, name: str, build: Build, module: nnx.Module):
        self.name, self._build = name, build
        self._graph, params, random, others = _split(module)
        self.variables = dict(nnx.to_flat_state(params))
        for path, v in self.variables.items():
            if v.get_metadata().get("linen_meta_type") is linen.Partitioned:
                raise names_mesh_axes(name, path)
        flat = nnx.to_flat_state(others)
        refuse_statistics(name, [(path, type(v).__name__) for path, v in flat if isinstance(v, nnx.BatchStat)])
        self._random: Flat = {path: _raw(v) for path, v in nnx.to_flat_state(random)}
        if name == "head" and self._random:
            raise ConfigError(
                f"model: the head holds a stream of random numbers, {joined(next(iter(self._random)))}: only the embedding and "
                f"the blocks draw numbers, because each stage computes the head for a share of the tokens"
            )
        self.shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), nnx.to_pure_dict(params))
        named = {path: v.get_metadata().get("out_sharding") for path, v in self.variables.items()}
        self.names = nnx.traversals.unflatten_mapping(named)
        self.constants = constants_of(name, self._others) if len(flat) else {}

    def _others(self, key: jax.Array) -> Flat:
        return {path: _raw(v) for path, v in nnx.to_flat_state(_split(build_module(self.name, self._build, key))[3])}

    def init(self, key: jax.Array) -> dict[str, Any]:
        params = nnx.to_pure_dict(nnx.state(build_module(self.name, self._build, key), nnx.Param))
        return jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def bind(self, params: Any, info: TokenInfo | None = None) -> Any:
        module = nnx.merge(self._graph, nnx.State(params), *self._held(info))
        if info is not None and not info.train:
            module.set_attributes(deterministic=True, use_running_average=True, raise_if_not_found=False)
        return module

    def _held(self, info: TokenInfo | None) -> list[nnx.State]:
        """What the module holds besides parameters: constants, and keys of this layer, step and place."""
        held: Flat = {path: jnp.asarray(x) for path, x in self.constants.items()}
        for path, shape in self._random.items():
            if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
                held[path] = _random_key(path, info)
            else:
                held[path] = jnp.zeros(shape.shape, shape.dtype)  # how often the key was used
        return [nnx.State(nnx.traversals.unflatten_mapping(held))] if held else []

    def __call__(self, params: Any, *args: Any, info: TokenInfo | None = None) -> tuple[Any, Auxiliary]:
        module = self.bind(params, info)
        before = {path: _raw(v) for path, v in nnx.to_flat_state(nnx.state(module))}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using 'Module.sow", DeprecationWarning)  # its values are read below
            output = module(*args)
        sown: list[tuple[str, Any]] = []
        for path, v in nnx.to_flat_state(nnx.state(module)):
            if path not in before and isinstance(_raw(v), tuple):
                sown += [(str(path[-1]), value) for value in _raw(v)]
            elif path not in self._random and _raw(v) is not before.get(path):
                raise changes_state(self.name, path, type(v).__name__)
        return output, added_up(sown)

    def _module_differs_in(self, other: Any) -> str | None:
        a, b = self._graph, other._graph
        if [name for name, _ in a.attributes] != [name for name, _ in b.attributes] or a.nodes != b.nodes:
            return "what they are built of"
        pairs = zip(a.attributes, b.attributes, strict=True)
        found = (name for (name, x), (_, y) in pairs if not alike(getattr(x, "value", x), getattr(y, "value", y)))
        return next((f"the attribute {name}" for name in found), None)


def build_module(name: str, build: Build, key: jax.Array) -> Any:
    """The module of nnx or Linen that a user's function makes, inside a trace.

    Raises:
      ConfigError: it is no module, or one that cannot be taken. `name` is for the message.
    """
    with nnx.use_eager_sharding(
        False
    ):  # Flax would look for mesh axes of these names, but they are names of dimensions
        module = build(nnx.Rngs(key))
    if isinstance(module, type):
        raise ConfigError(f"model: {name} is the class {module.__name__}: give an instance, {module.__name__}(…)")
    if isinstance(module, linen.Module):
        return module
    if not isinstance(module, nnx.Module):
        raise ConfigError(f"model: {name} is a {type(module).__name__}, and no module of flax.nnx or flax.linen")
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.bridge.ToNNX):
            node.to_nnx__rngs = None  # keys that it needed only to make the weights
            if not nnx.state(node, nnx.Param):
                raise ConfigError(
                    f"model: {name} is an nnx.bridge.ToNNX without weights: give the Linen module itself, "
                    f"{type(node.to_nnx__module).__name__}(…)"
                )
        if isinstance(node, nnx.Module):
            _mark_arrays(node)
    return module


def _mark_arrays(node: nnx.Module) -> None:
    """nnx knows an array in an attribute as data, but no array that is being traced."""
    for attribute, value in list(vars(node).items()):
        if attribute.startswith("_pytree__") or isinstance(value, nnx.Variable):
            continue
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            setattr(node, attribute, nnx.data(value))


def _split(module: nnx.Module) -> Any:
    """(graph, parameters, random streams, all else)."""
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


def _raw(v: Any) -> Any:
    return v.get_raw_value() if isinstance(v, nnx.Variable) else v


def _random_key(path: Path, info: TokenInfo | None) -> jax.Array:
    number = zlib.crc32(joined(path).encode())  # streams of one module differ
    if info is None or info.random is None:  # nothing is drawn from it
        return jax.random.fold_in(jax.random.key(0), number)
    return info.random.fold_in(np.uint32(number)).key
