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

from jaxpar.backward.overlap import overlapped_loop
from jaxpar.backward.pullback import Pullback
from jaxpar.backward.recompute import LayerRun, Recompute
from jaxpar.parallel.collectives import DEVICE, HOST, put_in, varying_axes, zeros

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
      prefetch: a layer is gathered while the one before it computes.
      defer: its gradients are reduced while the next one computes.
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
        prefetch: bool,
        defer: bool,
    ):
        leaves = jax.tree.leaves(params)
        self._per_chunk = leaves[0].shape[0] // num_chunks if leaves else 0  # none: a model without a stack
        self._num_real, self._gather, self._reduce, self._split = num_real, gather, reduce, split
        self._prefetch, self._defer, self._offload = prefetch, defer, recompute.offload
        self._runs: list[tuple[LayerRun, Pullback]] = []
        for run in recompute.runs(self._per_chunk):
            group = _group(block, run.size, unrolled=split)
            example = self._group_params(params, run, 0, 0), x, self._group_info(info, run, 0, 0)
            self._runs.append((run, Pullback(group, *example, recompute=run.recompute, split=split)))

    def kept(self, num_places: int) -> Buffers:
        """Buffers for what `forward` keeps."""
        space = HOST if self._offload else DEVICE
        return [
            [zeros(aval, num_places, run.count, space=space) for aval in pullback.kept] for run, pullback in self._runs
        ]

    def zero_grads(self, params: Any) -> Any:
        """Float32 zeros like the sums of the layers' gradients."""
        leaves, tree = jax.tree.flatten(self._gather(params))
        return jax.tree.unflatten(tree, [zeros(g) for g in self._reduce(dict(enumerate(leaves))).values()])

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
        for (run, pullback), buffers in zip(self._runs, kept, strict=True):

            def fetch(i, run=run):
                return self._group_params(params, run, chunk, i)

            def compute(carry, i, group, run=run, pullback=pullback):
                x, buffers = carry
                x, values = pullback.forward(group, x, self._group_info(info, run, chunk, i))
                return (x, buffers), values

            def store(carry, i, values):
                x, buffers = carry
                return x, _put(buffers, values, place, i)

            ways = {"ahead": self._prefetch, "behind": self._offload}
            x, buffers = overlapped_loop((x, buffers), run.count, fetch, compute, store, **ways)
            result.append(buffers)
        return x, result

    def backward(
        self, params: Any, chunk: Any, grads: Any, y_grad: jax.Array, info: Any, kept: Buffers, place: Any,
        pending: Buffers, pending_place: Any, active: Any,
    ) -> tuple[jax.Array, Any, Buffers]:  # fmt: skip
        """(gradient of the chunk's input, grads with this chunk's added where `active`, pending)."""
        result = []
        for (run, pullback), of_run, buffers in reversed(list(zip(self._runs, kept, pending, strict=True))):

            def fetch(i, run=run, of_run=of_run):
                return self._group_params(params, run, chunk, i), _take(of_run, place, i)

            def compute(carry, i, fetched, run=run, pullback=pullback):
                y_grad, grads, buffers = carry
                group, values = fetched
                group_info = self._group_info(info, run, chunk, i)
                if self._split:
                    found, x_grad, handed_over = pullback.input_grad(values, group, group_info, y_grad)
                    buffers = _put(buffers, handed_over, pending_place, i)
                else:
                    group_grads, x_grad = pullback.grads(values, group, group_info, y_grad)
                    found = dict(enumerate(jax.tree.leaves(group_grads)))
                return (x_grad, grads, buffers), found

            def store(carry, i, found, run=run):
                x_grad, grads, buffers = carry
                return x_grad, self._accumulate(grads, found, run, chunk, i, active), buffers

            y_grad, grads, buffers = overlapped_loop(
                (y_grad, grads, buffers), run.count, fetch, compute, store,
                ahead=self._prefetch or self._offload, behind=self._defer, reverse=True,
            )  # fmt: skip
            result.append(buffers)
        return y_grad, grads, result[::-1]

    def weight_grad(
        self, params: Any, chunk: Any, grads: Any, info: Any, kept: Buffers, place: Any,
        pending: Buffers, pending_place: Any, active: Any,
    ) -> Any:  # fmt: skip
        """grads with what `backward` left out added where `active`."""
        for (run, pullback), of_run, handed_over in zip(self._runs, kept, pending, strict=True):

            def fetch(i, run=run, of_run=of_run, handed_over=handed_over):
                values = _take(of_run, place, i), _take(handed_over, pending_place, i)
                return self._group_params(params, run, chunk, i), *values

            def compute(grads, i, fetched, run=run, pullback=pullback):
                group, values, handed_over = fetched
                return grads, pullback.weight_grad(values, group, self._group_info(info, run, chunk, i), handed_over)

            def store(grads, i, found, run=run):
                return self._accumulate(grads, found, run, chunk, i, active)

            ways = {"ahead": self._prefetch or self._offload, "behind": self._defer}
            grads = overlapped_loop(grads, run.count, fetch, compute, store, **ways)
        return grads

    def _first(self, run: LayerRun, chunk: Any, i: Any) -> Any:
        return chunk * self._per_chunk + run.first + i * run.size

    def _group_params(self, params: Any, run: LayerRun, chunk: Any, i: Any) -> Any:
        first = self._first(run, chunk, i)
        group = self._gather(jax.tree.map(lambda p: lax.dynamic_slice_in_dim(p, first, run.size), params))
        return group if run.size > 1 else jax.tree.map(lambda p: p[0], group)

    def _group_info(self, info: Any, run: LayerRun, chunk: Any, i: Any) -> tuple[Any, jax.Array | None]:
        if self._num_real is None:
            return info, None
        return info, run.first + i * run.size + jnp.arange(run.size) < self._num_real[chunk]

    def _in_order(self, totals: list[jax.Array], found: dict[int, jax.Array]) -> None:
        """Lets `found` wait for `totals`. XLA would combine the transfers of two layers, and both would stay in memory."""
        alike: dict[tuple[str, ...], list[int]] = {}
        for leaf in found:  # a barrier's results all vary over the same axes
            alike.setdefault(varying_axes(totals[leaf]), []).append(leaf)
        for leaves in alike.values():
            held = lax.optimization_barrier([(found[leaf], totals[leaf]) for leaf in leaves])
            for leaf, (g, total) in zip(leaves, held, strict=True):
                found[leaf], totals[leaf] = g, total

    def _accumulate(
        self, grads: Any, found: dict[int, jax.Array], run: LayerRun, chunk: Any, i: Any, active: Any
    ) -> Any:
        totals, tree = jax.tree.flatten(grads)
        stacked = {leaf: g if run.size > 1 else g[None] for leaf, g in found.items()}
        if self._defer:
            self._in_order(totals, stacked)
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
        value = put_in(jax.typeof(buffer).memory_space, value)
        return lax.dynamic_update_slice(buffer, value[None, None], (place, i, *[0] * value.ndim))

    return [put(*pair) for pair in zip(buffers, values, strict=bool(buffers))]


def _take(buffers: Sequence[jax.Array], place: Any, i: Any) -> list[jax.Array]:
    def take(buffer: jax.Array) -> jax.Array:
        shape = (1, 1, *buffer.shape[2:])
        x = lax.dynamic_slice(buffer, (place, i, *[0] * (buffer.ndim - 2)), shape)[0, 0]
        return as_it_lies(put_in(DEVICE, x))

    return [take(buffer) for buffer in buffers]


def as_it_lies(x: jax.Array) -> jax.Array:
    """A slice of a large array. A product may want it transposed, and XLA would give the whole array that layout: a second
    copy of it all."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
