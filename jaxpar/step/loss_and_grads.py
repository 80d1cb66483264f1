"""Functions from parameters at rest and a global batch to loss and gradients, or to token losses, on any mesh.

    parameters at rest → gather (all-gather over dp, cp, in the compute dtype, once)
    shard_map: pipeline schedule over microbatches, float32 sums of gradients
    gradients → the transpose of the gather (reduce-scatter over dp, cp, in float32, once)

With ZeRO stage 2 the reduction happens layer by layer, as gradients come; with stage 3 the gather does too, forward and
backward. For an explicit model all five axes are manual; for an automatic one tp and sp are left to XLA.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpar.backward.recompute import Recompute
from jaxpar.models.protocol import FunctionalModel, Params
from jaxpar.parallel.collectives import (
    manual,
    rank_and_size,
    sum_over,
    varying_axes,
)
from jaxpar.parallel.mesh import AXES, REPLICA_AXES, TENSOR_AXES
from jaxpar.parallel.placement import LayerPlacement
from jaxpar.parallel.sharding import (
    BATCH_SPEC,
    EXPLICIT_RULES,
    ParamLayout,
    gather_param,
    mark_varying,
    place_layers,
    reduce_grad,
)
from jaxpar.parallel.zigzag import zigzag_order
from jaxpar.pipeline import engine
from jaxpar.pipeline.ends import Ends, joined, least_parts, nbytes, token_info
from jaxpar.pipeline.layers import as_it_lies
from jaxpar.pipeline.schedule import Schedule, forward_only

Batch = Mapping[str, jax.Array]
MAX_LOGITS_BYTES = 2**29  # float32 logits that a device holds at a time
MAX_VOCABULARY_BYTES = 2**28  # of these, and of an embedding or head, with ZeRO stage 3


@dataclass(frozen=True)
class StepSetup:
    """What the functions of this file are built from, and the way of parameters and gradients between rest and engine.

    Attributes:
      layouts: tree of `ParamLayout`, made for the same ZeRO stage and number of chunks.
      zero_stage: 0 to 3.
      overlap_param_gather, overlap_grad_reduce: of a layer, beside its neighbour's computation, where there are any.
      reduce_dtype: of gradients on their way over dp and cp; sums over microbatches are float32.
    """

    model: FunctionalModel
    mesh: Mesh
    layouts: Any
    schedule: Schedule
    compute_dtype: Any = jnp.float32
    recompute: Recompute = Recompute()  # noqa: RUF009 (frozen)
    zero_stage: int = 1
    reduce_dtype: Any = jnp.float32
    overlap_param_gather: bool = True
    overlap_grad_reduce: bool = True

    @property
    def manual_axes(self) -> set[str]:
        return set(AXES) if self.model.explicit else set(AXES) - set(TENSOR_AXES)

    def enter(self, params: Params, *, gathered: bool) -> Params:
        """Parameters at rest → as the engine holds them, the shards over dp and cp `gathered` or not. Linear."""
        # Sums over tp are left where the model's own collectives put them; all others wait for the end of the step.
        # The head of an automatic model works on another share of the tokens on each stage, see `jaxpar.pipeline.ends`.
        accumulate_axes = ("dp", "cp", "sp") if self.model.explicit else ("dp", "cp", "pp")

        def one(param: jax.Array, layout: ParamLayout) -> jax.Array:
            param = place_layers(param, layout)
            return mark_varying(gather_param(param, layout) if gathered else param, layout, accumulate_axes)

        return jax.tree.map(one, params, self.layouts)

    def leave(self, params: Params, grads: Params) -> Params:
        """Sums of the engine's gradients → like `params` at rest, summed over all devices, float32: the transpose of
        `enter`, so that the two cannot disagree."""
        cast = lambda tree: jax.tree.map(lambda x: x.astype(self.reduce_dtype), tree)  # noqa: E731
        _, transpose = jax.vjp(lambda params: self.enter(params, gathered=self.zero_stage < 2), cast(params))
        return jax.tree.map(lambda x: x.astype(jnp.float32), transpose(cast(grads))[0])

    def gather(self, part: str, params: Any) -> Any:
        """Parameters as the engine holds them → as the model computes with them. Linear."""
        return jax.tree.map(gather_param, params, self.layouts[part]) if self.zero_stage == 3 else params

    def reduce(self, part: str, grads: dict[int, jax.Array]) -> dict[int, jax.Array]:
        """Gradients, by index of the leaf → as they are summed up over microbatches, float32."""
        if self.zero_stage > 1:
            layouts = jax.tree.leaves(self.layouts[part])
            grads = {i: reduce_grad(grad.astype(self.reduce_dtype), layouts[i]) for i, grad in grads.items()}
        return {i: grad.astype(jnp.float32) for i, grad in grads.items()}

    def held(self, params: Params) -> Params:
        """Parameters at rest → in the compute dtype, as the engine holds them."""
        compute = jax.tree.map(lambda x: x.astype(self.compute_dtype), params)
        return jax.tree.map(as_it_lies, self.enter(compute, gathered=self.zero_stage < 3))

    def microbatches(self, batch: Batch) -> Batch:
        return jax.tree.map(lambda x: x.reshape(self.schedule.num_microbatches, -1, *x.shape[1:]), batch)

    def functions(self, params: Params, batch: Batch) -> engine.StageFunctions:
        """The model as the engine wants it. `params` as held, `batch` in microbatches."""
        model, split_sequence = self.model, not self.model.explicit and self.mesh.shape["sp"] > 1

        def constrain(x: jax.Array) -> jax.Array:
            return lax.with_sharding_constraint(x, P(None, "sp")) if split_sequence else x

        def block(layer: Params, x: jax.Array, batch: Batch) -> jax.Array:
            return constrain(model.block(layer, x, token_info(batch)))

        placement = LayerPlacement(model.num_layers, self.schedule.num_stages, self.schedule.num_chunks)
        num_real = jnp.asarray(placement.counts)[rank_and_size("pp")[0]] if placement.is_padded else None
        is_split = any(layout.gather for layout in jax.tree.leaves(self.layouts["layers"]))
        ends = self._in_parts(Ends(model, self.layouts, self.gather, self.reduce, constrain), params, batch)
        return engine.StageFunctions(
            ends,
            block,
            partial(self.gather, "layers"),
            partial(self.reduce, "layers"),
            prefetch=self.zero_stage == 3 and is_split and self.overlap_param_gather,
            defer=self.zero_stage > 1 and is_split and self.overlap_grad_reduce,
            num_real=num_real,
            skips=model.explicit or all(self.mesh.shape[axis] == 1 for axis in TENSOR_AXES),
        )

    def _in_parts(self, ends: Ends, params: Params, batch: Batch) -> Ends:
        """The ends in as few parts as are small enough."""

        def shapes() -> tuple[jax.Array, jax.Array]:
            x = ends.embed(params, jax.tree.map(lambda a: a[0], batch))
            return x, self.model.head({part: self.gather(part, params[part]) for part in ("embed", "head")}, x)

        x, logits = jax.eval_shape(shapes)
        layouts = [layout for part in ("embed", "head") for layout in jax.tree.leaves(self.layouts[part])]
        tables = [layout for layout in layouts if "vocab" in layout.dims]
        # A part of the vocabulary must be one on every shard.
        aligned = all(not layout.gather or layout.gather[1] != layout.dims.index("vocab") for layout in tables)
        if self.zero_stage == 3 and self.model.explicit and aligned:
            ways = math.prod(self.mesh.shape[axis] for axis in EXPLICIT_RULES["vocab"])
            largest = max(nbytes(logits.shape), *(nbytes(layout.shape) // ways for layout in tables))
            return replace(ends, vocabulary_parts=least_parts(largest, MAX_VOCABULARY_BYTES, logits.shape[-1]))
        # Of an automatic model XLA splits the logits over the tensor group, and each stage takes a share of the tokens.
        axes = () if self.model.explicit else ("pp", *TENSOR_AXES)
        size = nbytes(logits.shape) // math.prod(self.mesh.shape[axis] for axis in axes)
        return replace(ends, token_parts=least_parts(size, MAX_LOGITS_BYTES, x.shape[1]))

    def on_mesh(self, local: Callable, out_specs: Any) -> Callable:
        """`local` (params, batch, …scalars) on every device, each with its part."""
        if all(self.mesh.shape[axis] == 1 for axis in self.manual_axes):
            # Nothing is left to do by hand, and XLA's partitioner refuses manual sums over axes of size 1 beside
            # automatic ones.
            def automatic(*args: Any) -> Any:
                with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                    return local(*args)

            return automatic

        def manual(params: Params, batch: Batch, *scalars: jax.Array) -> Any:
            in_specs = (self.rest_specs, BATCH_SPEC, *[P()] * len(scalars))
            axes = self.manual_axes
            on_all = jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes)
            return on_all(params, batch, *scalars)

        return manual

    @property
    def rest_specs(self) -> Any:
        return jax.tree.map(lambda layout: _only(layout.rest_spec, self.manual_axes), self.layouts)


def build_loss_and_grads(setup: StepSetup) -> Callable[..., tuple[jax.Array, Params]]:
    """Returns (params, batch, loss_scale=None) → (loss, grads), to be called inside `jax.jit`.

    params: float32, each split by its layout's rest_spec; grads likewise.
    batch: `tokens`, `targets`, `segment_ids`, `positions` int32 and `loss_mask` float32, each [global_batch, seq],
      split by `jaxpar.parallel.sharding.BATCH_SPEC`.
    loss_scale: float32 scalar by which the loss is multiplied on its way through the backward pass.
    loss: float32, nats a token: the sum over valid tokens of the whole global batch over their count, on any layout.
    """

    def local(params: Params, batch: Batch, *loss_scale: jax.Array) -> tuple[jax.Array, Params]:
        scale = loss_scale[0] if loss_scale else jnp.float32(1)
        tokens = sum_over(batch["loss_mask"].sum(), REPLICA_AXES)
        rows = setup.microbatches({**batch, "weights": batch["loss_mask"] * (scale / jnp.maximum(tokens, 1))})
        held = setup.held(params)
        functions = setup.functions(held, rows)
        loss, grads = engine.loss_and_grads(setup.schedule, functions, held, rows, setup.recompute)
        grads = setup.leave(params, grads)
        if loss_scale:
            grads = jax.tree.map(lambda x: x / scale, grads)
        return sum_over(loss, varying_axes(loss)) / scale, grads

    def loss_and_grads(params: Params, batch: Batch, loss_scale: Any = None) -> tuple[jax.Array, Params]:
        return on_mesh(params, batch, *([] if loss_scale is None else [loss_scale]))

    on_mesh = setup.on_mesh(local, (P(), setup.rest_specs))
    return loss_and_grads


def build_evaluate(setup: StepSetup) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Returns (params, batch) → {"loss", "tokens", "token_losses"}, without gradients, to be called inside `jax.jit`.

    loss: float32, nats, the sum over valid tokens of the global batch; tokens: float32, their count.
    token_losses: float32 [global_batch, seq], -log p(target) of each token, in nats, tokens in natural order.
    """
    evaluating = replace(
        setup,
        schedule=forward_only(setup.schedule.num_stages, setup.schedule.num_microbatches, setup.schedule.num_chunks),
    )

    def local(params: Params, batch: Batch) -> dict[str, jax.Array]:
        rows = evaluating.microbatches({**batch, "weights": batch["loss_mask"]})
        held = evaluating.held(params)
        losses, weights = engine.evaluate(evaluating.schedule, evaluating.functions(held, rows), held, rows)
        loss = (losses * weights).sum()
        if not evaluating.model.explicit:
            losses = _from_all_stages(losses)
        return {
            "loss": sum_over(loss, varying_axes(loss)),
            "tokens": sum_over(batch["loss_mask"].sum(), REPLICA_AXES),
            "token_losses": joined(
                losses, math.prod(lax.axis_size(axis) for axis in manual("sp")), batch["tokens"].shape
            ),
        }

    on_mesh = evaluating.on_mesh(local, {"loss": P(), "tokens": P(), "token_losses": BATCH_SPEC})

    def evaluate(params: Params, batch: Batch) -> dict[str, jax.Array]:
        result = on_mesh(params, batch)
        order = zigzag_order(batch["tokens"].shape[1], setup.mesh.shape["cp"])
        return {**result, "token_losses": result["token_losses"][:, np.argsort(order)]}

    return evaluate


def _from_all_stages(shares: jax.Array) -> jax.Array:
    """Each stage's share of the tokens → all of them, on every stage."""
    stage, stages = rank_and_size("pp")
    if stages == 1:
        return shares
    share = shares.shape[-1]
    mine = jnp.arange(share * stages) // share == stage
    return sum_over(jnp.where(mine, jnp.tile(shares, stages), 0), ("pp",))


def _only(spec: P, axes: set[str]) -> P:
    """The part of a spec that `shard_map` may name: automatic axes are known from the arrays themselves."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return P(*(tuple(axis for axis in entry if axis in axes) or None for entry in entries))
