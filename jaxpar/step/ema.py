"""An exponential moving average of the weights, kept in the optimizer's state."""

from typing import Any, NamedTuple

import jax
import optax

from jaxpar.config import ConfigError


class AveragedState(NamedTuple):
    """`inner`: the optimizer's state; `ema`: the average, a tree like the parameters."""

    inner: Any
    ema: Any


def with_ema(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
    """The same updates, and after each one `ema = decay * ema + (1 - decay) * params`, from the first parameters on."""
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> AveragedState:
        return AveragedState(optimizer.init(params), params)

    def update(grads: Any, state: AveragedState, params: Any, **extra: Any) -> tuple[Any, AveragedState]:
        updates, inner = optimizer.update(grads, state.inner, params, **extra)
        after = optax.apply_updates(params, updates)
        return updates, AveragedState(inner, jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, after))

    return optax.GradientTransformationExtraArgs(init, update)


def ema_params(opt_state: Any) -> Any:
    """The average in a state of `with_ema`'s, a tree like the parameters. Raises ConfigError if there is none."""
    if not isinstance(opt_state, AveragedState):
        raise ConfigError(
            "actor.optim.ema_decay: not given, so there is no average of the weights: set it, such as 0.999"
        )
    return opt_state.ema
