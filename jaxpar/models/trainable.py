"""Which parameters are trained: by their paths, or by a filter of nnx. The others are frozen."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
from flax import nnx

from jaxpar.config import ConfigError
from jaxpar.config.errors import did_you_mean
from jaxpar.models.functional import FunctionalModel
from jaxpar.models.parts import Part, Path, joined

Trainable = str | Sequence[str] | type[nnx.Variable] | Callable[[Path, Any], bool]
MOST_NAMES = 12  # in a message


def trained_mask(model: FunctionalModel, trainable: Trainable, where: str) -> Any:
    """A tree like `model.shapes`, with True at the parameters that are trained.

    Args:
      trainable: a pattern, or several, of paths as `jaxpar mesh` lists them, such as "head/*" or "*/norm/scale" (`fnmatch`).
        Or a filter of nnx: a type of variable, such as `nnx.LoRAParam`, or a function (path, variable) → bool, such as
        `nnx.Not(nnx.PathContains("embed"))`. A path in it begins with "embed", "layers" or "head".
      where: the beginning of messages.

    Raises:
      ConfigError: a pattern fits no parameter, or nothing is trained.
    """
    paths: dict[Path, Any] = {}  # of all parameters → what a filter is asked about

    def walk(tree: Any, prefix: Path) -> None:
        for name, below in tree.items():
            if not isinstance(below, Part):
                walk(below, (*prefix, name))
                continue
            for path, leaf in nnx.traversals.flatten_mapping(below.shapes).items():
                paths[(*prefix, name, *path)] = below.variables.get(path, leaf)

    walk(model.parts, ())
    names = {joined(path): path for path in paths}
    if isinstance(trainable, str) or (isinstance(trainable, Sequence) and all(isinstance(x, str) for x in trainable)):
        patterns = [trainable] if isinstance(trainable, str) else list(trainable)
        fits = {pattern: {name for name in names if fnmatchcase(name, pattern)} for pattern in patterns}
        problems = [
            f"{where}: {pattern!r} fits no parameter{did_you_mean(pattern, list(names))}: there are {_listed(list(names))}"
            for pattern, found in fits.items()
            if not found
        ]
        if problems:
            raise ConfigError(problems)
        trained = {names[name] for found in fits.values() for name in found}
    else:
        filter_: Any = trainable
        is_trained = nnx.filterlib.to_predicate(filter_)
        trained = {path for path, variable in paths.items() if is_trained(path, variable)}
    if not trained:
        raise ConfigError(
            f"{where}: {trainable!r} selects no parameter, so nothing would be trained: there are {_listed(list(names))}"
        )
    return jax.tree_util.tree_map_with_path(lambda path, _: tuple(_key(key) for key in path) in trained, model.shapes)


def _key(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "idx", key))


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more (jaxpar mesh lists them)" if more > 0 else "")
