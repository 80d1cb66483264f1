"""Names of parameters' dimensions that do not stand on the parameters: by path, or through a table of other names."""

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax

from jaxpar.config import ConfigError

Names = tuple[str | None, ...]


def named_dimensions(
    shapes: Mapping[str, Any],
    own: Mapping[str, Any],
    dims: Mapping[str, Names] | None,
    names: Mapping[str, str | None] | None,
) -> dict[str, Any]:
    """The dimension names of each parameter.

    Args:
      shapes: the parameters of one module of each part, {"embed", "layers", "head"}, layers not stacked.
      own: the same tree with the names that stand on the parameters, or None.
      dims, names: as in `jaxpar.models.Stack`.

    Raises:
      ConfigError: a pattern or name fits no parameter, or a parameter has another number of dimensions.
    """
    flat_shapes, tree = jax.tree_util.tree_flatten_with_path(shapes)
    found_names = jax.tree.leaves(own, is_leaf=lambda x: x is None or isinstance(x, tuple))
    names, problems = names or {}, []
    used: set[str] = set()
    for found in found_names:
        used.update(name for name in found or () if name in names)
    result = [found and tuple(names.get(name, name) for name in found) for found in found_names]
    if unused := sorted(names.keys() - used):
        problems.append(f"model: names: {', '.join(map(repr, unused))} stands on no parameter")
    matched = set()
    every = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat_shapes]
    for i, (text, (_, shape)) in enumerate(zip(every, flat_shapes, strict=True)):
        pattern = next((p for p in dims or {} if fnmatchcase(text, p)), None)
        if pattern is None:
            continue
        matched.add(pattern)
        result[i] = given = tuple((dims or {})[pattern])
        if len(given) != len(shape.shape):
            problems.append(
                f"model: dims: {pattern!r} gives {len(given)} names {given}, but {text} {list(shape.shape)} has "
                f"{len(shape.shape)} dimensions"
                + " (blocks leave out the dimension of layers)"
                * text.startswith("layers/")
            )
    for pattern in dims or {}:
        if pattern not in matched:
            earlier = [p for p in matched if any(fnmatchcase(text, p) and fnmatchcase(text, pattern) for text in every)]
            close = difflib.get_close_matches(pattern, every, 1, 0)
            why = (
                f"all that it fits is taken by {earlier[0]!r} before it" if earlier else "no parameter has such a path"
            )
            problems.append(
                f"model: dims: {pattern!r}: {why}" + (f", such as {close[0]}" if close and not earlier else "")
            )
    if problems:
        raise ConfigError(problems)
    return jax.tree.unflatten(tree, result)
