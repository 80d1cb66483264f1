"""Functions from parameters at rest and a global batch to losses or statistics of tokens, without gradients."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxpar.config import ConfigError
from jaxpar.models.protocol import Params
from jaxpar.objectives import Asked, TokenStatistics, finished, joined
from jaxpar.parallel.collectives import sum_over, varying_axes
from jaxpar.parallel.sharding import BATCH_SPEC
from jaxpar.parallel.zigzag import zigzag_order
from jaxpar.pipeline.ends import EmbeddingAndLoss
from jaxpar.pipeline.engine import Engine
from jaxpar.pipeline.schedule import forward_only
from jaxpar.step.loss_and_grads import Batch, StepSetup


def build_evaluate(setup: StepSetup) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Returns (params, batch) → {"loss", "tokens", …}, without gradients, to be called inside `jax.jit`.

    loss: float32, the sum of the objective's losses times their weights over the global batch. tokens: float32, the sum of the
    counts that it is to be divided by. Beside them the objective's metrics.
    """

    def local(params: Params, batch: Batch) -> dict[str, jax.Array]:
        weighted, tokens = setup.weighted(batch)
        losses, totals = _run_forward(setup, params, weighted, lambda ends: ends.loss)
        loss = losses.sum()
        return {**finished(joined(totals)), "loss": sum_over(loss, varying_axes(loss)), "tokens": tokens}

    return setup.on_mesh(local, P())


def build_statistics(setup: StepSetup, asked: Asked) -> Callable[[Params, Batch], TokenStatistics]:
    """Returns (params, batch) → the statistics of each token, without gradients, to be called inside `jax.jit`.

    Float32 [global_batch, seq], tokens in natural order.

    Raises:
      ConfigError: the objective takes the model's outputs as they are, so they are no logits.
    """
    if setup.loss.objective.of_outputs:
        raise ConfigError("log_probs: the objective takes the model's outputs as they are, so they are no logits")

    def local(params: Params, batch: Batch) -> TokenStatistics:
        weighted = {**batch, "weights": batch["loss_mask"]}
        found = _run_forward(setup, params, weighted, lambda ends: ends.features, asked=asked)
        return jax.tree.map(lambda x: x.reshape(*batch["tokens"].shape, *x.shape[3:]), found)

    on_mesh = setup.on_mesh(local, BATCH_SPEC)

    def statistics(params: Params, batch: Batch) -> TokenStatistics:
        order = np.argsort(zigzag_order(batch["tokens"].shape[1], setup.mesh.shape["cp"]))
        return jax.tree.map(lambda x: x[:, order], on_mesh(params, batch))

    return statistics


def _run_forward(
    setup: StepSetup,
    params: Params,
    batch: Batch,
    head: Callable[[EmbeddingAndLoss], Callable[[Any, jax.Array, Any], Any]],
    asked: Asked | None = None,
) -> Any:
    """What a function of the last stage's outputs returns for each microbatch, stacked."""
    table = setup.schedule_of(len(batch["tokens"]))
    schedule = forward_only(table.num_stages, table.num_microbatches, table.num_chunks)
    rows, engine_params = setup.microbatches(batch, schedule), setup.engine_params(params)
    functions = setup.stage_functions(schedule, engine_params, rows, train=False, asked=asked)
    return Engine(schedule, functions, engine_params, rows).evaluate(head(functions.ends))
