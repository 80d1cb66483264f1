"""A stage's layers, one after the other: forward, backward, and the gradient of the weights by itself.

The loops over layers are written out here, forward and backward, instead of differentiating through a scan. What a layer
keeps goes straight to its place among the microbatches in flight, and its gradients go straight into the sum, so neither
exists twice.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxpar.backward import LayerRun, Overlap, Pullback, Recompute, overlapped_loop, take_apart
from jaxpar.parallel.collectives import DEVICE, HOST, put_in, vary, varying_axes, zeros
from jaxpar.parallel.trained import partition
from jaxpar.pipeline.layer_group import LayerFunctions, LayerInfo, layer_group
from jaxpar.pipeline.schedule import Schedule

SavedValues = list[list[jax.Array]]  # for each LayerRun, for each value: [places, groups of the run, ...]


class Item(NamedTuple):
    """What a slot works on: a chunk of the stage's layers and one microbatch."""

    params: Any  # the stage's layers, leaves [chunks * layers of a chunk, ...], as `gather` takes them
    chunk: Any
    info: Any  # what `block` needs to know about the microbatch
    is_active: Any = True  # False: the slot is idle, and its gradients must not be added


class Place(NamedTuple):
    """Buffers, and the index in each of them that belongs to an item."""

    buffers: SavedValues
    index: Any


class Layers:
    """The layers of a stage.

    Args:
      params: the stage's layers, as in `Item`.
      x, info: examples to trace with.
    """

    def __init__(
        self,
        functions: LayerFunctions,
        schedule: Schedule,
        recompute: Recompute,
        params: Any,
        x: jax.Array,
        info: Any,
    ):
        leaves = jax.tree.leaves(params)
        per_chunk = leaves[0].shape[0] // schedule.num_chunks if leaves else 0  # 0: a model without a stack
        self._functions, self._offload = functions, recompute.offload
        splits_weights, example = schedule.weight is not None, Item(params, 0, info)
        self._runs = [
            _RunOfLayers(
                functions, run, per_chunk, example, x, splits_weights=splits_weights, offload=recompute.offload
            )
            for run in recompute.layer_runs(per_chunk)
        ]

    @property
    def auxiliary(self) -> dict[str, Any]:
        """Avals of the auxiliary outputs."""
        return self._runs[0].pullback.more if self._runs else {}

    def kept(self, num_places: int) -> SavedValues:
        """Buffers for what `forward` keeps."""
        space = HOST if self._offload else DEVICE
        return [[zeros(aval, num_places, run.count, space=space) for aval in run.pullback.kept] for run in self._runs]

    def pending(self, num_places: int) -> SavedValues:
        """Buffers for what `backward` leaves to `weight_grad`."""
        return [[zeros(aval, num_places, run.count) for aval in run.pullback.pending] for run in self._runs]

    def no_buffers(self) -> SavedValues:
        """For an evaluation, which keeps nothing."""
        return [[] for _ in self._runs]

    def zero_grads(self, params: Any) -> Any:
        """Float32 zeros like the sums of the layers' gradients."""
        leaves, tree = jax.tree.flatten(partition(self._functions.gather(params), self._functions.like)[0])
        return jax.tree.unflatten(tree, [zeros(g) for g in self._functions.reduce(dict(enumerate(leaves))).values()])

    def forward(self, item: Item, x: jax.Array, kept: Place) -> tuple[jax.Array, dict[str, jax.Array], SavedValues]:
        """(the chunk's output, its auxiliary outputs, the buffers with what its backward pass needs). If there are no
        buffers, nothing is kept."""
        result, auxiliary = [], {name: zeros(aval) for name, aval in self.auxiliary.items()}
        for run, buffers in zip(self._runs, kept.buffers, strict=True):
            x, found, buffers = run.forward(item, x, buffers, kept.index)
            auxiliary = {name: total + found[name] for name, total in auxiliary.items()}
            result.append(buffers)
        return x, auxiliary, result

    def backward(
        self, item: Item, y_grad: jax.Array, grads: Any, kept: Place, pending: Place
    ) -> tuple[jax.Array, Any, SavedValues]:
        """(gradient of the chunk's input, grads with this chunk's added, the pending buffers)."""
        result = []
        for run, of_run, buffers in reversed(list(zip(self._runs, kept.buffers, pending.buffers, strict=True))):
            y_grad, grads, buffers = run.backward(item, y_grad, grads, (of_run, kept.index), (buffers, pending.index))
            result.append(buffers)
        return y_grad, grads, result[::-1]

    def weight_grad(self, item: Item, grads: Any, kept: Place, pending: Place) -> Any:
        """grads, with what `backward` left out added."""
        for run, of_run, handed_over in zip(self._runs, kept.buffers, pending.buffers, strict=True):
            grads = run.weight_grad(item, grads, (of_run, kept.index), (handed_over, pending.index))
        return grads


