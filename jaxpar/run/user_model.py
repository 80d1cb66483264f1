"""The model that `--model` names. Every mistake is one line of a ConfigError, without a traceback.

A name is `my_package.my_module:NAME` or `path/to/file.py:NAME`. The user's module imports jax, so XLA's settings must be in
the environment before it is loaded.
"""

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from flax import linen, nnx

from jaxpar.blueprint import UserModel
from jaxpar.config import Config, ConfigError
from jaxpar.config.errors import did_you_mean
from jaxpar.models import FunctionalModel, Model
from jaxpar.models.protocol import parameters_of


class NamedModel:
    """What a name means. Modules are looked for in the current folder first, as by `python -m`. The name stands for

    - a `jaxpar.Stack`, an object with the members of `jaxpar.Model`, or a module of Flax: the model;
    - a function or class whose first parameter is called `rngs`: a model that is not a stack of blocks;
    - any other function or class: it is called, with the config if it needs an argument or has one called `config`, and returns
      one of the two.

    Attributes:
      takes_config: the model is built from the config.

    Raises:
      ConfigError: the module cannot be imported, or lacks the name.
    """

    def __init__(self, name: str):
        self._label = f"--model {name}"
        path, colon, self._attribute = name.rpartition(":")
        if not colon or not path or not self._attribute.isidentifier():
            raise ConfigError(
                f"{self._label}: is not MODULE:NAME: give a module and a name in it, such as my_package.my_model:build, or "
                f"path/to/my_model.py:build"
            )
        module = _import(self._label, path)
        try:
            self._found = getattr(module, self._attribute)
        except AttributeError:
            meant = did_you_mean(self._attribute, [key for key in vars(module) if not key.startswith("_")])
            raise ConfigError(
                f"{self._label}: {path} has no {self._attribute}{meant}: give a name that is defined there"
            ) from None
        self.takes_config = not _is_model(self._found) and _needs_argument(self._found)

    def build(self, config: Config) -> UserModel:
        """The model, as `jaxpar.Trainer` takes it.

        Raises:
          ConfigError: the function, or the constructor of a module, raised; or the result is no model.
        """
        label, model = self._label, self._found
        if not _is_model(model):
            if not callable(model):
                raise ConfigError(f"{label}: {_no_model(model)}")
            with _one_line(label, f"{self._attribute}()"):
                model = self._found(config) if self.takes_config else self._found()
            if not _is_model(model):
                raise ConfigError(f"{label}: {self._attribute}() returned {_shortened(model)}: {_no_model(model)}")
        with _one_line(label, "building its modules"):
            FunctionalModel(model)  # only shapes; errors come here, not later from inside jax
        return cast(UserModel, model)


def _needs_argument(function: Any) -> bool:
    parameters = parameters_of(function)
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return bool(needed) or any(p.name == "config" for p in parameters)


def _shortened(value: Any) -> str:
    text = repr(value).splitlines()[0]
    return text if len(text) < 80 else f"{text[:80]}…"


def _is_model(found: Any) -> bool:
    """A module of Flax, an object with the members, or a function of `rngs`."""
    if isinstance(found, nnx.Module | linen.Module):
        return True
    if inspect.isclass(found) or not isinstance(found, Model):
        return [p.name for p in parameters_of(found)][:1] == ["rngs"]
    return True


def _no_model(found: Any) -> str:
    if isinstance(found, type):
        return f"{found.__name__} is a class: return an object of it"
    return (
        f"{type(found).__name__} is no model: give a jaxpar.Stack, an object with the members of jaxpar.Model (num_layers, embed, "
        f"block, head), a module of flax.nnx or flax.linen, or a function of rngs that returns one"
    )


def _import(label: str, path: str) -> ModuleType:
    is_file = path.endswith(".py") or os.sep in path
    for folder in (os.getcwd(), *([str(Path(path).resolve().parent)] if is_file else [])):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    if is_file:
        return _import_file(label, Path(path).resolve())
    try:
        with _one_line(label, f"importing {path}", but=ModuleNotFoundError):
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and f"{path}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{label}: there is no module {error.name}, neither in the current folder {os.getcwd()} nor in PYTHONPATH or "
                f"among the installed packages: correct the name, or give a file: path/to/my_model.py:NAME"
            ) from None
        raise ConfigError(f"{label}: importing {path} raised {_describe(error)}") from None


def _import_file(label: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{label}: there is no file {path}: correct the path")
    name = path.stem
    if name in sys.modules:
        if getattr(sys.modules[name], "__file__", None) == str(path):
            return sys.modules[name]
        name = f"jaxpar_user_model_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{label}: {path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look for it there
    try:
        with _one_line(label, f"importing {path.name}"):
            spec.loader.exec_module(module)
    except ConfigError:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _one_line(label: str, what: str, but: type[BaseException] | tuple[()] = ()) -> Iterator[None]:
    """Turns whatever the user's code raises into one line, except for errors of the type `but`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"{label}: {problem}" for problem in error.problems]) from None
    except but:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{label}: {what} raised {_describe(error)}") from None


def _describe(error: BaseException) -> str:
    """Kind and first line of an error, with the last line of the user's own code that led to it."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    not_theirs = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), str(Path(__file__).parents[1]), "<")
    own = [frame for frame in frames if not frame.filename.startswith(not_theirs)] or frames
    return f"{text} ({own[-1].filename}:{own[-1].lineno})"
