"""The optimizer of a run and its schedule. The settings mean what they mean in Megatron-LM."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from jaxpar.config import Config, ConfigError
from jaxpar.config.keys import ParamGroup
from jaxpar.parallel.sharding import ParamLayout
from jaxpar.step.named_optimizer import decays_all, named_optimizer, own_arguments, settings_of
from jaxpar.step.opt_state import by_path


def learning_rate_schedule(config: Config) -> optax.Schedule:
    """Step (from 0) → learning rate: linear warm-up from lr_warmup_init to lr, then constant, or linear or cosine decay to
    min_lr, which is reached at step lr_decay_iters and kept after it."""
    sched, peak = config.actor.lr_sched, config.actor.optim.lr
    last = sched.lr_decay_iters or max(config.runner.max_steps, 0)
    warmup = sched.lr_warmup_iters or int((sched.lr_warmup_fraction or 0) * last)
    rest: optax.Schedule
    if sched.lr_decay_style == "constant":
        rest = optax.constant_schedule(peak)
    elif sched.lr_decay_style == "linear":
        rest = optax.linear_schedule(peak, sched.min_lr, last - warmup)
    else:
        rest = optax.cosine_decay_schedule(peak, last - warmup, alpha=sched.min_lr / peak)
    if not warmup:
        return rest
    return optax.join_schedules([optax.linear_schedule(sched.lr_warmup_init, peak, warmup), rest], [warmup])


def build_optimizer(
    config: Config,
    param_layouts: Any,
    learning_rate: optax.Schedule | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> optax.GradientTransformation:
    """Clips by the global norm of all gradients, then applies the optimizer that `actor.optim` names, each group of
    parameters with its own rate and weight decay. The default is AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101).

    Biases and norm scales have no weight decay, as in Megatron-LM.

    Args:
      param_layouts: tree of `ParamLayout`, whose names and dimensions tell biases and scales from weights.
      learning_rate: step, from 0 → rate. Default: the config's.
      mesh: what the parameters are split over. Muon needs it.

    Raises:
      ConfigError: the optimizer, an argument of it or a group is wrong.
    """
    optim, rate = config.actor.optim, learning_rate or learning_rate_schedule(config)
    find = by_path(param_layouts)

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _decays(find(path)), params)

    def of_group(group: ParamGroup) -> optax.GradientTransformation:
        scaled = rate if group.lr_mult == 1 else lambda step: group.lr_mult * rate(step)
        decay = optim.weight_decay if group.weight_decay is None else group.weight_decay
        return named_optimizer(config, scaled, decay, mask, param_layouts, mesh)

    others = ParamGroup(match="*")
    optimizer = of_group(others)
    if optim.groups:
        groups = [*optim.groups, others]
        if problems := list(_group_problems(config, jax.tree.leaves(param_layouts))):
            raise ConfigError(problems)

        def label(params: Any) -> Any:
            return jax.tree_util.tree_map_with_path(lambda path, _: _group_of(find(path).name, groups), params)

        optimizer = optax.partition({i: of_group(group) for i, group in enumerate(groups)}, label)
    return optax.chain(optax.clip_by_global_norm(optim.clip_grad), optimizer) if optim.clip_grad else optimizer


def check_update(optimizer: optax.GradientTransformation, shapes: Any) -> None:
    """Traces one update. Raises ConfigError if the optimizer cannot take part in a train step."""
    update = optax.with_extra_args_support(optimizer).update
    try:
        jax.eval_shape(lambda params: update(params, optimizer.init(params), params, value=jnp.zeros(())), shapes)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"optimizer: update(gradients, state, params, value=loss) fails: {type(error).__name__}: {reason}"
        ) from error


def unused_settings(config: Config, *, own_optimizer: bool, own_rate: bool) -> Iterator[str]:
    """A line for each setting of `actor.optim` and `actor.lr_sched` that was given and has no effect.

    Args:
      own_optimizer, own_rate: the optimizer, or its schedule, is the caller's.
    """
    optim, given = config.actor.optim, config.actor.optim.model_fields_set
    adam = {"adam_beta1", "adam_beta2", "adam_eps"}
    if own_optimizer:
        which, useless = "Trainer(…, optimizer=…)", adam | {"weight_decay", "clip_grad", "groups", "lr"}
        useless |= {"optimizer", "optimizer_args"}
    else:
        which, used = f"optimizer {optim.optimizer}", set(settings_of(optim).values())
        useless = (adam | {"weight_decay"}) - used
        if own_rate and "lr" in given:
            yield "actor.optim.lr has no effect with Trainer(…, learning_rate=…)"
    if names := sorted(useless & given):
        more = "" if own_optimizer else f"; in optimizer_args, it takes {', '.join(own_arguments(optim)) or 'nothing'}"
        yield f"actor.optim: {', '.join(names)}: no effect with {which}{more}"
    if own_rate and config.actor.lr_sched.model_fields_set:
        names = sorted(config.actor.lr_sched.model_fields_set)
        yield f"actor.lr_sched: {', '.join(names)}: no effect with a learning rate of your own"
    if not own_optimizer and optim.weight_decay and decays_all(optim):
        yield f"actor.optim.weight_decay: {optim.optimizer} applies it to biases and norms too: optax's has no mask"


def _group_of(name: str, groups: Sequence[ParamGroup]) -> int:
    """The index of the first group that matches. The layers of a stack are one array: layers/*/… means layers/…"""
    names = (name, name.replace("layers/", "layers/*/", 1))
    return next(i for i, group in enumerate(groups) if any(fnmatchcase(n, group.match) for n in names))


def _group_problems(config: Config, layouts: Sequence[ParamLayout]) -> Iterator[str]:
    optim, others = config.actor.optim, ParamGroup(match="*")
    decays = "weight_decay" in settings_of(optim)
    for index, group in enumerate(optim.groups):
        key = f"actor.optim.groups[{index}]"
        alone = [x for x in layouts if not _group_of(x.name, [group, others])]
        mine = [x for x in alone if _group_of(x.name, [*optim.groups, others]) == index]
        if not mine:
            names = ", ".join(sorted(x.name for x in layouts))
            why = "earlier groups have all that it matches" if alone else "matches no parameter"
            yield f"{key}.match: {group.match}: {why}: the parameters are {names} (the layers of a stack are one)"
        elif group.weight_decay and not decays:
            yield f"{key}.weight_decay: {group.weight_decay}, but {optim.optimizer} has no weight decay: remove it"
        elif group.weight_decay and not decays_all(optim) and not any(map(_decays, mine)):
            yield f"{key}.weight_decay: {group.weight_decay}, but it matches biases and norms only, which have none: set 0"


def _decays(layout: ParamLayout) -> bool:
    own_dims = [dim for dim in layout.dims if dim != "layers"]
    return len(own_dims) > 1 and not layout.name.endswith("bias")
