"""Functions from parameters at rest and a global batch to loss and gradients, on any mesh.

    parameters at rest → gathered over dp and cp (all-gather, in the compute dtype, once)
    shard_map: the pipeline's schedule over microbatches, float32 sums of gradients
    gradients → the transpose of the gather (reduce-scatter over dp and cp, in float32, once)

With ZeRO stage 2, gradients are reduced layer by layer as they come. With stage 3, parameters are also gathered layer by
layer, forward and backward. For an explicit model all five axes are manual; for an automatic one, tp and sp are left to
XLA.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpar.attention import AttentionSettings, attention_settings
from jaxpar.backward.recompute import Recompute
from jaxpar.models import FunctionalModel
from jaxpar.models.protocol import Params, TokenInfo
from jaxpar.objectives import Asked, finished
from jaxpar.objectives.cross_entropy import cross_entropy
from jaxpar.parallel.collectives import rank_and_size, sum_over, varying_axes
from jaxpar.parallel.mesh import AXES, REPLICA_AXES, TENSOR_AXES
from jaxpar.parallel.placement import LayerPlacement
from jaxpar.parallel.randomness import token_keys
from jaxpar.parallel.sharding import (
    BATCH_SPEC,
    EXPLICIT_RULES,
    ParamLayout,
    gather_param,
    mark_varying,
    place_layers,
    reduce_grad,
)
from jaxpar.parallel.trained import partition, trained_layouts
from jaxpar.pipeline.ends import EmbeddingAndLoss, token_info
from jaxpar.pipeline.engine import Engine, StageFunctions
from jaxpar.pipeline.layer_group import LayerFunctions
from jaxpar.pipeline.layers import keep_memory_order
from jaxpar.pipeline.loss import Loss
from jaxpar.pipeline.schedule import Schedule
from jaxpar.pipeline.token_parts import least_parts, nbytes

Batch = Mapping[str, jax.Array]
MAX_LOGITS_BYTES = 2**29  # float32 logits that a device holds at a time
MAX_VOCABULARY_BYTES = 2**30  # with ZeRO stage 3: of these, and of an embedding or head
# With ZeRO stage 3: logits, counted in float32, that are kept in the compute dtype for their gradients. With full recompute,
# when layers keep little, they would be the peak.
MAX_KEPT_LOGITS_BYTES = {"full": 0, "selective": 2**32, None: 2**32}


@dataclass(frozen=True)
class StepSetup:
    """What the functions of this file are built from, and how parameters and gradients move between rest and the engine.

    Attributes:
      param_layouts: tree of `ParamLayout`, made for the same ZeRO stage and number of chunks.
      schedule_of: the rows that each dp rank has of a batch → the pipeline's table. Dynamic batches differ in their rows,
        and jax compiles once for each number.
      attention: how calls of `jaxpar.attention.attention` in the model are computed.
      zero_stage: 0 to 3.
      reduce_dtype: of gradients while they travel over dp and cp. Sums over microbatches are float32.
      overlap_param_gather, overlap_grad_reduce: move a layer's parameters or gradients while its neighbour computes, if
        they are moved layer by layer.
      within_documents: a token attends only to tokens of its own document.
      loss: the objective.
    """

    model: FunctionalModel
    mesh: Mesh
    param_layouts: Any
    schedule_of: Callable[[int], Schedule]
    compute_dtype: Any = jnp.float32
    attention: AttentionSettings = AttentionSettings()  # noqa: RUF009 (frozen)
    recompute: Recompute = Recompute()  # noqa: RUF009 (frozen)
    zero_stage: int = 1
    reduce_dtype: Any = jnp.float32
    overlap_param_gather: bool = True
    overlap_grad_reduce: bool = True
    within_documents: bool = True
    loss: Loss = Loss(cross_entropy())  # noqa: RUF009 (frozen)

    @property
    def manual_axes(self) -> set[str]:
        return set(AXES) if self.model.explicit else set(AXES) - set(TENSOR_AXES)

    def to_engine(self, params: Params, *, gathered: bool) -> Params:
        """Parameters at rest → as the engine holds them. Linear.

        Args:
          params: all, or with None at the frozen ones.
          gathered: all-gather the shards over dp and cp.
        """
        # Sums over tp stay where the model's own collectives put them. All others wait for the end of the step. The head
        # of an automatic model works on another share of the tokens on each stage, see `jaxpar.pipeline.ends`.
        accumulate_axes = ("dp", "cp", "sp") if self.model.explicit else ("dp", "cp", "pp")

        def one(param: jax.Array, layout: ParamLayout) -> jax.Array:
            param = place_layers(param, layout)
            return mark_varying(gather_param(param, layout) if gathered else param, layout, accumulate_axes)

        return jax.tree.map(
            lambda layout, param: None if param is None else one(param, layout), self.param_layouts, params
        )

    def engine_params(self, params: Params) -> Params:
        """Parameters at rest → as the engine holds them: in the compute dtype, but with ZeRO stage 3, where a layer is
        converted each time that it is gathered. A second copy of all layers would take more memory."""
        params = params if self.zero_stage == 3 else jax.tree.map(self._to_compute_dtype, params)
        return jax.tree.map(keep_memory_order, self.to_engine(params, gathered=self.zero_stage < 3))

    def _to_compute_dtype(self, x: jax.Array) -> jax.Array:
        return x.astype(self.compute_dtype)

    def grads_to_rest(self, params: Params, grads: Params) -> Params:
        """The engine's sums of gradients → float32, laid out like `params` at rest, summed over all devices.

        This is the transpose of `to_engine`, so the two cannot disagree.
        """
        cast = lambda tree: jax.tree.map(lambda x: x.astype(self.reduce_dtype), tree)  # noqa: E731
        trained = cast(partition(params, grads)[0])
        _, transpose = jax.vjp(lambda params: self.to_engine(params, gathered=self.zero_stage < 2), trained)
        return jax.tree.map(lambda x: x.astype(jnp.float32), transpose(cast(grads))[0])

    @property
    def float32_grads(self) -> bool:
        """Whether products give gradients in float32. With ZeRO stages 0 and 1, the sum over microbatches reads them right
        away, and in the compute dtype they are fewer bytes."""
        return self.zero_stage > 1 and self.reduce_dtype == jnp.float32

    def gather(self, part: str, params: Any) -> Any:
        """Parameters of a part of the model, as the engine holds them → as the model computes with them. Linear."""
        if self.zero_stage < 3:
            return params
        return jax.tree.map(gather_param, jax.tree.map(self._to_compute_dtype, params), self.param_layouts[part])

    def reduce(self, part: str, grads: dict[int, jax.Array]) -> dict[int, jax.Array]:
        """Gradients of a part of the model, by index of the trained leaf → float32, as they are summed over microbatches."""
        if self.zero_stage > 1:
            layouts = jax.tree.leaves(trained_layouts(self.param_layouts[part]))
            grads = {i: reduce_grad(grad.astype(self.reduce_dtype), layouts[i]) for i, grad in grads.items()}
        return {i: grad.astype(jnp.float32) for i, grad in grads.items()}

    def stage_functions(
        self, schedule: Schedule, params: Params, batch: Batch, *, train: bool = True, asked: Asked | None = None
    ) -> StageFunctions:
        """The model as the engine wants it.

        Args:
          params: from `engine_params`.
          batch: in microbatches.
          train: False in an evaluation.
          asked: the statistics of tokens. Default: those that the objective asks for.
        """
        model, split_sequence = self.model, not self.model.explicit and self.mesh.shape["sp"] > 1

        def constrain(x: jax.Array) -> jax.Array:
            return lax.with_sharding_constraint(x, P(None, "sp")) if split_sequence else x

        def block(layer: Params, x: jax.Array, batch: Batch, index: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            y, auxiliary = model.block_and_auxiliary(layer, x, self._token_info(batch, train, index))
            return constrain(y), {name: (batch["weights"] * a).sum() for name, a in auxiliary.items()}

        placement = LayerPlacement(model.num_layers, schedule.num_stages, schedule.num_chunks)
        is_split = any(layout.gather for layout in jax.tree.leaves(self.param_layouts["layers"]))
        stage = rank_and_size("pp")[0]
        layers = LayerFunctions(
            block,
            partial(self.gather, "layers"),
            partial(self.reduce, "layers"),
            trained_layouts(self.param_layouts["layers"]),
            float32_grads=self.float32_grads,
            overlap_param_gather=self.zero_stage == 3 and is_split and self.overlap_param_gather,
            overlap_grad_reduce=self.zero_stage > 1 and is_split and self.overlap_grad_reduce,
            num_real=jnp.asarray(placement.counts)[stage] if placement.is_padded else None,
            layer_index=jnp.asarray(placement.table, jnp.int32)[stage] if model.needs_layer else None,
            auxiliary_weights=model.auxiliary,
        )
        ends = EmbeddingAndLoss(
            model,
            self.param_layouts,
            self.gather,
            self.reduce,
            constrain,
            self.loss,
            asked or self.loss.objective.asked,
            train,
            float32_grads=self.float32_grads,
            within_documents=self.within_documents,
        )
        skips = model.explicit or all(self.mesh.shape[axis] == 1 for axis in TENSOR_AXES)
        return StageFunctions(self._in_parts(ends, params, batch), layers, skips)

    def _in_parts(self, ends: EmbeddingAndLoss, params: Params, batch: Batch) -> EmbeddingAndLoss:
        """The two ends in as few parts as keep each part small enough."""

        def shapes() -> tuple[jax.Array, jax.Array]:
            x = ends.embed(params, jax.tree.map(lambda a: a[0], batch))
            return x, self.model.head({part: self.gather(part, params[part]) for part in ("embed", "head")}, x)

        x, logits = jax.eval_shape(shapes)
        layouts = [layout for part in ("embed", "head") for layout in jax.tree.leaves(self.param_layouts[part])]
        tables = [layout for layout in layouts if "vocab" in layout.dims]
        # A part of the vocabulary must be the same on all shards.
        aligned = all(not layout.gather or layout.gather[1] != layout.dims.index("vocab") for layout in tables)
        if self.zero_stage == 3 and self.model.explicit and aligned:
            ways = math.prod(self.mesh.shape[axis] for axis in EXPLICIT_RULES["vocab"])
            largest = max(nbytes(logits.shape), *(nbytes(layout.shape) // ways for layout in tables))
            parts = least_parts(largest, MAX_VOCABULARY_BYTES, logits.shape[-1])
            keep = nbytes(logits.shape) <= MAX_KEPT_LOGITS_BYTES[self.recompute.granularity]
            return replace(ends, vocabulary_parts=parts, keep_logits=keep)
        # For an automatic model, XLA splits the logits over the tensor group, and each stage takes a share of the tokens.
        axes = () if self.model.explicit else ("pp", *TENSOR_AXES)
        size = nbytes(logits.shape) // math.prod(self.mesh.shape[axis] for axis in axes)
        return replace(ends, token_parts=least_parts(size, MAX_LOGITS_BYTES, x.shape[1]))

    def _token_info(self, batch: Batch, train: bool, layer: Any) -> TokenInfo:
        return token_info(self.model, batch, train=train, layer=layer, within_documents=self.within_documents)

    def microbatches(self, batch: Batch, schedule: Schedule, seed: jax.Array | None = None) -> Batch:
        """[rows, ...] → [microbatches, rows of one, ...].

        Args:
          seed: of the model's random numbers, uint32 [2]. None: 0.
        """
        split = jax.tree.map(lambda x: x.reshape(schedule.num_microbatches, -1, *x.shape[1:]), dict(batch))
        if self.model.is_random:
            seed = jnp.zeros(2, jnp.uint32) if seed is None else seed
            split["random"] = token_keys(seed, *split["tokens"].shape)
        return split

    def weighted(self, batch: Batch, scale: Any = None) -> tuple[Batch, jax.Array]:
        """(the batch with the objective's "weights", and "counts" if they differ; the sum of the counts).

        Args:
          scale: multiplies both so that the sum of loss times weight is `scale` times the loss of the global batch. If an
            objective gives no token a weight, that is NaN, and the step is skipped.
        """
        weights, counts = self.loss.weights(batch)
        total = sum_over(counts.sum(), REPLICA_AXES)
        found = {"weights": weights} if counts is weights else {"weights": weights, "counts": counts}
        if scale is not None:
            factor = scale / (total if self.loss.objective.weights else jnp.maximum(total, 1))
            found = {name: x * factor for name, x in found.items()}
        return {**batch, **found}, total

    def on_mesh(self, local: Callable, out_specs: Any, num_scalars: int = 0) -> Callable:
        """Runs `local`, a function of (params, batch, …scalars), on every device with the device's part of each. A scalar
        may be None."""
        local = attention_settings(self.attention)(local)
        if all(self.mesh.shape[axis] == 1 for axis in self.manual_axes):
            # Nothing is left to do by hand, and XLA's partitioner refuses manual sums over axes of size 1 beside
            # automatic ones.
            def automatic(*args: Any) -> Any:
                with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                    return local(*args)

            return automatic
        in_specs = (self.rest_specs, BATCH_SPEC, *[P()] * num_scalars)
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=self.manual_axes)

    @property
    def rest_specs(self) -> Any:
        return jax.tree.map(lambda layout: _only(layout.rest_spec, self.manual_axes), self.param_layouts)


def build_loss_and_grads(setup: StepSetup) -> Callable[..., tuple[jax.Array, Params]]:
    """Returns (params, batch, loss_scale=None, seed=None) → (loss, grads), to be called inside `jax.jit`, as
    `build_loss_metrics_and_grads` does, without the metrics."""
    whole = build_loss_metrics_and_grads(setup)

    def loss_and_grads(
        params: Params, batch: Batch, loss_scale: Any = None, seed: Any = None
    ) -> tuple[jax.Array, Params]:
        loss, _, grads = whole(params, batch, loss_scale, seed)
        return loss, grads

    return loss_and_grads


def build_loss_metrics_and_grads(setup: StepSetup) -> Callable[..., tuple[jax.Array, dict[str, jax.Array], Params]]:
    """Returns (params, batch, loss_scale=None, seed=None) → (loss, metrics, grads), to be called inside `jax.jit`.

    params: float32, each split by its layout's rest_spec; frozen ones in their layout's dtype. grads: float32, split likewise, and
      None at the frozen ones.
    batch: `tokens`, `targets`, `segment_ids`, `positions` int32 and `loss_mask` float32, each [global_batch, seq], and what the
      model and the objective take besides, split by `jaxpar.parallel.sharding.BATCH_SPEC`.
    loss_scale: float32 scalar that multiplies the loss during the backward pass.
    seed: uint32 [2], data of a `jax.random` key, for a model that draws random numbers. None: always the same numbers.
    loss: float32: the objective's, see `jaxpar.objectives.Objective`; by default nats a token, the mean over the valid tokens
      of the global batch. To it are added the auxiliary outputs, times their weights.
    metrics: {name: float32}: the objective's, and the model's auxiliary outputs, each the sum over blocks, averaged like the
      loss.
    """

    def local(
        params: Params, batch: Batch, loss_scale: jax.Array | None, seed: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array], Params]:
        scale = jnp.float32(1) if loss_scale is None else loss_scale
        weighted, _ = setup.weighted(batch, scale)
        schedule = setup.schedule_of(len(weighted["weights"]))
        rows = setup.microbatches(weighted, schedule, seed)
        engine_params = setup.engine_params(params)
        functions = setup.stage_functions(schedule, engine_params, rows)
        engine = Engine(schedule, functions, engine_params, rows, setup.recompute)
        loss, totals, auxiliary, grads = engine.loss_and_grads()
        grads = setup.grads_to_rest(params, grads)
        if loss_scale is not None:
            grads = jax.tree.map(lambda x: x / scale, grads)
        loss = sum_over(loss, varying_axes(loss)) / scale
        auxiliary = {name: sum_over(x, varying_axes(x)) / scale for name, x in auxiliary.items()}
        for name, weight in setup.model.auxiliary.items():
            loss += weight * auxiliary[name]
        return loss, {**finished(totals), **auxiliary}, grads

    # The metrics are scalars, the same on all devices, whatever their names.
    on_mesh = setup.on_mesh(local, (P(), P(), setup.rest_specs), num_scalars=2)

    def loss_metrics_and_grads(
        params: Params, batch: Batch, loss_scale: Any = None, seed: Any = None
    ) -> tuple[jax.Array, dict[str, jax.Array], Params]:
        return on_mesh(params, batch, loss_scale, seed)

    return loss_metrics_and_grads


def _only(spec: P, axes: set[str]) -> P:
    """The part of a spec that `shard_map` may name. It knows automatic axes from the arrays themselves."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return P(*(tuple(axis for axis in entry if axis in axes) or None for entry in entries))
