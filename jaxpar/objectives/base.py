"""What an objective is: a function from the statistics of each token to the losses of each token.

A model's logits are too many to keep. What a loss needs of them is little: the log-probability of the target, the log of the
sum of their exponentials, perhaps their entropy. An objective is a function of these. How its derivative reaches the logits is
`jaxpar.objectives.statistics`' business, whether they are computed whole, in parts, or split over devices.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

Batch = Mapping[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["log_probs", "log_sums", "entropy", "mean_logits", "candidates"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TokenStatistics:
    """What an objective knows of the logits of each token. Float32, in nats. Those that it does not ask for are None.

    Attributes:
      log_probs: [batch, seq], log p(target).
      log_sums: [batch, seq], the log of the sum of e^logit over the vocabulary.
      entropy: [batch, seq], -Σ p log p over the vocabulary.
      mean_logits: [batch, seq], the mean logit over the vocabulary.
      candidates: [batch, seq, k], log p of the tokens that the batch names for each position.
    """

    log_probs: Float[Array, "batch seq"]
    log_sums: Float[Array, "batch seq"]
    entropy: Float[Array, "batch seq"] | None = None
    mean_logits: Float[Array, "batch seq"] | None = None
    candidates: Float[Array, "batch seq k"] | None = None


class Mean(NamedTuple):
    """A metric: the mean over the tokens of the global batch.

    Attributes:
      values: [batch, seq].
      weights: [batch, seq], at least 0, of tokens whose `loss_mask` is not 0; others have none. None: the loss's.
    """

    values: jax.Array
    weights: jax.Array | None = None


class Sum(NamedTuple):
    """A metric: the sum over the tokens of the global batch whose weight in the loss is not 0. `values` is [batch, seq]."""

    values: jax.Array


class Max(NamedTuple):
    """A metric: the largest over the tokens of the global batch whose weight in the loss is not 0. `values` is [batch, seq]."""

    values: jax.Array


Metric = jax.Array | Mean | Sum | Max  # an array is a Mean with the loss's weights
LossFunction = Callable[..., Any]


@dataclass(frozen=True)
class Objective:
    """A loss and what it needs. A function alone is an objective that needs nothing else.

    The loss of a step is Σ weight · loss / Σ count over all tokens of the global batch.

    Attributes:
      loss: (`TokenStatistics`, batch) → losses [batch, seq], float32; or (losses, {name: metric}). The batch has `tokens`,
        `targets`, `loss_mask`, `segment_ids`, `positions` and `inputs`. A metric is `Mean`, `Sum`, `Max`, or an array whose
        mean is taken. Tokens may come in any order, and not all of a row at once; see `whole_rows`.
      weights: batch → weights [batch, seq], at least 0, or (weights, counts). It sees whole rows in their order. Default: the
        batch's `loss_mask`. Default of the counts: the weights.
      inputs: {name: ShapeDtypeStruct of one token's} of arrays [rows, seq, …] that batches must have in addition.
      whole_rows: a token's loss depends on other tokens of its row. The function is then given whole rows in their order.
        No loss may depend on another row.
      entropy, mean_logits: ask for these statistics.
      candidates: the name of an input, int32 [k], of tokens whose log-probabilities are asked for.
      temperature: logits are divided by it first.
      problem: (batch of numpy arrays) → what is wrong with a batch given by hand, in a line, or None.
      of_outputs: `loss` takes the model's outputs as they are, [batch, seq, …], in the place of statistics.
    """

    loss: LossFunction
    weights: Callable[[Batch], Any] | None = None
    inputs: Mapping[str, jax.ShapeDtypeStruct] = field(default_factory=dict)
    whole_rows: bool = False
    entropy: bool = False
    mean_logits: bool = False
    candidates: str | None = None
    temperature: float = 1.0
    problem: Callable[[Mapping[str, np.ndarray]], str | None] | None = None
    of_outputs: bool = False

    @property
    def asked(self) -> "Asked | None":
        """The statistics that it takes; None with `of_outputs`."""
        return None if self.of_outputs else Asked(self.entropy, self.mean_logits, self.candidates, self.temperature)


class Asked(NamedTuple):
    """Which statistics are computed, and of logits divided by which temperature; see `Objective`."""

    entropy: bool = False
    mean_logits: bool = False
    candidates: str | None = None
    temperature: float = 1.0


UserObjective = Objective | LossFunction