_RunPlace = tuple[list[jax.Array], Any]  # one run's part of a `Place`


class _RunOfLayers:
    """The layers of one `LayerRun`.

    Attributes:
      count: number of groups of layers.
      pullback: the backward pass of a group, taken apart.
    """

    def __init__(
        self,
        functions: LayerFunctions,
        run: LayerRun,
        per_chunk: int,
        example: Item,
        x: jax.Array,
        *,
        splits_weights: bool,
        offload: bool,
    ):
        self._functions, self._per_chunk = functions, per_chunk
        self._run_first, self._size, self.count = run.first, run.size, run.count
        self._splits_weights, self._offload = splits_weights, offload
        group = layer_group(functions, run.size, unrolled=splits_weights)
        params, info = self._params_and_info(example, 0, self._params(example, 0))
        self.pullback: Pullback = take_apart(
            group,
            params,
            x,
            info,
            again=run.again,
            split=splits_weights,
            float32_grads=functions.float32_grads,
        )

    def forward(
        self, item: Item, x: jax.Array, kept: list[jax.Array], index: Any
    ) -> tuple[jax.Array, dict[str, jax.Array], list[jax.Array]]:
        def fetch(i: Any) -> Any:
            return self._params(item, i)

        def compute(carry: Any, i: Any, params: Any) -> tuple[Any, Any]:
            x, auxiliary, kept = carry
            params, info = self._params_and_info(item, i, params)
            x, found, values = self.pullback.forward(params, x, info)
            return (x, jax.tree.map(jnp.add, auxiliary, found), kept), values

        def store(carry: Any, i: Any, values: Any) -> Any:
            x, auxiliary, kept = carry
            return x, auxiliary, _put(kept, values, index, i)

        gathers = self._functions.overlap_param_gather
        overlap = Overlap(prefetch=gathers, defer=self._offload, in_pairs=gathers)
        auxiliary = jax.tree.map(zeros, self.pullback.more)
        return overlapped_loop((x, auxiliary, kept), self.count, fetch, compute, store, overlap)

    def backward(
        self, item: Item, y_grad: jax.Array, grads: Any, kept: _RunPlace, pending: _RunPlace
    ) -> tuple[jax.Array, Any, list[jax.Array]]:
        def fetch(i: Any) -> Any:
            return self._params(item, i), _take(*kept, i) if self._offload else None

        def compute(carry: Any, i: Any, fetched: Any) -> tuple[Any, Any]:
            y_grad, grads, buffers = carry
            params, values = fetched
            if values is None:
                overlap = self._backward_overlap
                values = _take(*kept, _after(i, [y_grad], varying_axes(y_grad)) if overlap.in_pairs else i)
            params, info = self._params_and_info(item, i, params)
            if self._splits_weights:
                found, x_grad, handed_over = self.pullback.input_grad(values, params, info, y_grad)
                buffers = _put(buffers, handed_over, pending[1], i)
            else:
                param_grads, x_grad = self.pullback.grads(values, params, info, y_grad)
                found = dict(enumerate(jax.tree.leaves(param_grads)))
            if self._functions.overlap_grad_reduce:
                # What the next layer makes can then lie where the gradients in transfer were, and need not be copied there.
                x_grad = _after(x_grad, jax.tree.leaves(grads), varying_axes(x_grad))
            return (x_grad, grads, buffers), found

        def store(carry: Any, i: Any, found: Any) -> Any:
            x_grad, grads, buffers = carry
            return x_grad, self._accumulate(item, grads, found, i), buffers

        carry = y_grad, grads, pending[0]
        return overlapped_loop(carry, self.count, fetch, compute, store, self._backward_overlap, reverse=True)

    def weight_grad(self, item: Item, grads: Any, kept: _RunPlace, pending: _RunPlace) -> Any:
        def fetch(i: Any) -> Any:
            values = _take(*kept, i), _take(*pending, i)
            return self._params(item, i), *values

        def compute(grads: Any, i: Any, fetched: Any) -> tuple[Any, Any]:
            params, values, handed_over = fetched
            params, info = self._params_and_info(item, i, params)
            return grads, self.pullback.weight_grad(values, params, info, handed_over)

        def store(grads: Any, i: Any, found: Any) -> Any:
            return self._accumulate(item, grads, found, i)

        return overlapped_loop(grads, self.count, fetch, compute, store, self._backward_overlap)

    @property
    def _backward_overlap(self) -> Overlap:
        gathers, reduces = self._functions.overlap_param_gather, self._functions.overlap_grad_reduce
        return Overlap(prefetch=gathers or self._offload, defer=reduces, in_pairs=gathers or reduces)

    def _first(self, item: Item, i: Any) -> Any:
        """Index of the first layer of group i among the stage's layers."""
        return item.chunk * self._per_chunk + self._run_first + i * self._size

    def _params(self, item: Item, i: Any) -> Any:
        first = self._first(item, i)
        stacked = jax.tree.map(lambda p: lax.dynamic_slice_in_dim(p, first, self._size), item.params)
        group = self._functions.gather(stacked)
        return group if self._size > 1 else jax.tree.map(lambda p: p[0], group)

    def _params_and_info(self, item: Item, i: Any, params: Any) -> tuple[Any, LayerInfo]:
        """(the trained parameters of group i, what it is told). `params`: all of them."""
        trained, frozen = partition(params, self._functions.like)
        num_real, layer_index = self._functions.num_real, self._functions.layer_index
        is_real = index = None
        if num_real is not None:
            is_real = self._run_first + i * self._size + jnp.arange(self._size) < num_real[item.chunk]
        if layer_index is not None:
            first = self._run_first + i * self._size
            index = lax.dynamic_slice_in_dim(layer_index[item.chunk], first, self._size)
        return trained, LayerInfo(item.info, is_real, index, frozen)

    def _accumulate(self, item: Item, grads: Any, found: dict[int, jax.Array], i: Any) -> Any:
        totals, tree = jax.tree.flatten(grads)
        stacked = {leaf: g if self._size > 1 else g[None] for leaf, g in found.items()}
        if self._functions.overlap_grad_reduce:
            _in_order(totals, stacked)
        for leaf, g in self._functions.reduce(stacked).items():
            # The gradient of an idle slot may be anything, even NaN.
            g = jnp.where(item.is_active, g, 0).astype(totals[leaf].dtype)
            first = self._first(item, i)
            g += lax.dynamic_slice_in_dim(totals[leaf], first, self._size)
            totals[leaf] = keep_memory_order(lax.dynamic_update_slice_in_dim(totals[leaf], g, first, 0))
        return jax.tree.unflatten(tree, totals)


