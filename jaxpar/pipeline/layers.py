"""A stage's layers, one after the other: forward, backward, and the gradient of the weights apart.

The loops over layers are written out here, forward and backward, instead of differentiating through a scan: what a
layer keeps goes straight to its place among the microbatches in flight, and what it yields straight into the sum of the
gradients, so neither exists a second time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxpar.collectives import zeros
from jaxpar.pipeline.pullback import Pullback
from jaxpar.recompute import Recompute, Run

Buffers = list[list[jax.Array]]  # for each run, for each value: [places, groups of the run, ...]
Linear = Callable[[Any], Any]


class Layers:
    """The layers of a stage, in its chunks.

    Args:
      block: (one layer's parameters, x, info) → x.
      recompute: what to keep.
      params: the stage's layers, leaves [chunks · layers, ...], as `gather` takes them.
      num_real: int [chunks], how many of a chunk's layers there are; the others do nothing. None: all.
      x, info: examples.
      gather: stacked layers → what `block` takes.
      reduce: gradients of stacked layers → what is summed up.
      split: the gradient of the weights has a slot of its own.
    """

    def __init__(
        self,
        block: Callable[[Any, jax.Array, Any], jax.Array],
        recompute: Recompute,
        params: Any,
        num_chunks: int,
        num_real: jax.Array | None,
        x: jax.Array,
        info: Any,
        *,
        gather: Linear,
        reduce: Linear,
        split: bool,
    ):
        leaves = jax.tree.leaves(params)
        self._per_chunk = leaves[0].shape[0] // num_chunks if leaves else 0  # none: a model without a stack
        self._num_real, self._gather, self._reduce, self._split = num_real, gather, reduce, split
        self._runs: list[tuple[Run, Pullback]] = []
        for run in recompute.runs(self._per_chunk):
            group = _group(block, run.size, unrolled=split)
            example = self._group_params(params, run, 0, 0), x, self._group_info(info, run, 0, 0)
            self._runs.append((run, Pullback(group, *example, recompute=run.recompute, split=split)))

    def kept(self, num_places: int) -> Buffers:
        """Buffers for what `forward` keeps."""
        return [[zeros(aval, num_places, run.count) for aval in pullback.kept] for run, pullback in self._runs]

    def nothing(self) -> Buffers:
        """No buffers, for an evaluation."""
        return [[] for _ in self._runs]

    def pending(self, num_places: int) -> Buffers:
        """Buffers for what `backward` leaves to `weight_grad`."""
        return [[zeros(aval, num_places, run.count) for aval in pullback.pending] for run, pullback in self._runs]

    def forward(
        self, params: Any, chunk: Any, x: jax.Array, info: Any, kept: Buffers, place: Any
    ) -> tuple[jax.Array, Buffers]:
        """(the chunk's output, kept with what its backward pass needs at `place`); nothing is, if kept has no buffers."""
        result = []
        for index, (run, pullback) in enumerate(self._runs):

            def body(carry, i, run=run, pullback=pullback):
                x, buffers = carry
                group = self._group_params(params, run, chunk, i)
                x, values = pullback.forward(group, x, self._group_info(info, run, chunk, i))
                return (x, _put(buffers, values, place, i)), None

            (x, buffers), _ = lax.scan(body, (x, kept[index]), jnp.arange(run.count))
            result.append(buffers)
        return x, result

    def backward(
        self, params: Any, chunk: Any, grads: Any, y_grad: jax.Array, info: Any, kept: Buffers, place: Any,
        pending: Buffers, pending_place: Any, active: Any,
    ) -> tuple[jax.Array, Any, Buffers]:  # fmt: skip
        """(gradient of the chunk's input, grads with this chunk's added where `active`, pending)."""
        result = []
        for index, (run, pullback) in reversed(list(enumerate(self._runs))):

            def body(carry, i, index=index, run=run, pullback=pullback):
                y_grad, grads, buffers = carry
                group, group_info = self._group_params(params, run, chunk, i), self._group_info(info, run, chunk, i)
                values = _take(kept[index], place, i)
                if self._split:
                    found, x_grad, handed_over = pullback.input_grad(values, group, group_info, y_grad)
                    buffers = _put(buffers, handed_over, pending_place, i)
                else:
                    group_grads, x_grad = pullback.grads(values, group, group_info, y_grad)
                    found = dict(enumerate(jax.tree.leaves(group_grads)))
                return (x_grad, self._accumulate(grads, found, run, chunk, i, active), buffers), None

            carry = (y_grad, grads, pending[index])
            (y_grad, grads, buffers), _ = lax.scan(body, carry, jnp.arange(run.count), reverse=True)
            result.append(buffers)
        return y_grad, grads, result[::-1]

    def weight_grad(
        self, params: Any, chunk: Any, grads: Any, info: Any, kept: Buffers, place: Any,
        pending: Buffers, pending_place: Any, active: Any,
    ) -> Any:  # fmt: skip
        """grads with what `backward` left out added where `active`."""
        for index, (run, pullback) in enumerate(self._runs):

            def body(grads, i, index=index, run=run, pullback=pullback):
                group, group_info = self._group_params(params, run, chunk, i), self._group_info(info, run, chunk, i)
                handed_over = _take(pending[index], pending_place, i)
                found = pullback.weight_grad(_take(kept[index], place, i), group, group_info, handed_over)
                return self._accumulate(grads, found, run, chunk, i, active), None

            grads, _ = lax.scan(body, grads, jnp.arange(run.count))
        return grads

    def _first(self, run: Run, chunk: Any, i: Any) -> Any:
        return chunk * self._per_chunk + run.first + i * run.size

    def _group_params(self, params: Any, run: Run, chunk: Any, i: Any) -> Any:
        first = self._first(run, chunk, i)
        group = self._gather(jax.tree.map(lambda p: lax.dynamic_slice_in_dim(p, first, run.size), params))
        return group if run.size > 1 else jax.tree.map(lambda p: p[0], group)

    def _group_info(self, info: Any, run: Run, chunk: Any, i: Any) -> tuple[Any, jax.Array | None]:
        if self._num_real is None:
            return info, None
        return info, run.first + i * run.size + jnp.arange(run.size) < self._num_real[chunk]

    def _accumulate(self, grads: Any, found: dict[int, jax.Array], run: Run, chunk: Any, i: Any, active: Any) -> Any:
        totals, tree = jax.tree.flatten(grads)
        stacked = {leaf: g if run.size > 1 else g[None] for leaf, g in found.items()}
        for leaf, g in self._reduce(stacked).items():
            g = jnp.where(active, g, 0).astype(totals[leaf].dtype)  # an idle slot's may be anything, NaN too
            first = self._first(run, chunk, i)
            g += lax.dynamic_slice_in_dim(totals[leaf], first, run.size)
            totals[leaf] = lax.dynamic_update_slice_in_dim(totals[leaf], g, first, 0)
        return jax.tree.unflatten(tree, totals)


def _group(block: Callable, size: int, *, unrolled: bool) -> Callable[[Any, jax.Array, Any], jax.Array]:
    """`size` layers as one function of their parameters, x, and (info, which of them are real)."""

    def layer(params: Any, x: jax.Array, info: Any, real: Any) -> jax.Array:
        y = block(params, x, info)
        return y if real is None else jnp.where(real, y, x)

    def group(params: Any, x: jax.Array, info: Any) -> jax.Array:
        info, real = info
        if size == 1:
            return layer(params, x, info, None if real is None else real[0])
        if unrolled:  # W is found among products that are not inside a loop
            for i in range(size):
                one, is_real = jax.tree.map(lambda p, i=i: p[i], (params, real))
                x = layer(one, x, info, is_real)
            return x
        return lax.scan(lambda x, each: (layer(each[0], x, info, each[1]), None), x, (params, real))[0]

    return group


def _put(buffers: Sequence[jax.Array], values: Sequence[jax.Array], place: Any, i: Any) -> list[jax.Array]:
    """Buffers with values at [place, i]; none where there are no buffers."""

    def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(buffer, value[None, None], (place, i, *[0] * value.ndim))

    return [put(*pair) for pair in zip(buffers, values, strict=bool(buffers))]


def _take(buffers: Sequence[jax.Array], place: Any, i: Any) -> list[jax.Array]:
    def take(buffer: jax.Array) -> jax.Array:
        shape = (1, 1, *buffer.shape[2:])
        x = lax.dynamic_slice(buffer, (place, i, *[0] * (buffer.ndim - 2)), shape)[0, 0]
        # A product may want it transposed. XLA would give the whole buffer that layout: a second copy of it all.
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    return [take(buffer) for buffer in buffers]
