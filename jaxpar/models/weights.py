"""Fills a model's parameters from any source. Each device gets its own part of each, and only that is read."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.config import ConfigError
from jaxpar.config.errors import did_you_mean
from jaxpar.models.protocol import Params

Bounds = tuple[tuple[int, int], ...]  # start and stop in each dimension
# (name of a parameter, number of the layer or None, slices of its dimensions without that of the layers) → that part
ReadPart = Callable[[str, int | None, tuple[slice, ...]], np.ndarray]
Source = Mapping[str, Any] | Callable[[str], Any]

_LAYERS = "layers/"  # prefix of the names of parameters that have all layers, [num_layers, ...]


class Problems:
    """Lines for a ConfigError: one for the same problem in several layers.

    Args:
      where: the beginning of each line.
    """

    def __init__(self, where: str):
        self._where = where
        self._found: dict[tuple[str, str], list[str]] = {}  # (name with * for the layer, problem) → names

    def report(self, name: str, problem: str) -> None:
        names = self._found.setdefault((re.sub(r"(?<=[./])\d+(?=[./])", "*", name), problem), [])
        if name not in names:
            names.append(name)

    @property
    def lines(self) -> list[str]:
        return [
            f"{self._where}: {names[0]}{f' (and {len(names) - 1} more layers)' if names[1:] else ''} {problem}"
            for (_, problem), names in self._found.items()
        ]

    def check(self) -> None:
        """Raises ConfigError if there are any."""
        if self._found:
            raise ConfigError(self.lines)


def named_params(tree: Any) -> dict[str, Any]:
    """name → leaf, with names such as layers/attention/query."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def fill_params(shapes: Params, shardings: Params, read: ReadPart) -> Params:
    """Arrays, made of the parts that this process's devices need.

    Layers are read one after the other, and a part that several devices hold is read once. The host holds the shards of
    one parameter at most, and of these only the ones with the same layers.

    Args:
      shapes: like `FunctionalModel.shapes`; layers are stacked, [num_layers, ...]. They say the dtypes.
      shardings: the same tree with a `jax.sharding.Sharding` at each leaf.
      read: returns one part of a parameter, in any float dtype.
    """
    named = zip(named_params(shapes).items(), jax.tree.leaves(shardings), strict=True)
    arrays = [_fill_one(name, leaf, sharding, read) for (name, leaf), sharding in named]
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def given_params(source: Source, shapes: Params, shardings: Params, period: int = 1) -> Params:
    """The parameters that a user gives, on the mesh. The user's own arrays stay valid.

    Args:
      source: a tree like `shapes`, of numpy or jax arrays; or a function of a path, such as layers/3/attention/query,
        embed/table or head/weight, that returns this parameter, of one layer where the path has one. It is called once
        for each parameter and layer that this process's devices hold. Any float dtype.
      shapes, shardings: as in `fill_params`.
      period: number of blocks in the model's pattern, see `FunctionalModel`.

    Raises:
      ConfigError: names, shapes or dtypes are wrong. All problems are reported at once.
    """
    if not callable(source):
        check_params(source, shapes)
        tree = named_params(source)
        named = zip(named_params(shapes).items(), jax.tree.leaves(shardings), strict=True)
        arrays = [_copy(name, tree[name], leaf, sharding) for (name, leaf), sharding in named]
        return jax.tree.unflatten(jax.tree.structure(shapes), arrays)
    function = _Function(source, shapes, period)
    params = fill_params(shapes, shardings, function.read)
    function.problems.check()
    return params


def check_params(tree: Mapping[str, Any], shapes: Params) -> None:
    """Raises ConfigError with every difference between a tree of arrays and the model's parameters."""
    problems, given, expected = Problems("params"), named_params(tree), named_params(shapes)
    for name in given.keys() - expected.keys():
        problems.report(name, f"is unknown{did_you_mean(name, sorted(expected))}: the model has no such parameter")
    for name, leaf in expected.items():
        if name not in given:
            problems.report(name, f"{list(leaf.shape)} is missing")
        else:
            for problem in _array_problems(given[name], leaf.shape):
                problems.report(name, problem)
    problems.check()