def _after(x: Any, others: Sequence[jax.Array], axes: tuple[str, ...]) -> jax.Array:
    """`x`, varying over `axes` and made to depend on `others`. XLA drops barriers before it decides on copies, so the
    dependence is arithmetic: 0 times an element of each. (Where that is NaN, the step is lost anyway, or the slot is idle and
    what it makes is dropped.)"""
    elements = []
    for other in others:
        rest = tuple(axis for axis in varying_axes(other) if axis not in axes)
        if all(lax.axis_size(axis) == 1 for axis in rest):  # otherwise the sum would be a transfer
            elements.append(vary(lax.psum(other[(0,) * other.ndim], rest), axes).astype(jnp.float32))
    x = vary(jnp.asarray(x), axes)
    return x + (sum(elements[1:], elements[0]) * 0).astype(x.dtype) if elements else x


def _in_order(totals: list[jax.Array], found: dict[int, jax.Array]) -> None:
    """Makes `found` wait for `totals`. Otherwise XLA would combine the transfers of two layers, and both layers would stay
    in memory."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for leaf in found:  # the results of a barrier all vary over the same axes
        alike.setdefault(varying_axes(totals[leaf]), []).append(leaf)
    for leaves in alike.values():
        held = lax.optimization_barrier([(found[leaf], totals[leaf]) for leaf in leaves])
        for leaf, (g, total) in zip(leaves, held, strict=True):
            found[leaf], totals[leaf] = g, total


def _put(buffers: Sequence[jax.Array], values: Sequence[jax.Array], index: Any, i: Any) -> list[jax.Array]:
    """The buffers with values at [index, i]; without buffers, none."""

    def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
        value = put_in(jax.typeof(buffer).memory_space, value)
        return lax.dynamic_update_slice(buffer, value[None, None], (index, i, *[0] * value.ndim))

    return [put(*pair) for pair in zip(buffers, values, strict=bool(buffers))]


def _take(buffers: Sequence[jax.Array], index: Any, i: Any) -> list[jax.Array]:
    def take(buffer: jax.Array) -> jax.Array:
        shape = (1, 1, *buffer.shape[2:])
        x = lax.dynamic_slice(buffer, (index, i, *[0] * (buffer.ndim - 2)), shape)[0, 0]
        return keep_memory_order(put_in(DEVICE, x))

    return [take(buffer) for buffer in buffers]


def keep_memory_order(x: jax.Array) -> jax.Array:
    """Fixes the order of dimensions in memory of a slice of a large array. A product may want the slice transposed, and
    XLA would transpose the whole array for it: a second copy."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
