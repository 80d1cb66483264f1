"""The actor's loss in reinforcement learning: clipped policy gradient, as RLinf's `loss_type: actor`.

With r = π / π_old of a token, clipped as logarithm to [clip_log_ratio_min, clip_log_ratio_max], and its advantage A (Schulman
et al., 2017, arXiv:1707.06347, equation 7, with two bounds as in Yu et al., 2025, DAPO, arXiv:2503.14476, equation 10; the
dual clip c is Ye et al., 2020, arXiv:1912.09729, equation 5):

    policy = max(-A r, -A clip(r, 1 - low, 1 + high))
    policy = min(policy, c |A|)                                    if c is given
    loss   = policy - entropy_bonus · H + kl_beta · kl(π, π_ref)

The names of settings and metrics are RLinf's. Unlike there, a mean is taken over the whole global batch, not over microbatches
(RLinf's `use_valid_token_scale`), so it does not depend on how the batch is cut.
"""

import jax
import jax.numpy as jnp

from jaxpar.config.keys import KlPenalty, LossAggregation
from jaxpar.objectives.base import Batch, Mean, Metric, Objective, TokenStatistics
from jaxpar.objectives.fine_tuning import aggregated, check_name


def actor(
    *,
    ratio_clip_eps: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    clip_ratio_c: float | None = None,
    clip_log_ratio_min: float | None = None,
    clip_log_ratio_max: float | None = None,
    kl_beta: float = 0.0,
    kl_penalty_type: KlPenalty = "low_var_kl",
    entropy_bonus: float = 0.0,
    calculate_entropy: bool = False,
    loss_agg_func: LossAggregation = "token-mean",
    temperature: float = 1.0,
) -> Objective:
    """The objective. Batches have `advantages` and `old_log_probs`, and `ref_log_probs` if `kl_beta` is above 0; all are
    float32 [rows, seq]. `loss_mask` says which targets are the answer's.

    Args:
      ratio_clip_eps: the bounds on |r - 1|, where clip_ratio_low and clip_ratio_high do not say otherwise.
      clip_ratio_c: c, above 1. None: no dual clip.
      kl_penalty_type: see `kl_penalty`.
      calculate_entropy: report the entropy, and take it into the loss if entropy_bonus is above 0.
      loss_agg_func: see `jaxpar.objectives.fine_tuning`.
      temperature: of the sampling, by which logits are divided.

    Raises:
      ConfigError: `kl_penalty_type` or `loss_agg_func` is unknown.
    """
    check_name("kl_penalty_type", kl_penalty_type, KlPenalty)
    check_name("loss_agg_func", loss_agg_func, LossAggregation)
    low = ratio_clip_eps if clip_ratio_low is None else clip_ratio_low
    high = ratio_clip_eps if clip_ratio_high is None else clip_ratio_high

    def loss(tokens: TokenStatistics, batch: Batch) -> tuple:
        mask, advantages = batch["loss_mask"], batch["advantages"]
        log_ratio = jnp.where(mask > 0, tokens.log_probs - batch["old_log_probs"], 0)
        bounded = jnp.clip(log_ratio, clip_log_ratio_min, clip_log_ratio_max)
        ratio = jnp.exp(bounded)
        clipped = jnp.clip(ratio, 1 - low, 1 + high)
        free, bound = -advantages * ratio, -advantages * clipped
        policy = jnp.maximum(free, bound)
        is_dual = jnp.zeros_like(policy)
        if clip_ratio_c is not None:
            most = clip_ratio_c * jnp.abs(advantages)
            is_dual = (most < policy).astype(jnp.float32)
            policy = jnp.minimum(policy, most)
        means = {
            "actor/ratio": ratio,
            "actor/ratio_abs": jnp.abs(ratio - 1),
            "actor/clipped_ratio": clipped,
            "actor/dual_cliped_ratio": is_dual * ratio,  # RLinf's spelling
            "actor/approx_kl": -bounded,
            "actor/clip_fraction": (free < bound).astype(jnp.float32),
        }
        losses = policy
        metrics: dict[str, Metric] = {name: Mean(values, mask) for name, values in means.items()}
        metrics |= {"actor/policy_loss": policy, "actor/policy_loss_abs": jnp.abs(policy)}
        if tokens.entropy is not None:
            losses -= entropy_bonus * tokens.entropy
            metrics["actor/entropy_loss"] = tokens.entropy
        if kl_beta:
            kl = kl_penalty(jnp.where(mask > 0, tokens.log_probs - batch["ref_log_probs"], 0), kl_penalty_type)
            losses += kl_beta * kl
            metrics["actor/kl_loss"] = kl
        return losses, metrics | {"actor/final_loss": losses}

    def weights(batch: Batch) -> tuple[jax.Array, jax.Array]:
        return aggregated(batch["loss_mask"], batch["segment_ids"], loss_agg_func)

    names = ["advantages", "old_log_probs", *(["ref_log_probs"] if kl_beta else [])]
    inputs = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in names}
    return Objective(loss, weights, inputs, entropy=calculate_entropy, temperature=temperature)


def kl_penalty(log_ratio: jax.Array, kind: KlPenalty) -> jax.Array:
    """An estimate of KL(π, π_ref) from `log_ratio`, log π - log π_ref of a sampled token (Schulman, 2020, "Approximating KL
    Divergence", joschu.net/blog/kl-approx.html: k1, k2, k3). k3's exponent is kept within ±20 and its value within ±10."""
    if kind in ("kl", "k1"):
        return log_ratio
    if kind == "abs":
        return jnp.abs(log_ratio)
    if kind in ("mse", "k2"):
        return 0.5 * log_ratio**2
    exponent = jnp.clip(-log_ratio, -20, 20)
    return jnp.clip(jnp.exp(exponent) - exponent - 1, -10, 10)
