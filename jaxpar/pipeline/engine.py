"""The pipeline engine: runs any schedule table inside `shard_map`, forward and backward, without recompute.

All stages run one program. A tick's F slot computes this stage's layers on one microbatch and keeps what the backward
pass needs in a buffer; its B slot takes that out again. What needs keeping is found by asking: `jax.vjp`'s function is
a pytree, and its leaves that are not parameters are what to keep.

Every collective stands where all stages execute it: `ppermute` in a branch that stages take differently gives wrong
numbers on some backends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.collectives import rank_and_size, vary, varying_axes
from jaxpar.pipeline.schedule import IDLE, Schedule


class StageFunctions(NamedTuple):
    """What the engine pipelines. `params` is {"embed", "layers", "head"}, `batch` one microbatch's arrays.

    Attributes:
      embed: (params, batch) → activations that enter the first stage. All stages call it together.
      layers: (params["layers"], activations, batch) → activations, this stage's share of the layers.
      loss: (params without "layers", activations, batch) → scalar, the sum over this device's tokens of their weighted
        losses. All stages call it together, only the last one's activations count.
    """

    embed: Callable[[Any, Any], jax.Array]
    layers: Callable[[Any, jax.Array, Any], jax.Array]
    loss: Callable[[Any, jax.Array, Any], jax.Array]


class _Carry(NamedTuple):
    from_below: jax.Array  # activations that arrived from the stage below
    from_above: jax.Array  # gradients that arrived from the stage above
    kept: list[jax.Array]  # each [buffers, ...]: what backward needs of the microbatches in flight
    outputs: jax.Array | None  # [output buffers, ...]: on the last stage, outputs that wait for the head
    loss: jax.Array
    grads: Any  # float32


def loss_and_grads(schedule: Schedule, functions: StageFunctions, params: Any, batch: Any) -> tuple[jax.Array, Any]:
    """Loss and gradients of a whole batch, inside `shard_map` with pp manual.

    Args:
      params: {"embed", "layers", "head"}, each marked as varying over the axes on which the caller will reduce.
      batch: tree of arrays [microbatches, ...].

    Returns:
      (loss, grads): sums over the microbatches of this device; grads float32, like `params`.
    """
    num_stages = schedule.num_stages
    stage, _ = rank_and_size("pp")
    # With one stage these are constants, and XLA drops the choices that hang on them.
    first, last = (True, True) if num_stages == 1 else (stage == 0, stage == num_stages - 1)
    writes, reads = schedule.buffers

    def microbatch(index: jax.Array) -> Any:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, jnp.maximum(index, 0), keepdims=False), batch)

    def run_layers(x: jax.Array, index: jax.Array):
        info = microbatch(index)
        y, backward = jax.vjp(lambda layers, x: functions.layers(layers, x, info), params["layers"], x)
        return y, _Residuals.of(backward, params["layers"])

    def forward_slot(carry: _Carry, row: dict[str, jax.Array]):
        x = jnp.where(first, _embed(row["forward"][0]), carry.from_below)
        y, residuals = run_layers(x, row["forward"][stage])
        if not schedule.keeps_nothing:
            kept = [_put(b, x, row["writes"][stage]) for b, x in zip(carry.kept, residuals.kept, strict=True)]
            carry = carry._replace(kept=kept)
        if carry.outputs is not None:
            carry = carry._replace(outputs=_put(carry.outputs, y, row["writes"][-1]))
        return carry._replace(from_below=_shift(y, num_stages, up=True)), residuals, y

    def head_slot(carry: _Carry, row: dict[str, jax.Array], y: jax.Array | None):
        if carry.outputs is not None:
            y = _take(carry.outputs, row["reads"][-1])
        info = microbatch(row["backward"][-1])
        outer = {part: params[part] for part in ("embed", "head")}
        loss, backward = jax.vjp(lambda outer, y: functions.loss(outer, y, info), outer, y)
        grads, y_grad = backward(_one_like(loss))
        grads = {**carry.grads, **{part: _accumulate(carry.grads[part], grads[part]) for part in outer}}
        return carry._replace(loss=carry.loss + loss, grads=grads), y_grad

    def backward_slot(carry: _Carry, row: dict[str, jax.Array], y_grad: jax.Array | None, residuals: "_Residuals"):
        active = row["backward"][stage] != IDLE
        if not schedule.keeps_nothing:
            residuals = residuals._replace(kept=[_take(b, row["reads"][stage]) for b in carry.kept])
        y_grad = carry.from_above if y_grad is None else jnp.where(last, y_grad, carry.from_above)
        layer_grads, x_grad = residuals.backward(params["layers"])(y_grad)
        # Masked here and not in y_grad: a stale buffer may turn a zero into NaN.
        layer_grads = jax.tree.map(lambda g: jnp.where(active, g, 0), layer_grads)
        embed_grad = jnp.where(first & (row["backward"][0] != IDLE), x_grad, 0)
        _, backward = jax.vjp(lambda embed: _embed(row["backward"][0], embed), params["embed"])
        grads = {
            **carry.grads,
            "layers": _accumulate(carry.grads["layers"], layer_grads),
            "embed": _accumulate(carry.grads["embed"], backward(embed_grad)[0]),
        }
        return carry._replace(from_above=_shift(x_grad, num_stages, up=False), grads=grads)

    def _embed(index: jax.Array, embed: Any = params["embed"]) -> jax.Array:
        return vary(functions.embed({**params, "embed": embed}, microbatch(index)), ("pp", "dp", "cp"))

    # Types and shapes of what the loop carries, and the structure of the backward pass, from one abstract run.
    structure: list[_Residuals] = []

    def probe():
        y, residuals = run_layers(_embed(jnp.int32(0)), vary(jnp.int32(0), ("pp",)))
        structure.append(residuals._replace(kept=[]))
        return y, residuals.kept, functions.loss(params, y, microbatch(jnp.int32(0)))

    y, kept, loss = jax.eval_shape(probe)
    carry = _Carry(
        from_below=_zeros(y),
        from_above=_zeros(y),
        kept=[] if schedule.keeps_nothing else [_zeros(x, schedule.num_buffers) for x in kept],
        outputs=None if schedule.turns_at_once else _zeros(y, schedule.num_output_buffers),
        loss=_zeros(loss),
        grads=jax.tree.map(lambda p: _zeros(p, dtype=jnp.float32), params),
    )

    for segment in schedule.segments:

        def tick(carry: _Carry, row: dict[str, jax.Array], segment=segment):
            residuals, y, y_grad = structure[0], None, None
            if segment.forward:
                carry, residuals, y = forward_slot(carry, row)
            if segment.head:
                carry, y_grad = head_slot(carry, row, y)
            if segment.backward:
                carry = backward_slot(carry, row, y_grad, residuals)
            return carry, None

        tables = {"forward": schedule.forward, "backward": schedule.backward, "writes": writes, "reads": reads}
        rows = {name: jnp.asarray(table[segment.ticks], jnp.int32) for name, table in tables.items()}
        carry, _ = lax.scan(tick, carry, rows)
    return carry.loss, carry.grads


class _Residuals(NamedTuple):
    """The backward function of a stage, taken apart."""

    kept: list[jax.Array]
    tree: Any
    sources: tuple[tuple[str, int], ...]  # of each leaf: ("kept", i) or ("param", i)

    @classmethod
    def of(cls, backward: Any, params: Any) -> "_Residuals":
        leaves, tree = jax.tree.flatten(backward)
        places = {id(p): ("param", i) for i, p in enumerate(jax.tree.leaves(params))}
        kept: list[jax.Array] = []
        sources = []
        for leaf in leaves:
            if id(leaf) not in places:
                places[id(leaf)] = ("kept", len(kept))
                kept.append(leaf)
            sources.append(places[id(leaf)])
        return cls(kept, tree, tuple(sources))

    def backward(self, params: Any) -> Callable:
        pools = {"kept": self.kept, "param": jax.tree.leaves(params)}
        return jax.tree.unflatten(self.tree, [pools[pool][i] for pool, i in self.sources])


def _shift(x: jax.Array, num_stages: int, *, up: bool) -> jax.Array:
    if num_stages == 1:
        return x
    pairs = [(s, s + 1) if up else (s + 1, s) for s in range(num_stages - 1)]
    return lax.ppermute(x, "pp", pairs)


def _accumulate(totals: Any, more: Any) -> Any:
    return jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, more)


def _put(buffer: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(buffer, x, index, 0)


def _take(buffer: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(buffer, index, keepdims=False)


def _zeros(like: Any, *leading: int, dtype: Any = None) -> jax.Array:
    zeros = jnp.zeros((*leading, *like.shape), dtype or like.dtype)
    return vary(zeros, varying_axes(like))


def _one_like(x: jax.Array) -> jax.Array:
    return vary(jnp.ones_like(x), varying_axes(x))
