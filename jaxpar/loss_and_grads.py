"""One function from parameters at rest and a global batch to loss and gradients, on any mesh.

    parameters at rest → gather (all-gather over dp, cp, in the compute dtype, once)
    shard_map: pipeline schedule over microbatches, float32 sums of gradients
    gradients → the transpose of the gather (reduce-scatter over dp, cp, in float32, once)

For an explicit model all five axes are manual; for an automatic one tp and sp are left to XLA.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpar.collectives import (
    broadcast_from_last_stage,
    cross_entropy,
    rank_and_size,
    sum_over,
    varying_axes,
    vocabulary_axes,
)
from jaxpar.mesh import AXES, REPLICA_AXES, TENSOR_AXES
from jaxpar.models.protocol import FunctionalModel, Params, TokenInfo
from jaxpar.pipeline.engine import StageFunctions
from jaxpar.pipeline.engine import loss_and_grads as run_pipeline
from jaxpar.pipeline.schedule import Schedule
from jaxpar.recompute import Recompute
from jaxpar.sharding import BATCH_SPEC, gather_param

Batch = Mapping[str, jax.Array]


def build_loss_and_grads(
    model: FunctionalModel,
    mesh: Mesh,
    layouts: Any,
    schedule: Schedule,
    *,
    compute_dtype: Any = jnp.float32,
    recompute: Recompute = Recompute(),  # noqa: B008 (frozen)
) -> Callable[..., tuple[jax.Array, Params]]:
    """Returns (params, batch, loss_scale=1.0) → (loss, grads), to be called inside `jax.jit`.

    params: float32, each split by its layout's rest_spec; grads likewise.
    batch: `tokens`, `targets`, `segment_ids`, `positions` int32 and `loss_mask` float32, each [global_batch, seq],
      split by `jaxpar.sharding.BATCH_SPEC`.
    loss_scale: a float or a float32 scalar that the backward pass is scaled by; loss and grads are not.
    loss: float32, nats a token: the sum over valid tokens of the whole global batch over their count, on any layout.
    """
    manual_axes = set(AXES) if model.explicit else set(AXES) - set(TENSOR_AXES)
    # Sums over tp are left where the model's own collectives put them; all others wait for the end of the step.
    # The head of an automatic model works on another share of the tokens on each stage, see _loss.
    accumulate_axes = ("dp", "cp", "sp") if model.explicit else ("dp", "cp", "pp")

    def gather(params: Params) -> Params:
        params = jax.tree.map(lambda x, layout: gather_param(x, layout, accumulate_axes), params, layouts)
        return {**params, "layers": recompute.group(params["layers"])}

    def local(params: Params, batch: Batch, loss_scale: jax.Array) -> tuple[jax.Array, Params]:
        compute = gather(jax.tree.map(lambda x: x.astype(compute_dtype), params))
        tokens = sum_over(batch["loss_mask"].sum(), REPLICA_AXES)
        weights = batch["loss_mask"] * (loss_scale / jnp.maximum(tokens, 1))
        rows = {**batch, "weights": weights}
        microbatches = jax.tree.map(lambda x: x.reshape(schedule.num_microbatches, -1, *x.shape[1:]), rows)
        loss, grads = run_pipeline(schedule, _stage_functions(model, mesh, recompute), compute, microbatches)
        loss = sum_over(loss, varying_axes(loss))
        _, reduce = jax.vjp(gather, params)
        (grads,) = reduce(grads)
        return loss / loss_scale, jax.tree.map(lambda x: x / loss_scale, grads)

    if all(mesh.shape[axis] == 1 for axis in manual_axes):
        # Nothing is left to do by hand, and XLA's partitioner refuses manual sums over axes of size 1 beside automatic
        # ones.
        def automatic(params: Params, batch: Batch, loss_scale: Any = 1.0) -> tuple[jax.Array, Params]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return local(params, batch, loss_scale)

        return automatic
    specs = jax.tree.map(lambda layout: _only(layout.rest_spec, manual_axes), layouts)
    in_specs = (specs, BATCH_SPEC, P())
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(P(), specs), axis_names=manual_axes)
    return lambda params, batch, loss_scale=1.0: mapped(params, batch, jnp.asarray(loss_scale, jnp.float32))


def _stage_functions(model: FunctionalModel, mesh: Mesh, recompute: Recompute) -> StageFunctions:
    split_sequence = not model.explicit and mesh.shape["sp"] > 1

    def constrain(x: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(x, P(None, "sp")) if split_sequence else x

    def block(layer: Params, x: jax.Array, batch: Batch) -> jax.Array:
        return constrain(model.block(layer, x, _info(batch)))

    def embed(params: Params, batch: Batch) -> jax.Array:
        return constrain(model.embed(params, batch["tokens"], _info(batch)))

    def layers(layers: Params, x: jax.Array, batch: Batch) -> jax.Array:
        return recompute.scan(lambda layer, x: block(layer, x, batch), layers, x)

    def loss(params: Params, x: jax.Array, batch: Batch) -> jax.Array:
        return _loss(model, params, x, batch)

    return StageFunctions(embed, layers, loss)


def _loss(model: FunctionalModel, params: Params, x: jax.Array, batch: Batch) -> jax.Array:
    """Weighted sum of the tokens' losses, with the head's work spread over all stages.

    An explicit model splits its vocabulary over the stages. An automatic one cannot (pp is manual), so its tokens are
    split instead: each stage computes the head for a share of the sequence.
    """
    targets, weights = batch["targets"], batch["weights"]
    if model.explicit:
        logits = model.head(params, broadcast_from_last_stage(x))
        return (cross_entropy(logits, targets, vocabulary_axes()) * weights).sum()
    stage, stages = rank_and_size("pp")
    x = jnp.where(stage == stages - 1, x, 0)
    if stages > 1 and x.shape[1] % stages == 0:
        share = x.shape[1] // stages
        x = lax.psum_scatter(x, "pp", scatter_dimension=1, tiled=True)
        targets, weights = (lax.dynamic_slice_in_dim(a, stage * share, share, 1) for a in (targets, weights))
    else:
        weights = jnp.where(stage == stages - 1, weights, 0)
    return (cross_entropy(model.head(params, x), targets) * weights).sum()


def _info(batch: Batch) -> TokenInfo:
    return TokenInfo(batch["positions"], batch["segment_ids"])


def _only(spec: P, axes: set[str]) -> P:
    """The part of a spec that `shard_map` may name: automatic axes are known from the arrays themselves."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return P(*(tuple(axis for axis in entry if axis in axes) or None for entry in entries))
