"""Next-token cross-entropy, -log p(target), with z-loss and label smoothing where asked.

With smoothing ε over a vocabulary of V (Szegedy et al., 2016, arXiv:1512.00567, section 7) and z-loss weight c (Chowdhery et
al., 2022, PaLM, arXiv:2204.02311, section 5), and L the log of the sum of e^logit:

    loss = -(1 - ε) log p(target) - ε / V Σ_v log p(v) + c L²
"""

from jaxpar.objectives.base import Batch, Metric, Objective, TokenStatistics


def cross_entropy(z_loss: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """The objective.

    Args:
      z_loss: c, such as 1e-4. It keeps L near 0. Reported as the metric `z_loss`, without c, if it is not 0.
      label_smoothing: ε, at least 0 and below 1.
    """

    def loss(tokens: TokenStatistics, _: Batch) -> tuple:
        losses = -tokens.log_probs
        metrics: dict[str, Metric] = {}
        if label_smoothing:
            assert tokens.mean_logits is not None
            losses = (1 - label_smoothing) * losses + label_smoothing * (tokens.log_sums - tokens.mean_logits)
            metrics["cross_entropy"] = -tokens.log_probs
        if z_loss:
            losses += z_loss * tokens.log_sums**2
            metrics |= {"cross_entropy": -tokens.log_probs, "z_loss": tokens.log_sums**2}
        return losses, metrics

    return Objective(loss, mean_logits=label_smoothing > 0)
