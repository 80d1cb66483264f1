"""The loss of a microbatch: an objective applied to what the head gives for its tokens."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxpar.objectives import Batch, Objective, Totals, losses_and_metrics, totals_of, weights_and_counts
from jaxpar.parallel.collectives import rank_and_size
from jaxpar.parallel.zigzag import zigzag_order


@dataclass(frozen=True)
class Loss:
    """An objective on a mesh.

    Attributes:
      keys: the arrays of a batch that its loss and its metrics need.
    """

    objective: Objective
    keys: tuple[str, ...] = ()

    def weights(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(weights, counts) of this device's tokens, float32 [rows, any] each."""
        if self.objective.weights is None:
            return batch["loss_mask"], batch["loss_mask"]
        weights, counts = weights_and_counts(self.objective, {key: _whole_rows(x) for key, x in batch.items()})
        return _own_part(weights), _own_part(counts)

    def __call__(self, features: Any, batch: Batch) -> tuple[jax.Array, Totals]:
        """(the sum of loss times weight, the totals of the metrics) of this device's tokens.

        Args:
          features: `TokenStatistics`, or outputs if the objective takes these, [batch, any, …]. With `whole_rows`, of all
            tokens that this device has of its rows.
          batch: `keys`, "weights" and "counts" of the same tokens.
        """
        given = {key: batch[key] for key in self.keys}
        if not self.objective.whole_rows:
            losses, metrics = losses_and_metrics(self.objective, features, given)
        else:
            features, given = jax.tree.map(_whole_rows, (features, given))
            losses, metrics = jax.tree.map(_own_part, losses_and_metrics(self.objective, features, given))
        return (losses * batch["weights"]).sum(), totals_of(metrics, batch)


def _whole_rows(x: jax.Array) -> jax.Array:
    """This cp rank's tokens, [batch, seq / cp, …] → all tokens of the rows, in their order. Backward, each rank gets the
    sum of what all ranks' losses say of its tokens."""
    _, ranks = rank_and_size("cp")
    if ranks == 1:
        return x
    gathered = lax.all_gather(x, "cp", axis=1, tiled=True)
    return gathered[:, np.argsort(zigzag_order(gathered.shape[1], ranks))]


def _own_part(x: jax.Array) -> jax.Array:
    """The inverse of `_whole_rows`."""
    rank, ranks = rank_and_size("cp")
    if ranks == 1:
        return x
    mine = x.shape[1] // ranks
    return lax.dynamic_slice_in_dim(x[:, zigzag_order(x.shape[1], ranks)], rank * mine, mine, 1)
