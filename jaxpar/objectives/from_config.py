"""The objective that a config's section `algorithm` names."""

from collections.abc import Callable

from jaxpar.config.keys import LOSS_TYPES, Algorithm
from jaxpar.objectives.actor import actor
from jaxpar.objectives.base import Objective
from jaxpar.objectives.cross_entropy import cross_entropy
from jaxpar.objectives.distillation import distillation
from jaxpar.objectives.dpo import dpo
from jaxpar.objectives.fine_tuning import fine_tuning


def objective_of(algorithm: Algorithm) -> Objective:
    """The objective with the section's settings."""
    return _BUILDERS[algorithm.loss_type](algorithm)


def _actor(a: Algorithm) -> Objective:
    return actor(
        ratio_clip_eps=a.ratio_clip_eps,
        clip_ratio_low=a.clip_ratio_low,
        clip_ratio_high=a.clip_ratio_high,
        clip_ratio_c=a.clip_ratio_c,
        clip_log_ratio_min=a.clip_log_ratio_min,
        clip_log_ratio_max=a.clip_log_ratio_max,
        kl_beta=a.kl_beta,
        kl_penalty_type=a.kl_penalty_type,
        entropy_bonus=a.entropy_bonus,
        calculate_entropy=a.calculate_entropy,
        loss_agg_func=a.loss_agg_func,
        temperature=a.sampling_params.temperature,
    )


_BUILDERS: dict[str, Callable[[Algorithm], Objective]] = {
    "cross_entropy": lambda a: cross_entropy(a.z_loss, a.label_smoothing),
    "sft": lambda a: fine_tuning(a.loss_agg_func),
    "dpo": lambda a: dpo(a.dpo_beta, a.label_smoothing),
    "distillation": lambda a: distillation(a.teacher_top_k, a.distillation_alpha),
    "actor": _actor,
}
assert _BUILDERS.keys() == LOSS_TYPES.keys()
