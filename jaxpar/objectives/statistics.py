"""The statistics of logits, and their derivative: the only place that knows how a loss's gradient reaches the logits.

The logits may be whole, a part of the vocabulary, or a device's slice of it. Sums over a slice are `LogitSums`; they are merged
over parts, then over devices, and become `TokenStatistics`. `logits_grad` is the derivative for any slice, given the statistics
of all of it.

With z the logits divided by the temperature, p their softmax, L = log Σ e^z, H the entropy, and 1 the target's indicator:

    ∂ log p(target) / ∂z = 1 - p      ∂L / ∂z = p      ∂H / ∂z = -p (z - L + H)      ∂ mean(z) / ∂z = 1 / V
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpar.objectives.base import Asked, TokenStatistics
from jaxpar.parallel.collectives import MASKED


class Targets(NamedTuple):
    """Which tokens of the vocabulary are looked up.

    Attributes:
      targets: int32 [batch, seq].
      candidates: int32 [batch, seq, k], or None.
    """

    targets: jax.Array
    candidates: jax.Array | None = None


class LogitSums(NamedTuple):
    """Sums over a slice of the vocabulary, float32 [batch, seq] each; with m the slice's largest logit z.

    Attributes:
      highest: m.
      total: Σ e^(z - m).
      target: the target's z, 0 if it is not in the slice.
      spread: Σ e^(z - m) (z - m), for the entropy.
      logits, num_logits: Σ z and the number of logits, without those that pad the vocabulary.
      candidates: [batch, seq, k], as `target`.
    """

    highest: jax.Array
    total: jax.Array
    target: jax.Array
    spread: jax.Array | None = None
    logits: jax.Array | None = None
    num_logits: jax.Array | None = None
    candidates: jax.Array | None = None


def sums_of(logits: Float[Array, "b s v"], columns: Int[Array, " v"], of: Targets, asked: Asked) -> LogitSums:
    """The sums over a slice, whose logits are those of the tokens `columns`."""
    z = _tempered(logits, asked)
    highest = z.max(-1)
    weight = jnp.exp(z - highest[..., None])
    # A comparison and a sum instead of an index: it splits over the vocabulary without communication.
    target = jnp.where(columns == of.targets[..., None], z, 0).sum(-1)
    sums = LogitSums(highest, weight.sum(-1), target)
    if asked.entropy:
        sums = sums._replace(spread=(weight * (z - highest[..., None])).sum(-1))
    if asked.mean_logits:
        real = _real(z)
        sums = sums._replace(logits=jnp.where(real, z, 0).sum(-1), num_logits=real.sum(-1).astype(jnp.float32))
    if of.candidates is not None:
        held, index = _held(of.candidates, columns)
        sums = sums._replace(candidates=jnp.where(held, jnp.take_along_axis(z, index, -1), 0))
    return sums


def merge(a: LogitSums, b: LogitSums) -> LogitSums:
    """The sums over two slices together."""
    highest = jnp.maximum(a.highest, b.highest)
    a, b = _relative_to(highest, a), _relative_to(highest, b)
    return jax.tree.map(jnp.add, a, b)._replace(highest=highest)


def over_devices(sums: LogitSums, axes: tuple[str, ...]) -> LogitSums:
    """The sums over the slices of all devices along the manual `axes`."""
    if not axes:
        return sums
    highest = lax.pmax(sums.highest, axes)
    _, *rest = _relative_to(highest, sums)
    return LogitSums(highest, *lax.psum(rest, axes))


def _relative_to(highest: jax.Array, sums: LogitSums) -> LogitSums:
    """The same sums with `highest` in the place of the slice's largest logit."""
    below = sums.highest - highest
    factor = jnp.exp(below)
    spread = None if sums.spread is None else factor * (sums.spread + below * sums.total)
    return sums._replace(total=factor * sums.total, spread=spread)