def _array_problems(value: Any, shape: tuple[int, ...]) -> Iterator[str]:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        yield f"is a {type(value).__name__}, expected an array {list(shape)}"
    elif tuple(value.shape) != tuple(shape):
        yield f"is {list(value.shape)}, expected {list(shape)}"
    elif not jnp.issubdtype(value.dtype, jnp.floating):
        yield f"is {value.dtype}, expected a float dtype"


class _Function:
    """Parts of what a user's function returns. Keeps the last whole parameter, because other devices need parts of it."""

    def __init__(self, function: Callable[[str], Any], shapes: Params, period: int):
        self._function, self._period, self.problems = function, period, Problems("params")
        self._shapes = {name: leaf.shape for name, leaf in named_params(shapes).items()}
        self._last: tuple[str, np.ndarray | None] = ("", None)

    def read(self, name: str, layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        path = name if layer is None else self._of_layer(name.removeprefix(_LAYERS), layer)
        shape = self._shapes[name] if layer is None else self._shapes[name][1:]
        if path != self._last[0]:
            self._last = ("", None)  # so that two are never held
            self._last = (path, self._whole(path, shape))
        whole = self._last[1]
        return np.zeros([part.stop - part.start for part in index], np.float32) if whole is None else whole[index]

    def _of_layer(self, name: str, index: int) -> str:
        if self._period == 1:
            return f"{_LAYERS}{index}/{name}"
        place, rest = name.split("/", 1)
        return f"{_LAYERS}{index * self._period + int(place)}/{rest}"

    def _whole(self, path: str, shape: tuple[int, ...]) -> np.ndarray | None:
        try:
            value = self._function(path)
        except KeyError:
            self.problems.report(path, f"{list(shape)} is missing: the function raised KeyError")
            return None
        found = list(_array_problems(value, shape))
        for problem in found:
            self.problems.report(path, problem)
        return None if found else np.asarray(value)


def _copy(name: str, value: Any, leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
    if isinstance(value, jax.Array):
        if value.sharding.device_set == sharding.device_set:  # not through the host
            return jax.device_put(value.astype(leaf.dtype), sharding, may_alias=False)
        if not value.is_fully_addressable:
            raise ConfigError(
                f"params: {name} is on devices of several processes, but not on those of this run: give a function of "
                f"a path that returns numpy arrays"
            )

    def read(_: str, layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        one = value if layer is None else value[layer]
        return (np.asarray(one) if isinstance(one, jax.Array) else one)[index]

    return _fill_one(name, leaf, sharding, read)


def _fill_one(name: str, leaf: jax.ShapeDtypeStruct, sharding: Any, read: ReadPart) -> jax.Array:
    layered, shape = name.startswith(_LAYERS), leaf.shape
    places: dict[Bounds, dict[Bounds, list[jax.Device]]] = {}  # its layers, its part of each → devices
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        layers, rest = (bounds[:1], bounds[1:]) if layered else ((), bounds)
        places.setdefault(layers, {}).setdefault(rest, []).append(device)
    arrays = []
    for layers, parts in places.items():
        for bounds, shard in _shards(name, layers, list(parts), read, leaf.dtype):
            arrays += [jax.device_put(shard, device) for device in parts[bounds]]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _shards(
    name: str, layers: Bounds, parts: list[Bounds], read: ReadPart, dtype: Any
) -> Iterator[tuple[Bounds, np.ndarray]]:
    """Several parts of the same layers; `layers` is () for a parameter that has none."""
    index = {bounds: tuple(slice(*bound) for bound in bounds) for bounds in parts}
    if not layers:
        yield from ((bounds, np.array(read(name, None, index[bounds]), dtype)) for bounds in parts)
        return
    ((start, stop),) = layers
    shards = {bounds: np.empty((stop - start, *(b - a for a, b in bounds)), dtype) for bounds in parts}
    for layer in range(start, stop):
        for bounds, shard in shards.items():
            shard[layer - start] = read(name, layer, index[bounds])
    yield from shards.items()
