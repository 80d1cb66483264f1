"""Direct preference optimization (Rafailov et al., 2023, arXiv:2305.18290, equation 7).

A pair is two consecutive documents of one row: the preferred answer y⁺ and the other one y⁻, each with its prompt. Documents
0 and 1 of a row are its first pair, 2 and 3 its second. With s(y) the sum over the answer's tokens of log π(token) - log
π_ref(token), of which `ref_log_probs` has the second:

    loss of a pair = -log σ(β (s(y⁺) - s(y⁻)))

The loss is the mean over pairs. Prompts are left out with `completion_mask`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.objectives.base import Batch, Objective, TokenStatistics
from jaxpar.objectives.documents import one_for_each, sum_by
from jaxpar.parallel.batch import number_documents


def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """The objective.

    Metrics, means over pairs: `dpo/margin`, β (s(y⁺) - s(y⁻)); `dpo/accuracy`, how often it is positive; `dpo/chosen` and
    `dpo/rejected`, β s(y).

    Args:
      beta: β, how far the policy may go from the reference.
      label_smoothing: the probability that a preference is the wrong way round (conservative DPO, Mitchell, 2023).
    """
    one = jax.ShapeDtypeStruct((), jnp.float32)

    def loss(tokens: TokenStatistics, batch: Batch) -> tuple:
        ids, mask = batch["segment_ids"], batch["loss_mask"] * batch["completion_mask"]
        log_ratio = jnp.where(mask > 0, tokens.log_probs - batch["ref_log_probs"], 0) * beta
        is_chosen = ids % 2 == 0
        chosen = sum_by(ids // 2, jnp.where(is_chosen, log_ratio, 0))
        rejected = sum_by(ids // 2, jnp.where(is_chosen, 0, log_ratio))
        margin = chosen - rejected
        right, wrong = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
        metrics = {"dpo/margin": margin, "dpo/accuracy": (margin > 0).astype(jnp.float32)}
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
        return losses, metrics | {"dpo/chosen": chosen, "dpo/rejected": rejected}

    def weights(batch: Batch) -> jax.Array:
        return one_for_each(batch["segment_ids"] // 2, batch["loss_mask"] * batch["completion_mask"])

    inputs = {"ref_log_probs": one, "completion_mask": one}
    return Objective(loss, weights, inputs, whole_rows=True, problem=_unpaired)


def _unpaired(batch: Mapping[str, np.ndarray]) -> str | None:
    """A line about the first document with trained tokens whose partner has none."""
    ids, mask = number_documents(batch["segment_ids"]), batch["loss_mask"] * batch["completion_mask"]
    for row, (of_row, trained) in enumerate(zip(ids, mask > 0, strict=True)):
        found = set(of_row[trained].tolist())
        for document in sorted(found):
            if document ^ 1 not in found:
                return (
                    f"row {row}: document {document} of the row, counted from 0, has targets to train on, and its partner "
                    f"{document ^ 1} has none: a pair is documents 2i and 2i + 1 of one row, the preferred one first"
                )
    return None if mask.any() else "loss_mask * completion_mask is 0 everywhere, so nothing would be trained on"
