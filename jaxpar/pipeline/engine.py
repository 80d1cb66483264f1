"""The pipeline engine: runs any schedule table inside `shard_map`, forward and backward.

All stages run one program, a loop over ticks. A tick's F slot computes a chunk of this stage's layers on one microbatch
and keeps what the backward pass needs; its B slot takes that out again, and its W slot, in tables that have one, what B
left over. Which item, which place: the table says so, and an idle slot works on garbage that nobody reads.

Every collective stands where all stages execute it: `ppermute` in a branch that stages take differently gives wrong
numbers on some backends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.collectives import rank_and_size, vary, varying_axes, zeros
from jaxpar.pipeline.layers import Buffers, Layers
from jaxpar.pipeline.schedule import IDLE, Schedule, Segment
from jaxpar.recompute import Recompute

Row = dict[str, jax.Array]  # a tick's line of every table


class StageFunctions(NamedTuple):
    """What the engine pipelines. `params` is {"embed", "layers", "head"}, `batch` one microbatch's arrays.

    Attributes:
      embed: (params["embed"], batch) → activations that enter the first stage. All stages call it together.
      block: (one layer's parameters, activations, batch) → activations.
      token_losses: ({"embed", "head"}, activations, batch) → (losses, weights) of tokens, [batch, any] each. All stages
        call it together, only the last one's activations count.
      cut: (activations, batch) → both in equal parts of the tokens, [parts, ...], whose losses are computed one after the
        other: the logits of a whole microbatch may be larger than everything else.
      gather: (part, parameters as the engine holds them) → as the functions take them. Linear.
      reduce: (part, {index of the leaf: gradient}) → the same as it is summed up over microbatches, float32. Linear.
      num_real: int [chunks] of this stage, see `jaxpar.pipeline.layers.Layers`.
    """

    embed: Callable[[Any, Any], jax.Array]
    block: Callable[[Any, jax.Array, Any], jax.Array]
    token_losses: Callable[[Any, jax.Array, Any], tuple[jax.Array, jax.Array]]
    cut: Callable[[jax.Array, Any], tuple[jax.Array, Any]]
    gather: Callable[[str, Any], Any]
    reduce: Callable[[str, dict[int, jax.Array]], dict[int, jax.Array]]
    num_real: jax.Array | None = None


class _Carry(NamedTuple):
    from_below: jax.Array  # [places, ...]: activations that arrived from the virtual stage below
    from_above: jax.Array  # [places, ...]: gradients that arrived from the one above
    kept: Buffers
    pending: Buffers
    outputs: jax.Array  # [places, ...]: on the last stage, outputs that wait for the loss
    loss: jax.Array
    grads: Any


def loss_and_grads(
    schedule: Schedule, functions: StageFunctions, params: Any, batch: Any, recompute: Recompute
) -> tuple[jax.Array, Any]:
    """Loss and gradients of a whole batch, inside `shard_map` with pp manual.

    Args:
      params: {"embed", "layers", "head"}, each marked as varying over the axes on which the caller will reduce.
      batch: tree of arrays [microbatches, ...].

    Returns:
      (loss, grads): the sum over the microbatches and tokens of this device of loss times weight; grads float32, like
      `params` after `functions.reduce`.
    """
    return _Engine(schedule, functions, params, batch, recompute).loss_and_grads()


def evaluate(schedule: Schedule, functions: StageFunctions, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """(losses, weights) of each token, [microbatches, parts, batch, any] each, with a table that only runs forward."""
    return _Engine(schedule, functions, params, batch, Recompute()).evaluate()


class _Engine:
    def __init__(self, schedule: Schedule, functions: StageFunctions, params: Any, batch: Any, recompute: Recompute):
        self.schedule, self.functions, self.params, self.batch = schedule, functions, params, batch
        self.stage, _ = rank_and_size("pp")
        self.last = schedule.num_stages - 1
        self.num_virtual = schedule.num_stages * schedule.num_chunks
        self.example = jax.eval_shape(lambda: self._embed(params["embed"], jnp.int32(0)))
        self.layers = Layers(
            functions.block,
            recompute,
            params["layers"],
            schedule.num_chunks,
            functions.num_real,
            zeros(self.example),
            self._microbatch(vary(jnp.int32(0), ("pp",))),
            gather=lambda layers: functions.gather("layers", layers),
            reduce=lambda grads: functions.reduce("layers", grads),
            split=schedule.weight is not None,
        )

    def loss_and_grads(self) -> tuple[jax.Array, Any]:
        sizes, start = self.schedule.buffers.sizes, self._microbatch(0)
        loss = jax.eval_shape(lambda: self._loss(self._gather_outer(), zeros(self.example), start))
        carry = _Carry(
            from_below=zeros(self.example, sizes["from_below"]),
            from_above=zeros(self.example, sizes["from_above"]),
            kept=self.layers.kept(sizes["kept"]),
            pending=self.layers.pending(sizes.get("pending", 1)),
            outputs=zeros(self.example, sizes["outputs"]),
            loss=zeros(loss),
            grads={part: self._zero_grads(part) for part in self.params},
        )
        for segment in self.schedule.segments:
            carry = self._scan(self._tick, carry, segment)[0]
        return carry.loss, carry.grads

    def evaluate(self) -> tuple[jax.Array, jax.Array]:
        sizes = self.schedule.buffers.sizes
        carry = zeros(self.example, sizes["from_below"])

        def tick(from_below: jax.Array, row: Row, segment: Segment) -> tuple[jax.Array, Any]:
            y, _ = self._forward(from_below, self.layers.nothing(), row, segment)
            leaving = self._chunk_and_microbatch(row["F"][self.last])[1]
            losses = self._when("head", segment, row, lambda: self._token_losses(y, leaving))
            return self._pass_up(from_below, y, row), losses

        losses = []
        for segment in self.schedule.segments:
            carry, of_ticks = self._scan(tick, carry, segment)
            losses.append(of_ticks)
        ticks = np.flatnonzero(self.schedule.runs["head"])
        in_order = ticks[np.argsort(self.schedule.forward[ticks, self.last])]
        return jax.tree.map(lambda *x: jnp.concatenate(x)[in_order], *losses)

    def _scan(self, tick: Callable[..., tuple[Any, Any]], carry: Any, segment: Segment) -> tuple[Any, Any]:
        schedule = self.schedule
        tables = {**schedule.slots, **schedule.buffers.tables}
        rows: Row = {name: jnp.asarray(table[segment.ticks], jnp.int32) for name, table in tables.items()}
        rows |= {name: jnp.asarray(schedule.runs[name][segment.ticks]) for name in ("head", "embed", "embed_grad")}
        return lax.scan(lambda carry, row: tick(carry, row, segment), carry, rows)

    def _tick(self, carry: _Carry, row: Row, segment: Segment) -> tuple[_Carry, None]:
        if segment.forward:
            carry = self._forward_slot(carry, row, segment)
        if segment.backward:
            carry = self._backward_slot(carry, row, segment)
        if segment.weight:
            carry = self._weight_slot(carry, row)
        return carry, None

    def _forward_slot(self, carry: _Carry, row: Row, segment: Segment) -> _Carry:
        y, kept = self._forward(carry.from_below, carry.kept, row, segment)
        return carry._replace(
            from_below=self._pass_up(carry.from_below, y, row),
            kept=kept,
            outputs=_put(carry.outputs, y, row["outputs_write"][self.last]),
        )

    def _forward(self, from_below: jax.Array, kept: Buffers, row: Row, segment: Segment) -> tuple[jax.Array, Buffers]:
        chunk, microbatch = self._chunk_and_microbatch(row["F"][self.stage])
        entering = self._chunk_and_microbatch(row["F"][0])[1]
        x = self._when("embed", segment, row, lambda: self._embed(self.params["embed"], entering))
        if self.num_virtual > 1:
            arrived = _take(from_below, row["from_below_read_F"][self.stage])
            x = jnp.where((self.stage == 0) & (chunk == 0), x, arrived)
        place = row["kept_write"][self.stage] if "kept_write" in row else 0
        return self.layers.forward(self.params["layers"], chunk, x, self._microbatch(microbatch), kept, place)

    def _backward_slot(self, carry: _Carry, row: Row, segment: Segment) -> _Carry:
        chunk, microbatch = self._chunk_and_microbatch(row["B"][self.stage])
        loss, outer_grads, y_grad = self._when("head", segment, row, lambda: self._head(carry.outputs, row))
        carry = carry._replace(loss=carry.loss + loss, grads={**carry.grads, **_add(carry.grads, outer_grads)})
        if self.num_virtual > 1:
            arrived = _take(carry.from_above, row["from_above_read_B"][self.stage])
            is_last = (self.stage == self.last) & (chunk == self.schedule.num_chunks - 1)
            y_grad = jnp.where(is_last, y_grad, arrived)
        x_grad, layer_grads, pending = self.layers.backward(
            self.params["layers"], chunk, carry.grads["layers"], y_grad, self._microbatch(microbatch),
            carry.kept, row["kept_read_B"][self.stage],
            carry.pending, row["pending_write"][self.stage] if "pending_write" in row else 0,
            row["B"][self.stage] != IDLE,
        )  # fmt: skip
        grads = {**carry.grads, "layers": layer_grads}
        embed_grads = self._when("embed_grad", segment, row, lambda: self._embed_grads(x_grad, chunk, row))
        carry = carry._replace(pending=pending, grads={**grads, **_add(grads, {"embed": embed_grads})})
        if self.num_virtual > 1:
            sent = self._shift(x_grad, up=False)
            from_above = _put(carry.from_above, sent, row["from_above_write"][self.stage])
            carry = carry._replace(from_above=from_above)
        return carry

    def _weight_slot(self, carry: _Carry, row: Row) -> _Carry:
        chunk, microbatch = self._chunk_and_microbatch(row["W"][self.stage])
        layer_grads = self.layers.weight_grad(
            self.params["layers"], chunk, carry.grads["layers"], self._microbatch(microbatch),
            carry.kept, row["kept_read_W"][self.stage], carry.pending, row["pending_read_W"][self.stage],
            row["W"][self.stage] != IDLE,
        )  # fmt: skip
        return carry._replace(grads={**carry.grads, "layers": layer_grads})

    def _head(self, outputs: jax.Array, row: Row) -> tuple[jax.Array, Any, jax.Array]:
        """Loss of the microbatch that turns round; its gradients by the outer parameters and by the last output."""
        leaving = self._chunk_and_microbatch(row["B"][self.last])[1]
        y = _take(outputs, row["outputs_read_B"][self.last])
        outer = self._gather_outer()

        def part(pieces: tuple[jax.Array, Any]) -> tuple[jax.Array, Any, jax.Array]:
            loss, backward = jax.vjp(lambda outer, y: self._loss(outer, y, pieces[1]), outer, pieces[0])
            return loss, *backward(vary(jnp.ones_like(loss), varying_axes(loss)))

        def add_part(totals: Any, pieces: tuple[jax.Array, Any]) -> tuple[Any, jax.Array]:
            loss, grads, y_grad = part(pieces)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, (loss, grads)), y_grad

        y_parts, info = self.functions.cut(y, self._microbatch(leaving))
        if y_parts.shape[0] == 1:
            loss, grads, y_grad = part(jax.tree.map(lambda x: x[0], (y_parts, info)))
        else:
            first = jax.eval_shape(part, jax.tree.map(lambda x: x[0], (y_parts, info)))
            totals = jax.tree.map(lambda x: zeros(x, dtype=jnp.float32), first[:2])
            (loss, grads), y_grads = lax.scan(add_part, totals, (y_parts, info))
            y_grad = jnp.moveaxis(y_grads, 0, 1).reshape(y.shape)
        return loss, {name: self._reduce(name, g) for name, g in grads.items()}, y_grad

    def _gather_outer(self) -> Any:
        return {part: self.functions.gather(part, self.params[part]) for part in ("embed", "head")}

    def _loss(self, outer: Any, y: jax.Array, info: Any) -> jax.Array:
        losses, weights = self.functions.token_losses(outer, y, info)
        return (losses * weights).sum()

    def _token_losses(self, y: jax.Array, microbatch: Any) -> tuple[jax.Array, jax.Array]:
        outer = self._gather_outer()
        pieces = self.functions.cut(y, self._microbatch(microbatch))
        return lax.map(lambda pieces: self.functions.token_losses(outer, *pieces), pieces)

    def _embed(self, embed: Any, microbatch: Any, *, gathered: bool = False) -> jax.Array:
        embed = embed if gathered else self.functions.gather("embed", embed)
        return vary(self.functions.embed(embed, self._microbatch(microbatch)), ("pp", "dp", "cp"))

    def _embed_grads(self, x_grad: jax.Array, chunk: Any, row: Row) -> Any:
        entering = row["B"][0]
        entered = (self.stage == 0) & (chunk == 0) & (entering != IDLE)
        microbatch = self._chunk_and_microbatch(entering)[1]
        embed = self.functions.gather("embed", self.params["embed"])
        _, backward = jax.vjp(lambda embed: self._embed(embed, microbatch, gathered=True), embed)
        return self._reduce("embed", backward(jnp.where(entered, x_grad, 0))[0])

    def _reduce(self, part: str, grads: Any) -> Any:
        leaves, tree = jax.tree.flatten(grads)
        return jax.tree.unflatten(tree, list(self.functions.reduce(part, dict(enumerate(leaves))).values()))

    def _zero_grads(self, part: str) -> Any:
        def grads() -> Any:
            return self._reduce(part, self.functions.gather(part, self.params[part]))

        return jax.tree.map(lambda x: zeros(x), jax.eval_shape(grads))

    def _when(self, flag: str, segment: Segment, row: Row, run: Callable[[], Any]) -> Any:
        """What `run` returns in ticks that need it, zeros in others. The choice is the same on all devices."""
        needed = self.schedule.runs[flag][segment.ticks]
        if needed.all():
            return run()

        def nothing() -> Any:
            return jax.tree.map(lambda x: zeros(x), jax.eval_shape(run))

        if not needed.any():
            return nothing()
        with jax.named_scope(f"in_{needed.sum()}_of_{len(needed)}_ticks"):  # for `jaxpar.hlo`
            return lax.cond(row[flag], run, nothing)

    def _pass_up(self, from_below: jax.Array, y: jax.Array, row: Row) -> jax.Array:
        if self.num_virtual == 1:
            return from_below
        return _put(from_below, self._shift(y, up=True), row["from_below_write"][self.stage])

    def _shift(self, x: jax.Array, *, up: bool) -> jax.Array:
        """To the neighbour stage; between chunks also from the last stage to the first, or back."""
        stages = self.schedule.num_stages
        pairs = [(s, (s + 1) % stages) for s in range(stages if self.schedule.num_chunks > 1 else stages - 1)]
        return lax.ppermute(x, "pp", pairs if up else [pair[::-1] for pair in pairs])

    def _microbatch(self, index: Any) -> Any:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), self.batch)

    def _chunk_and_microbatch(self, item: jax.Array) -> tuple[Any, jax.Array]:
        item = jnp.maximum(item, 0)
        microbatches = self.schedule.num_microbatches
        return (0, item) if self.schedule.num_chunks == 1 else (item // microbatches, item % microbatches)


def _add(totals: Any, more: Any) -> Any:
    """Sums for the parts in `more`."""
    return {part: jax.tree.map(jnp.add, totals[part], grads) for part, grads in more.items()}


def _put(buffer: jax.Array, x: jax.Array, place: jax.Array) -> jax.Array:
    return x[None] if buffer.shape[0] == 1 else lax.dynamic_update_index_in_dim(buffer, x, place, 0)


def _take(buffer: jax.Array, place: jax.Array) -> jax.Array:
    return buffer[0] if buffer.shape[0] == 1 else lax.dynamic_index_in_dim(buffer, place, keepdims=False)
