"""Distillation from a teacher's most likely tokens (Hinton et al., 2015, arXiv:1503.02531, section 2).

For each position the batch has the k tokens that the teacher finds most likely, `teacher_tokens`, and their log-probabilities
q, `teacher_log_probs`. With p the student's, the loss is the Kullback-Leibler divergence over these tokens and one more that
stands for all others:

    KL = Σ_k e^q (q - log p) + (1 - Σ_k e^q) (log(1 - Σ_k e^q) - log(1 - Σ_k p))

    loss = α KL - (1 - α) log p(target)

Both distributions are those at `temperature`; the teacher's are given so.
"""

import jax
import jax.numpy as jnp

from jaxpar.objectives.base import Batch, Objective, TokenStatistics

_LEAST = 1e-9  # probability of all other tokens: below it, a difference of two float32 numbers near 1 means nothing


def distillation(k: int, alpha: float = 1.0, temperature: float = 1.0) -> Objective:
    """The objective. Metrics: `distillation/kl`, `cross_entropy`.

    Args:
      k: number of the teacher's tokens.
      alpha: α, the share of the teacher in the loss.
      temperature: that the student's logits are divided by.
    """

    def loss(tokens: TokenStatistics, batch: Batch) -> tuple:
        assert tokens.candidates is not None
        q, p = batch["teacher_log_probs"], tokens.candidates
        rest_q = jnp.clip(1 - jnp.exp(q).sum(-1), _LEAST, 1)
        rest_p = jnp.clip(1 - jnp.exp(p).sum(-1), _LEAST, 1)
        kl = (jnp.exp(q) * (q - p)).sum(-1) + rest_q * (jnp.log(rest_q) - jnp.log(rest_p))
        return alpha * kl - (1 - alpha) * tokens.log_probs, {"distillation/kl": kl, "cross_entropy": -tokens.log_probs}

    inputs = {
        "teacher_tokens": jax.ShapeDtypeStruct((k,), jnp.int32),
        "teacher_log_probs": jax.ShapeDtypeStruct((k,), jnp.float32),
    }
    return Objective(loss, inputs=inputs, candidates="teacher_tokens", temperature=temperature)
