"""The two ends of a model, embedding and head with loss: their values and gradients, in parts where they are large.

The logits of a microbatch, and with a vocabulary of 100,000 and more the embedding and the head themselves, can be larger
than everything else on a device. So the loss is computed for one part of the tokens after the other; or, where ZeRO has
split the weights, for one part of the vocabulary after the other, each gathered, used and its gradient reduced by itself
(the logits are computed twice then: the softmax needs all of them before the gradient of any).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.models.protocol import FunctionalModel, Params, TokenInfo
from jaxpar.parallel.collectives import (
    broadcast_from_last_stage,
    cross_entropy,
    rank_and_size,
    vary,
    varying_axes,
    vocabulary_axes,
    vocabulary_columns,
    vocabulary_part,
    zeros,
)

Batch = Mapping[str, jax.Array]
Grads = dict[int, jax.Array]  # by index of the leaf


@dataclass(frozen=True)
class Ends:
    """Functions of `outer`, {"embed", "head"}, as the engine holds it. All stages call them together.

    Attributes:
      layouts: tree of `ParamLayout`.
      gather: (part, parameters as held) → as the model computes with them. Linear.
      reduce: (part, gradients) → as they are summed up over microbatches, float32. Linear.
      constrain: where XLA is told how to split activations.
      token_parts, vocabulary_parts: how many; at most one of them is above 1, the latter for explicit models only.
    """

    model: FunctionalModel
    layouts: Any
    gather: Callable[[str, Any], Any]
    reduce: Callable[[str, Grads], Grads]
    constrain: Callable[[jax.Array], jax.Array]
    token_parts: int = 1
    vocabulary_parts: int = 1

    def embed(self, outer: Params, batch: Batch) -> jax.Array:
        """Activations that enter the first stage."""

        def of_part(part: Any) -> jax.Array:
            with vocabulary_part(part, self.vocabulary_parts):
                return self._embed(self._gathered(outer, part, "embed"), batch)

        if self.vocabulary_parts == 1:
            return of_part(0)
        start = zeros(jax.eval_shape(of_part, 0))
        return lax.scan(lambda x, part: (x + of_part(part), None), start, jnp.arange(self.vocabulary_parts))[0]

    def embed_grads(self, outer: Params, batch: Batch, x_grad: jax.Array) -> Params:
        """Gradient of the embedding, reduced."""

        def of_part(part: Any) -> Grads:
            with vocabulary_part(part, self.vocabulary_parts):
                embed = self._gathered(outer, part, "embed")
                _, backward = jax.vjp(lambda embed: self._embed(embed, batch), embed)
            return self._reduced("embed", backward(x_grad)[0]["embed"])

        return self._over_parts(lambda _, part: (None, {"embed": of_part(part)}), None)[1]["embed"]

    def token_losses(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(loss, weight) of tokens, [token parts, batch, any] each; of an automatic model, of this stage's share."""
        if self.vocabulary_parts > 1:
            x = broadcast_from_last_stage(y)
            log_total, picked = self._log_softmax(outer, x, batch["targets"])
            return (log_total - picked)[None], batch["weights"][None]
        outer = self._gathered(outer)
        return lax.map(lambda pieces: self._token_losses(outer, *pieces), self._cut(y, batch))

    def loss_and_grads(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Params, jax.Array]:
        """(sum of loss times weight, its gradients by `outer`, reduced, and by the last stage's y)."""
        run = self._by_tokens if self.vocabulary_parts == 1 else self._by_vocabulary
        return run(outer, y, batch)

    def _by_tokens(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Params, jax.Array]:
        outer = self._gathered(outer)

        def of_part(pieces: tuple[jax.Array, Batch]) -> tuple[jax.Array, Params, jax.Array]:
            def weighted(outer: Params, y: jax.Array) -> jax.Array:
                losses, weights = self._token_losses(outer, y, pieces[1])
                return (losses * weights).sum()

            loss, backward = jax.vjp(weighted, outer, pieces[0])
            return loss, *backward(vary(jnp.ones_like(loss), varying_axes(loss)))

        def add_part(totals: Any, pieces: tuple[jax.Array, Batch]) -> tuple[Any, jax.Array]:
            *sums, y_grad = of_part(pieces)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, tuple(sums)), y_grad

        pieces = self._cut(y, batch)
        first = jax.tree.map(lambda x: x[0], pieces)
        if self.token_parts == 1:
            loss, grads, y_grad = of_part(first)
        else:
            totals = jax.tree.map(lambda x: zeros(x, dtype=jnp.float32), jax.eval_shape(of_part, first)[:2])
            (loss, grads), y_grads = lax.scan(add_part, totals, pieces)
            y_grad = jnp.moveaxis(y_grads, 0, 1).reshape(y.shape)
        return loss, {part: self._reduced(part, g) for part, g in grads.items()}, y_grad

    def _by_vocabulary(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Params, jax.Array]:
        # Marked once as differing between those that split the vocabulary, so that its gradient is summed once.
        x, to_y = jax.vjp(lambda y: vary(broadcast_from_last_stage(y), ("pp", "tp")), y)
        targets, weights = batch["targets"], batch["weights"]
        log_total, picked = self._log_softmax(outer, x, targets)

        def of_part(x_grad: jax.Array, part: Any) -> tuple[jax.Array, Params]:
            with vocabulary_part(part, self.vocabulary_parts):
                gathered = self._gathered(outer, part)
                logits, backward = jax.vjp(self.model.head, gathered, x)
                softmax = jnp.exp(logits.astype(jnp.float32) - log_total[..., None])
                is_target = vocabulary_columns(logits.shape[-1], vocabulary_axes()) == targets[..., None]
                grads, more = backward(((softmax - is_target) * weights[..., None]).astype(logits.dtype))
            return x_grad + more, {name: self._reduced(name, g) for name, g in grads.items()}

        x_grad, grads = self._over_parts(of_part, zeros(x, dtype=jnp.float32))
        loss = ((log_total - picked) * weights).sum()
        return loss, grads, to_y(x_grad.astype(x.dtype))[0]

    def _log_softmax(self, outer: Params, x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(log of the sum over the vocabulary of e^logit, the target's logit) of each token."""
        axes = vocabulary_axes()

        def of_part(part: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            with vocabulary_part(part, self.vocabulary_parts):
                logits = self.model.head(self._gathered(outer, part), x).astype(jnp.float32)
                is_target = vocabulary_columns(logits.shape[-1], axes) == targets[..., None]
            highest = logits.max(-1)
            return highest, jnp.exp(logits - highest[..., None]).sum(-1), jnp.where(is_target, logits, 0).sum(-1)

        def merge(a: tuple[jax.Array, jax.Array, jax.Array], part: Any) -> tuple[tuple, None]:
            b = of_part(part)
            highest = jnp.maximum(a[0], b[0])
            total = a[1] * jnp.exp(a[0] - highest) + b[1] * jnp.exp(b[0] - highest)
            return (highest, total, a[2] + b[2]), None

        (highest, total, picked), _ = lax.scan(merge, of_part(0), jnp.arange(1, self.vocabulary_parts))
        if axes:
            top = lax.pmax(highest, axes)
            total, picked = lax.psum((total * jnp.exp(highest - top), picked), axes)
            highest = top
        return highest + jnp.log(total), picked

    def _embed(self, gathered: Params, batch: Batch) -> jax.Array:
        x = self.constrain(self.model.embed(gathered, batch["tokens"], token_info(batch)))
        return vary(x, ("pp", "dp", "cp"))

    def _token_losses(self, gathered: Params, x: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """An explicit model splits its vocabulary over the stages. An automatic one cannot (pp is manual), so its tokens
        are split instead: each stage computes the head for a share of the sequence."""
        targets, weights = batch["targets"], batch["weights"]
        if self.model.explicit:
            logits = self.model.head(gathered, broadcast_from_last_stage(x))
            return cross_entropy(logits, targets, vocabulary_axes()), weights
        stage, stages = rank_and_size("pp")
        x = jnp.where(stage == stages - 1, x, 0)
        if stages > 1:
            # A sequence that does not divide is padded.
            share = -(-x.shape[1] // stages)
            pad = lambda a: jnp.pad(a, [(0, 0), (0, share * stages - a.shape[1]), *[(0, 0)] * (a.ndim - 2)])  # noqa: E731
            x = lax.psum_scatter(pad(x), "pp", scatter_dimension=1, tiled=True)
            targets, weights = (lax.dynamic_slice_in_dim(pad(a), stage * share, share, 1) for a in (targets, weights))
        return cross_entropy(self.model.head(gathered, x), targets), weights

    def _cut(self, x: jax.Array, batch: Batch) -> tuple[jax.Array, Batch]:
        """Both in parts of the tokens, [parts, ...]; sp splits x and not the batch."""
        ways = batch["tokens"].shape[1] // x.shape[1]
        return cut(x, self.token_parts, 1), jax.tree.map(lambda a: cut(a, self.token_parts, ways), dict(batch))

    def _gathered(self, outer: Params, part: Any = 0, *names: str) -> Params:
        """A part of the vocabulary (of one: all of it) of what is in `outer`, as the model computes with it."""

        def one(param: jax.Array, layout: Any) -> jax.Array:
            if self.vocabulary_parts == 1 or "vocab" not in layout.dims:
                return param
            dimension = layout.dims.index("vocab")
            size = param.shape[dimension] // self.vocabulary_parts
            return lax.dynamic_slice_in_dim(param, part * size, size, dimension)

        names = names or ("embed", "head")
        return {name: self.gather(name, jax.tree.map(one, outer[name], self.layouts[name])) for name in names}

    def _reduced(self, name: str, grads: Any) -> Any:
        leaves, tree = jax.tree.flatten(grads)
        return jax.tree.unflatten(tree, list(self.reduce(name, dict(enumerate(leaves))).values()))

    def _over_parts(self, of_part: Callable[[Any, Any], tuple[Any, Params]], start: Any) -> tuple[Any, Params]:
        """`of_part` (carry, part) → (carry, gradients) for each part of the vocabulary; the gradients as of the whole."""
        if self.vocabulary_parts == 1:
            return of_part(start, 0)

        def merge(stacked: jax.Array, layout: Any) -> jax.Array:
            if "vocab" not in layout.dims:
                return stacked.sum(0)
            dimension = layout.dims.index("vocab")
            shape = list(stacked.shape[1:])
            shape[dimension] *= self.vocabulary_parts
            return jnp.moveaxis(stacked, 0, dimension).reshape(shape)

        carry, stacked = lax.scan(of_part, start, jnp.arange(self.vocabulary_parts))
        return carry, {name: jax.tree.map(merge, grads, self.layouts[name]) for name, grads in stacked.items()}


def token_info(batch: Batch) -> TokenInfo:
    return TokenInfo(batch["positions"], batch["segment_ids"])


def cut(x: jax.Array, parts: int, ways: int) -> jax.Array:
    """[batch, seq, ...] → [parts, batch, seq / parts, ...]: a part has an equal piece of each of the `ways` in which sp
    splits the sequence."""
    batch, seq, *rest = x.shape
    pieces = x.reshape(batch, ways, parts, seq // ways // parts, *rest)
    return jnp.moveaxis(pieces, 2, 0).reshape(parts, batch, seq // parts, *rest)


def joined(x: jax.Array, ways: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `cut`: [microbatches, parts, batch, tokens] → [rows, seq]; what was padded falls off."""
    microbatches, parts, batch, _ = x.shape
    pieces = x.reshape(microbatches, parts, batch, ways, -1)[..., : shape[1] // ways // parts]
    return jnp.moveaxis(pieces, 1, 3).reshape(shape)


def least_parts(size: int, limit: int, total: int) -> int:
    """The least number of equal parts of `total` things in which `size` bytes are at most `limit` each."""
    return next((n for n in range(1, total) if total % n == 0 and size <= n * limit), total)


def nbytes(shape: tuple[int, ...]) -> int:
    """Of a float32 array."""
    return 4 * math.prod(shape)
