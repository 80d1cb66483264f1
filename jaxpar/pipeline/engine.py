"""The pipeline engine: runs any schedule table inside `shard_map`, forward and backward.

All stages run the same program, a loop over ticks. In a tick's F slot, a stage computes a chunk of its layers on one
microbatch and keeps what the backward pass needs. The B slot takes that out again. The W slot, in tables that have one,
does what B left over. The table says which item a slot works on and where its values wait. An idle slot computes
garbage that nobody reads.

Every collective is executed by all stages: a `ppermute` in a branch that stages take differently gives wrong numbers on
some backends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.backward.recompute import Recompute
from jaxpar.objectives import Totals, add_totals, start_of
from jaxpar.parallel.collectives import rank_and_size, vary, zeros
from jaxpar.pipeline.ends import EmbeddingAndLoss
from jaxpar.pipeline.layer_group import LayerFunctions
from jaxpar.pipeline.layers import Item, Layers, Place, SavedValues
from jaxpar.pipeline.schedule import IDLE, Schedule, Segment
from jaxpar.pipeline.tick_scope import scope_name

Row = dict[str, jax.Array]  # a tick's row of every table


class StageFunctions(NamedTuple):
    """What the engine pipelines. Parameters are {"embed", "layers", "head"}.

    Attributes:
      ends: embedding and head.
      layers: the layers between them; their `info` is a microbatch's arrays.
      skips: ticks without an embedding or a loss do not compute one. Where XLA splits the tensor group, it refuses the
        conditional (its two sides are split differently), and every tick computes both.
    """

    ends: EmbeddingAndLoss
    layers: LayerFunctions
    skips: bool = True


class _Carry(NamedTuple):
    from_below: jax.Array  # [places, ...]: activations that arrived from the virtual stage below
    from_above: jax.Array  # [places, ...]: gradients that arrived from the virtual stage above
    kept: SavedValues
    pending: SavedValues
    outputs: jax.Array  # [places, ...]: on the last stage, outputs that wait for the loss
    loss: jax.Array
    totals: Totals
    auxiliary: dict[str, jax.Array]
    grads: Any


class Engine:
    """A schedule table with the functions that it runs. Used inside `shard_map` with pp manual.

    Args:
      params: {"embed", "layers", "head"}, each marked as varying over the axes on which the caller will reduce.
      batch: tree of arrays [microbatches, ...].
    """

    def __init__(
        self, schedule: Schedule, functions: StageFunctions, params: Any, batch: Any, recompute: Recompute | None = None
    ):
        self.schedule, self.functions, self.params, self.batch = schedule, functions, params, batch
        self.stage, _ = rank_and_size("pp")
        self.last = schedule.num_stages - 1
        self.num_virtual = schedule.num_stages * schedule.num_chunks
        self.ends, self.outer = functions.ends, {part: params[part] for part in ("embed", "head")}
        self.example = jax.eval_shape(lambda: self._embed(jnp.int32(0)))
        x, info = zeros(self.example), self._microbatch(vary(jnp.int32(0), ("pp",)))
        self.layers = Layers(functions.layers, schedule, recompute or Recompute(), params["layers"], x, info)

    def loss_and_grads(self) -> tuple[jax.Array, Totals, dict[str, jax.Array], Any]:
        """(loss, totals, auxiliary outputs, grads) of the whole batch: the sum over the microbatches and tokens of this device
        of loss times weight; the totals of the objective's metrics over the same; the sums of the auxiliary outputs of its
        layers; grads float32, like `params` after `LayerFunctions.reduce`."""
        sizes = self.schedule.buffers.sizes
        loss, totals, outer_grads, _ = jax.eval_shape(
            lambda: self._head(zeros(self.example, 1), jnp.int32(0), jnp.int32(0))
        )
        layer_grads = jax.eval_shape(lambda: self.layers.zero_grads(self.params["layers"]))
        carry = _Carry(
            from_below=zeros(self.example, sizes["from_below"]),
            from_above=zeros(self.example, sizes["from_above"]),
            kept=self.layers.kept(sizes["kept"]),
            pending=self.layers.pending(sizes.get("pending", 1)),
            outputs=zeros(self.example, sizes["outputs"]),
            loss=zeros(loss),
            totals=start_of(jax.tree.map(zeros, totals)),
            auxiliary=jax.tree.map(zeros, self.layers.auxiliary),
            grads=jax.tree.map(zeros, {**outer_grads, "layers": layer_grads}),
        )
        for segment in self.schedule.segments:
            carry = self._scan(self._tick, carry, segment)[0]
        return carry.loss, carry.totals, carry.auxiliary, carry.grads

    def evaluate(self, head: Callable[[Any, jax.Array, Any], Any]) -> Any:
        """What `head` returns, a function of (outer parameters, the last stage's output, a microbatch): trees of arrays
        [microbatches, ...], with a table that only runs forward."""
        sizes = self.schedule.buffers.sizes
        carry = zeros(self.example, sizes["from_below"])

        def tick(from_below: jax.Array, row: Row, segment: Segment) -> tuple[jax.Array, Any]:
            y, _, _ = self._forward(from_below, self.layers.no_buffers(), row, segment)
            leaving = self._chunk_and_microbatch(row["F"][self.last])[1]
            found = self._when("head", segment, row, lambda: head(self.outer, y, self._microbatch(leaving)))
            return self._pass_up(from_below, y, row), found

        found = []
        for segment in self.schedule.segments:
            carry, of_ticks = self._scan(tick, carry, segment)
            found.append(of_ticks)
        ticks = np.flatnonzero(self.schedule.runs["head"])
        in_order = ticks[np.argsort(self.schedule.forward[ticks, self.last])]
        return jax.tree.map(lambda *x: jnp.concatenate(x)[in_order], *found)

    def _scan(self, tick: Callable[..., tuple[Any, Any]], carry: Any, segment: Segment) -> tuple[Any, Any]:
        schedule = self.schedule
        tables = {**schedule.slots, **schedule.buffers.tables}
        rows: Row = {name: jnp.asarray(table[segment.ticks], jnp.int32) for name, table in tables.items()}
        rows |= {name: jnp.asarray(schedule.runs[name][segment.ticks]) for name in ("head", "embed", "embed_grad")}
        return lax.scan(lambda carry, row: tick(carry, row, segment), carry, rows)

    def _tick(self, carry: _Carry, row: Row, segment: Segment) -> tuple[_Carry, None]:
        if segment.forward:
            y, found, kept = self._forward(carry.from_below, carry.kept, row, segment)
            is_active = row["F"][self.stage] != IDLE
            auxiliary = {name: carry.auxiliary[name] + jnp.where(is_active, x, 0) for name, x in found.items()}
            from_below = self._pass_up(carry.from_below, y, row)
            outputs = _put(carry.outputs, y, row["outputs_write"][self.last])
            carry = carry._replace(from_below=from_below, kept=kept, outputs=outputs, auxiliary=auxiliary)
        if segment.backward:
            carry = self._backward_slot(carry, row, segment)
        if segment.weight:
            carry = self._weight_slot(carry, row)
        return carry, None

    def _forward(
        self, from_below: jax.Array, kept: SavedValues, row: Row, segment: Segment
    ) -> tuple[jax.Array, dict[str, jax.Array], SavedValues]:
        chunk, microbatch = self._chunk_and_microbatch(row["F"][self.stage])
        entering = self._chunk_and_microbatch(row["F"][0])[1]
        x = self._when("embed", segment, row, lambda: self._embed(entering))
        if self.num_virtual > 1:
            arrived = _take(from_below, row["from_below_read_F"][self.stage])
            x = jnp.where((self.stage == 0) & (chunk == 0), x, arrived)
        item = Item(self.params["layers"], chunk, self._microbatch(microbatch))
        return self.layers.forward(item, x, Place(kept, row["kept_write"][self.stage] if "kept_write" in row else 0))

    def _backward_slot(self, carry: _Carry, row: Row, segment: Segment) -> _Carry:
        chunk, _ = self._chunk_and_microbatch(row["B"][self.stage])
        leaving = self._chunk_and_microbatch(row["B"][self.last])[1]
        place = row["outputs_read_B"][self.last]
        loss, totals, outer_grads, y_grad = self._when(
            "head", segment, row, lambda: self._head(carry.outputs, place, leaving)
        )
        totals = add_totals(carry.totals, totals, row["head"])
        carry = carry._replace(
            loss=carry.loss + loss, totals=totals, grads={**carry.grads, **_add(carry.grads, outer_grads)}
        )
        if not jax.tree.leaves((carry.grads["embed"], carry.grads["layers"])):
            return carry  # nothing below the head is trained
        if self.num_virtual > 1:
            arrived = _take(carry.from_above, row["from_above_read_B"][self.stage])
            is_last = (self.stage == self.last) & (chunk == self.schedule.num_chunks - 1)
            y_grad = jnp.where(is_last, y_grad, arrived)
        x_grad, layer_grads, pending = self.layers.backward(
            self._item("B", row),
            y_grad,
            carry.grads["layers"],
            Place(carry.kept, row["kept_read_B"][self.stage]),
            Place(carry.pending, row["pending_write"][self.stage] if "pending_write" in row else 0),
        )
        grads = {**carry.grads, "layers": layer_grads}
        embed_grads = self._when("embed_grad", segment, row, lambda: self._embed_grads(x_grad, chunk, row))
        carry = carry._replace(pending=pending, grads={**grads, **_add(grads, {"embed": embed_grads})})
        if self.num_virtual > 1:
            sent = self._shift(x_grad, up=False)
            from_above = _put(carry.from_above, sent, row["from_above_write"][self.stage])
            carry = carry._replace(from_above=from_above)
        return carry

    def _weight_slot(self, carry: _Carry, row: Row) -> _Carry:
        layer_grads = self.layers.weight_grad(
            self._item("W", row),
            carry.grads["layers"],
            Place(carry.kept, row["kept_read_W"][self.stage]),
            Place(carry.pending, row["pending_read_W"][self.stage]),
        )
        return carry._replace(grads={**carry.grads, "layers": layer_grads})

    def _item(self, slot: str, row: Row) -> Item:
        """What this stage's backward slot works on."""
        item = row[slot][self.stage]
        chunk, microbatch = self._chunk_and_microbatch(item)
        return Item(self.params["layers"], chunk, self._microbatch(microbatch), item != IDLE)

    def _head(
        self, outputs: jax.Array, place: jax.Array, microbatch: jax.Array
    ) -> tuple[jax.Array, Totals, Any, jax.Array]:
        """The loss and metrics of the microbatch that leaves the last stage, and the loss's gradients with respect to the outer
        parameters and to the last output."""
        return self.ends.loss_and_grads(self.outer, _take(outputs, place), self._microbatch(microbatch))

    def _embed(self, microbatch: jax.Array) -> jax.Array:
        return self.ends.embed(self.outer, self._microbatch(microbatch))

    def _embed_grads(self, x_grad: jax.Array, chunk: Any, row: Row) -> Any:
        entering = row["B"][0]
        entered = (self.stage == 0) & (chunk == 0) & (entering != IDLE)
        batch = self._microbatch(self._chunk_and_microbatch(entering)[1])
        return self.ends.embed_grads(self.outer, batch, jnp.where(entered, x_grad, 0))

    def _when(self, flag: str, segment: Segment, row: Row, run: Callable[[], Any]) -> Any:
        """What `run` returns in ticks that need it, and zeros in the others. All devices choose alike."""
        needed = self.schedule.runs[flag][segment.ticks]
        if needed.all():
            return run()

        def nothing() -> Any:
            return jax.tree.map(lambda x: zeros(x), jax.eval_shape(run))

        if not needed.any():
            return nothing()
        if not self.functions.skips:
            return jax.tree.map(lambda x: jnp.where(row[flag], x, 0), run())
        with jax.named_scope(scope_name(needed.sum(), len(needed))):
            return lax.cond(row[flag], run, nothing)

    def _pass_up(self, from_below: jax.Array, y: jax.Array, row: Row) -> jax.Array:
        if self.num_virtual == 1:
            return from_below
        return _put(from_below, self._shift(y, up=True), row["from_below_write"][self.stage])

    def _shift(self, x: jax.Array, *, up: bool) -> jax.Array:
        """Sends to the next stage up or down. With chunks, also from the last stage to the first, or back."""
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
    """The sums for the parts that are in `more`."""
    return {part: jax.tree.map(jnp.add, totals[part], grads) for part, grads in more.items()}


def _put(buffer: jax.Array, x: jax.Array, place: jax.Array) -> jax.Array:
    return x[None] if buffer.shape[0] == 1 else lax.dynamic_update_index_in_dim(buffer, x, place, 0)


def _take(buffer: jax.Array, place: jax.Array) -> jax.Array:
    return buffer[0] if buffer.shape[0] == 1 else lax.dynamic_index_in_dim(buffer, place, keepdims=False)
