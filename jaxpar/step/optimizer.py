"""Optax's AdamW with warm-up and decay. Its settings mean what they mean in Megatron-LM."""

from typing import Any

import jax
import optax

from jaxpar.config import Config
from jaxpar.parallel.sharding import ParamLayout


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


def build_optimizer(config: Config, param_layouts: Any) -> optax.GradientTransformation:
    """Clips by the global norm of all gradients, then applies AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101).

    Biases and norm scales have no weight decay, as in Megatron-LM.

    Args:
      param_layouts: tree of `ParamLayout`, whose names and dimensions tell biases and scales from weights.
    """
    optim = config.actor.optim
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=optim.adam_beta1,
        b2=optim.adam_beta2,
        eps=optim.adam_eps,
        weight_decay=optim.weight_decay,
        mask=jax.tree.map(_decays, param_layouts),
    )
    return optax.chain(optax.clip_by_global_norm(optim.clip_grad), adamw) if optim.clip_grad else adamw


def _decays(layout: ParamLayout) -> bool:
    own_dims = [dim for dim in layout.dims if dim != "layers"]
    return len(own_dims) > 1 and not layout.name.endswith("bias")