def statistics_of(sums: LogitSums) -> TokenStatistics:
    """What the sums over the whole vocabulary say."""
    log_sums = sums.highest + jnp.log(sums.total)
    return TokenStatistics(
        sums.target - log_sums,
        log_sums,
        None if sums.spread is None else jnp.log(sums.total) - sums.spread / sums.total,
        None if sums.logits is None or sums.num_logits is None else sums.logits / sums.num_logits,
        None if sums.candidates is None else sums.candidates - log_sums[..., None],
    )


def logits_grad(
    logits: Float[Array, "b s v"],
    columns: Int[Array, " v"],
    of: Targets,
    asked: Asked,
    statistics: TokenStatistics,
    num_logits: jax.Array | None,
    grads: TokenStatistics,
) -> Float[Array, "b s v"]:
    """The gradient of a slice's logits, of their dtype.

    Args:
      statistics: of the whole vocabulary.
      num_logits: of `LogitSums`, of the whole vocabulary; None without `mean_logits`.
      grads: of the statistics.
    """
    z, log_sums = _tempered(logits, asked), statistics.log_sums[..., None]
    p = jnp.exp(z - log_sums)
    of_p = grads.log_sums - grads.log_probs
    if grads.candidates is not None:
        of_p -= grads.candidates.sum(-1)
    result = p * of_p[..., None] + jnp.where(columns == of.targets[..., None], grads.log_probs[..., None], 0)
    if grads.entropy is not None and statistics.entropy is not None:
        result -= p * (z - log_sums + statistics.entropy[..., None]) * grads.entropy[..., None]
    if grads.mean_logits is not None and num_logits is not None:
        result += jnp.where(_real(z), (grads.mean_logits / num_logits)[..., None], 0)
    if grads.candidates is not None and of.candidates is not None:
        held, index = _held(of.candidates, columns)
        rows, seq = (jnp.arange(n) for n in index.shape[:2])
        more = jnp.where(held, grads.candidates, 0)
        result = result.at[rows[:, None, None], seq[None, :, None], index].add(more)
    return (result / asked.temperature if asked.temperature != 1 else result).astype(logits.dtype)


def token_statistics(
    logits: Float[Array, "b s v"], columns: Int[Array, " v"], of: Targets, asked: Asked, axes: tuple[str, ...] = ()
) -> TokenStatistics:
    """The statistics of logits that this device holds whole, or of which it holds the slice `columns`.

    Args:
      logits: any float dtype.
      axes: the manual axes that split the vocabulary.
    """

    @jax.custom_vjp
    def run(logits: jax.Array, columns: jax.Array, of: Targets) -> TokenStatistics:
        return statistics_of(over_devices(sums_of(logits, columns, of, asked), axes))

    def forward(logits: jax.Array, columns: jax.Array, of: Targets) -> tuple[TokenStatistics, Any]:
        sums = over_devices(sums_of(logits, columns, of, asked), axes)
        statistics = statistics_of(sums)
        return statistics, (logits, columns, of, statistics, sums.num_logits)

    def backward(residuals: Any, grads: TokenStatistics) -> tuple[jax.Array, None, None]:
        logits, columns, of, statistics, num_logits = residuals
        return logits_grad(logits, columns, of, asked, statistics, num_logits, grads), None, None

    run.defvjp(forward, backward)
    return run(logits, columns, of)


def _tempered(logits: jax.Array, asked: Asked) -> jax.Array:
    z = logits.astype(jnp.float32)
    return z / asked.temperature if asked.temperature != 1 else z


def _real(z: jax.Array) -> jax.Array:
    """Which logits do not only pad the vocabulary."""
    return z > MASKED / 1e6  # a temperature may have moved them


def _held(candidates: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whether each candidate is in the slice, its index there or 0)."""
    index = candidates - columns[0]
    held = (index >= 0) & (index < columns.shape[0])
    return held, jnp.where(held, index, 0)
