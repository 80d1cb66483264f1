"""Any optimizer of optax by its name, with arguments from a config file."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax
import optax.contrib
from jax.sharding import AbstractMesh, Mesh

from jaxpar.config import Config, ConfigError
from jaxpar.config.errors import did_you_mean
from jaxpar.config.keys import Optim
from jaxpar.step.muon import muon

# Parameters of optax's functions that a setting gives → the setting.
_SETTINGS = {"learning_rate": "lr", "weight_decay": "weight_decay"}
_ADAM = {"b1": "adam_beta1", "b2": "adam_beta2", "eps": "adam_eps"}
_OWN_SETTINGS = {"adam": _ADAM, "adamw": _ADAM, "muon": {"adam_b1": "adam_beta1", "adam_b2": "adam_beta2"}}
# Parameters that jaxpar gives: biases and norms have no weight decay, and which parameters are matrices.
_GIVEN = ("mask", "weight_decay_mask", "muon_weight_dimension_numbers", "adam_weight_decay")
_REFUSED = {
    "lbfgs": "its line search needs the loss as a function",
    "sophia": "its estimate of the Hessian needs the loss as a function",
    "schedule_free": "it wraps another optimizer, and its weights are not those to evaluate",
    "schedule_free_adamw": "its weights are not those to evaluate",
    "schedule_free_sgd": "its weights are not those to evaluate",
}


def optimizer_names() -> list[str]:
    """The names that `actor.optim.optimizer` may have."""
    functions = {name for module in (optax, optax.contrib) for name in dir(module) if _constructor(module, name)}
    return sorted(functions - _REFUSED.keys())


def named_optimizer(
    config: Config,
    learning_rate: optax.Schedule,
    weight_decay: float,
    mask: Any,
    param_layouts: Any,
    mesh: Mesh | AbstractMesh | None,
) -> optax.GradientTransformation:
    """The optimizer that `actor.optim.optimizer` names, with `actor.optim.optimizer_args`.

    Args:
      learning_rate: step, from 0 → rate.
      weight_decay, mask: given to optimizers that have them. The mask tells which parameters decay.
      param_layouts, mesh: for Muon, which needs whole matrices.

    Raises:
      ConfigError: there is no such optimizer, it has no such argument, or it refuses a value.
    """
    optim = config.actor.optim
    parameters, known = _parameters(optim), ", ".join(own_arguments(optim))
    arguments = {key: _value(value) for key, value in optim.optimizer_args.items()}
    problems = [_argument_problem(optim, name, known) for name in arguments]
    if found := [problem for problem in problems if problem]:
        raise ConfigError(found)
    missing = [name for name, p in parameters.items() if p.default is p.empty and name != "learning_rate"]
    if absent := [name for name in missing if name not in arguments]:
        raise ConfigError(f"actor.optim.optimizer_args: {optim.optimizer} needs {', '.join(absent)}: give them")
    if "adam_learning_rate" in arguments:
        arguments["adam_learning_rate"] = _of_peak(arguments["adam_learning_rate"], optim, learning_rate)
    given = {"learning_rate": learning_rate, "weight_decay": weight_decay, "mask": mask, "weight_decay_mask": mask}
    given |= {name: getattr(optim, key) for name, key in _OWN_SETTINGS.get(optim.optimizer, {}).items()}
    arguments |= {name: value for name, value in given.items() if name in parameters}
    try:
        if optim.optimizer == "muon":
            return muon(**arguments, param_layouts=param_layouts, mesh=mesh)
        return _function(optim.optimizer)(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"actor.optim.optimizer_args: {optim.optimizer} refuses {optim.optimizer_args}: {error}"
        ) from None


def own_arguments(optim: Optim) -> list[str]:
    """The arguments of the named optimizer that `actor.optim.optimizer_args` may give."""
    return [name for name in _parameters(optim) if name not in (*settings_of(optim), *_GIVEN)]


def settings_of(optim: Optim) -> dict[str, str]:
    """{argument of the named optimizer: key of `actor.optim` that gives it}."""
    settings = _SETTINGS | _OWN_SETTINGS.get(optim.optimizer, {})
    return {name: key for name, key in settings.items() if name in _parameters(optim)}


def decays_all(optim: Optim) -> bool:
    """Whether the named optimizer has weight decay, and no mask that leaves biases and norms out."""
    parameters = _parameters(optim)
    return "weight_decay" in parameters and not {"mask", "weight_decay_mask"} & parameters.keys()


def _function(name: str) -> Callable[..., Any]:
    if name in _REFUSED:
        raise ConfigError(f"actor.optim.optimizer: {name} is not supported: {_REFUSED[name]}")
    name = "adamw" if name == "adam" else name  # as in Megatron
    if found := _constructor(optax, name) or _constructor(optax.contrib, name):
        return found
    names = optimizer_names()
    raise ConfigError(
        f"actor.optim.optimizer: {name} is not an optimizer of optax{did_you_mean(name, names)}: choose one of "
        f"{', '.join(names)}, or give Trainer(config, optimizer=…)"
    )


def _constructor(module: Any, name: str) -> Callable[..., Any] | None:
    found = getattr(module, name, None)
    if name.startswith(("_", "scale_by_")) or not inspect.isfunction(found):
        return None
    return found if "learning_rate" in inspect.signature(found).parameters else None


def _parameters(optim: Optim) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_function(optim.optimizer)).parameters


def _argument_problem(optim: Optim, name: str, known: str) -> str | None:
    if key := settings_of(optim).get(name):
        return f"actor.optim.optimizer_args.{name}: actor.optim.{key} gives it: set that"
    if name in _GIVEN and name in _parameters(optim):
        return f"actor.optim.optimizer_args.{name}: jaxpar gives it, from the names of dimensions: remove it"
    if name not in _parameters(optim):
        close = did_you_mean(name, own_arguments(optim))
        return f"actor.optim.optimizer_args.{name}: {optim.optimizer} has no such argument{close}: it has {known}"
    return None


def _of_peak(peak: float, optim: Optim, learning_rate: optax.Schedule) -> optax.Schedule:
    """The schedule with another peak."""
    if not optim.lr:
        raise ConfigError(
            "actor.optim.optimizer_args.adam_learning_rate: a part of actor.optim.lr, which is not given: use "
            "actor.optim.groups with lr_mult"
        )
    return lambda step: learning_rate(step) * (peak / optim.lr)


def _value(value: Any) -> Any:
    """YAML 1.1 reads 1e-8 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
