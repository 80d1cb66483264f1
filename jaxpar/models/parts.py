"""A module of Flax, nnx or Linen, as a pure function of its parameters."""

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core import meta

from jaxpar.config import ConfigError
from jaxpar.models.protocol import TokenInfo

Path = tuple[Any, ...]
Flat = dict[Path, Any]
Auxiliary = dict[str, jax.Array]  # outputs of a block beside its activations, by name


class Part:
    """One module, found without making its weights.

    Attributes:
      name: for messages, such as "layers".
      shapes: nested dict of ShapeDtypeStruct, float32.
      names: the same with the names of dimensions that stand on the parameters, or None.
      constants: what the module holds that is neither trained nor random, numpy arrays by path.
    """

    name: str
    shapes: dict[str, Any]
    names: dict[str, Any]
    constants: Mapping[Path, np.ndarray]

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Initial parameters, float32."""
        raise NotImplementedError

    def bind(self, params: Any, info: TokenInfo | None = None) -> Any:
        """The module with these parameters."""
        raise NotImplementedError

    def __call__(self, params: Any, *args: Any, info: TokenInfo | None = None) -> tuple[Any, Auxiliary]:
        """(what the module returns, its auxiliary outputs).

        Args:
          info: says where random numbers come from, and whether this is training.
        """
        raise NotImplementedError

    def differs_in(self, other: "Part") -> str | None:
        """What makes the two different functions of their parameters; None if they are the same."""
        if type(self) is not type(other):
            return "their kind of module"
        if (self.shapes, self.names) != (other.shapes, other.names):
            return "their parameters"
        for path, x in self.constants.items():
            if path not in other.constants or not np.array_equal(x, other.constants[path]):
                return f"the constant {_joined(path)}"
        return self._module_differs_in(other)

    def _module_differs_in(self, other: Any) -> str | None:
        raise NotImplementedError


def part_of(
    name: str,
    build: Callable[[nnx.Rngs], Any],
    examples: tuple[Any, ...],
    arguments: Callable[..., tuple] | None = None,
) -> Part:
    """The part that `build` makes.

    Args:
      examples: shapes that a Linen module needs to make its weights.
      arguments: arrays like the examples → what the module is called with. Default: these arrays.

    Raises:
      ConfigError: the module holds what cannot be trained with.
    """
    module = build_quietly(name, build, jax.random.key(0), abstract=True)
    if isinstance(module, linen.Module):
        return _LinenPart(name, module, examples, arguments or (lambda *args: args))
    return _NnxPart(name, build, module)


def build_quietly(name: str, build: Callable[[nnx.Rngs], Any], key: jax.Array, *, abstract: bool = False) -> Any:
    """The module that `build` makes, with arrays that stand in attributes marked as data."""

    def make() -> Any:
        # Flax would look for mesh axes of these names, but they are names of dimensions.
        with nnx.use_eager_sharding(False):
            module = build(nnx.Rngs(key))
        if isinstance(module, type):
            raise ConfigError(f"model: {name} is the class {module.__name__}: give an instance, {module.__name__}(…)")
        if isinstance(module, linen.Module):
            return module
        if not isinstance(module, nnx.Module):
            raise ConfigError(f"model: {name} is a {type(module).__name__}, and no module of flax.nnx or flax.linen")
        for _, node in nnx.iter_graph(module):
            if isinstance(node, nnx.bridge.ToNNX):  # it keeps its keys, which it needed only to make the weights
                node.to_nnx__rngs = None
                if not nnx.state(node, nnx.Param):
                    raise ConfigError(
                        f"model: {name} is an nnx.bridge.ToNNX without weights: give the Linen module itself, "
                        f"{type(node.to_nnx__module).__name__}(…)"
                    )
            if isinstance(node, nnx.Module):
                _mark_arrays(node)
        return module

    if not abstract:
        return make()
    found: list[Any] = []

    def only_nnx() -> Any:
        module = make()
        found.append(module)
        return None if isinstance(module, linen.Module) else module

    module = nnx.eval_shape(only_nnx)
    return found[0] if module is None else module


def _mark_arrays(node: nnx.Module) -> None:
    """nnx knows an array in an attribute as data, but no array that is being traced."""
    for attribute, value in list(vars(node).items()):
        if attribute.startswith("_pytree__") or isinstance(value, nnx.Variable):
            continue
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            setattr(node, attribute, nnx.data(value))


class _NnxPart(Part):
    def __init__(self, name: str, build: Callable[[nnx.Rngs], Any], module: nnx.Module):
        self.name, self._build = name, build
        split: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
        self._graph, params, random, others = split
        for path, v in nnx.to_flat_state(params):
            if v.get_metadata().get("linen_meta_type") is linen.Partitioned:
                raise _names_mesh_axes(name, path)
        _refuse_statistics(
            name, [(path, type(v).__name__) for path, v in nnx.to_flat_state(others) if isinstance(v, nnx.BatchStat)]
        )
        self._random: Flat = {path: v.get_raw_value() for path, v in nnx.to_flat_state(random)}
        if name == "head" and self._random:
            raise ConfigError(
                f"model: the head holds a stream of random numbers, {_joined(next(iter(self._random)))}: only the embedding and "
                f"the blocks draw numbers, because each stage computes the head for a share of the tokens"
            )
        self.shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), nnx.to_pure_dict(params))
        named = {path: v.get_metadata().get("out_sharding") for path, v in nnx.to_flat_state(params)}
        self.names = nnx.traversals.unflatten_mapping(named)
        self.constants = _constants(name, self._others) if len(nnx.to_flat_state(others)) else {}

    def _others(self, key: jax.Array) -> Flat:
        split: Any = nnx.split(build_quietly(self.name, self._build, key), nnx.Param, nnx.RngState, ...)
        return {path: _raw(v) for path, v in nnx.to_flat_state(split[3])}

    def init(self, key: jax.Array) -> dict[str, Any]:
        params = nnx.to_pure_dict(nnx.state(build_quietly(self.name, self._build, key), nnx.Param))
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
        before = {path: _raw(v) for path, v in nnx.to_flat_state(nnx.state(module)) if path in self.constants}
        known = {path for path, _ in nnx.to_flat_state(nnx.state(module))}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using 'Module.sow", DeprecationWarning)  # its values are read below
            output = module(*args)
        sown: list[tuple[str, Any]] = []
        for path, v in nnx.to_flat_state(nnx.state(module)):
            if path not in known and isinstance(_raw(v), tuple):
                sown += [(str(path[-1]), value) for value in _raw(v)]
            elif path not in known or _raw(v) is not before.get(path, _raw(v)):
                raise _changes_state(self.name, path, type(v).__name__)
        return output, _added_up(sown)

    def _module_differs_in(self, other: Any) -> str | None:
        a, b = self._graph, other._graph
        if [name for name, _ in a.attributes] != [name for name, _ in b.attributes] or a.nodes != b.nodes:
            return "what they are built of"
        pairs = zip(a.attributes, b.attributes, strict=True)
        found = (name for (name, x), (_, y) in pairs if not alike(getattr(x, "value", x), getattr(y, "value", y)))
        return next((f"the attribute {name}" for name in found), None)


class _LinenPart(Part):
    def __init__(self, name: str, module: linen.Module, examples: tuple[Any, ...], arguments: Callable[..., tuple]):
        self.name, self._module, self._examples, self._arguments = name, module, examples, arguments
        variables = jax.eval_shape(self._variables, jax.random.key(0), *examples)
        boxed = variables.pop("params", {})
        is_box = lambda x: isinstance(x, meta.AxisMetadata)  # noqa: E731
        flat = nnx.traversals.flatten_mapping(boxed, is_leaf=lambda _, x: is_box(x))
        for path, x in flat.items():
            if type(x) is linen.Partitioned:
                raise _names_mesh_axes(name, path)
        self.shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), _unboxed(boxed))
        self.names = nnx.traversals.unflatten_mapping({path: getattr(x, "names", None) for path, x in flat.items()})
        _refuse_statistics(name, [(("batch_stats",), "batch_stats")] if "batch_stats" in variables else [])
        self.constants = _constants(name, self._others) if self._without_sown(variables) else {}

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
                raise _changes_state(self.name, path, str(path[0]))
        return output, _added_up(sown)

    def _module_differs_in(self, other: Any) -> str | None:
        a, b = self._module, other._module
        if type(a) is not type(b):
            return "their classes"
        fields = [one.name for one in dataclasses.fields(a) if one.name not in ("parent", "name")]
        found = (name for name in fields if not alike(getattr(a, name), getattr(b, name)))
        return next((f"the attribute {name}" for name in found), None)


def _joined(path: Path) -> str:
    return "/".join(map(str, path))


def _raw(v: Any) -> Any:
    return v.get_raw_value() if isinstance(v, nnx.Variable) else v


def alike(x: Any, y: Any) -> bool:
    """Whether two static values are the same for a computation. Functions that are made anew for each block are compared by
    what they are made of."""
    if isinstance(x, functools.partial) and isinstance(y, functools.partial):
        return all(
            map(alike, (x.func, x.args, sorted(x.keywords.items())), (y.func, y.args, sorted(y.keywords.items())))
        )
    if isinstance(x, FunctionType) and isinstance(y, FunctionType) and x is not y:
        inside = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (x, y)]
        return x.__code__ == y.__code__ and alike(x.__defaults__, y.__defaults__) and alike(*inside)
    if isinstance(x, tuple | list) and type(x) is type(y):
        return len(x) == len(y) and all(map(alike, x, y))
    try:
        return bool(x == y)
    except (TypeError, ValueError):  # arrays, and what cannot be compared
        return x is y


def _unboxed(tree: Any) -> Any:
    is_box = lambda x: isinstance(x, meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def _added_up(sown: list[tuple[str, Any]]) -> Auxiliary:
    """Values of one name are added: those of several modules of a block."""
    total: Auxiliary = {}
    for name, value in sown:
        total[name] = total[name] + value if name in total else value
    return total


def _random_key(path: Path, info: TokenInfo | None) -> jax.Array:
    number = zlib.crc32(_joined(path).encode())  # streams of one module differ
    if info is None or info.random is None:  # nothing is drawn from it
        return jax.random.fold_in(jax.random.key(0), number)
    return info.random.fold_in(np.uint32(number)).key


def _constants(part: str, others: Callable[[jax.Array], Flat]) -> dict[Path, np.ndarray]:
    """The values of what a module holds besides parameters. XLA drops the making of the weights."""
    both = jax.jit(lambda a, b: (others(a), others(b)))(jax.random.key(0), jax.random.key(1))
    first, second = jax.tree.map(np.asarray, both)
    for path, x in first.items():
        if not np.array_equal(x, second[path], equal_nan=x.dtype.kind == "f"):
            raise ConfigError(
                f"model: {part}/{_joined(path)} is random, and no nnx.Param: it would be neither saved nor restored. Make it an "
                f"nnx.Param, or make it of a fixed key"
            )
    return first


def _names_mesh_axes(part: str, path: Path) -> ConfigError:
    return ConfigError(
        f"model: {part}/{_joined(path)} names its dimensions with flax.linen.with_partitioning, whose names are mesh axes: use "
        f"flax.linen.with_logical_partitioning, or give `dims`"
    )


def _refuse_statistics(part: str, found: list[tuple[Path, str]]) -> None:
    if found:
        names = ", ".join(f"{_joined(path)} ({kind})" for path, kind in found)
        raise ConfigError(
            f"model: {part} holds running statistics: {names}. They are not supported: only parameters are trained and saved. "
            f"Use a normalization without them, such as LayerNorm or RMSNorm"
        )


def _changes_state(part: str, path: Path, kind: str) -> ConfigError:
    return ConfigError(
        f"model: {part} changes {_joined(path)} ({kind}) when it is called, and the change would be lost: only parameters are "
        f"trained and saved. Return it, or sow it, as an auxiliary output"
    )
