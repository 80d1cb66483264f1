"""The two ends of a model, embedding and head with loss: their values and gradients, in parts where they are large.

The logits of a microbatch can be larger than everything else on a device; with a vocabulary of 100,000 and more, so can
the embedding and the head themselves. So the loss is computed for one part of the tokens after the other. If ZeRO has
split the weights, it is computed for one part of the vocabulary after the other instead: each part is gathered and used,
and its gradient is reduced, by itself. The logits are then computed twice, because the softmax needs all of them before
the gradient of any.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.backward import in_float32
from jaxpar.models.functional import FunctionalModel
from jaxpar.models.protocol import Params, TokenInfo
from jaxpar.parallel.collectives import (
    MASKED,
    WHOLE,
    VocabularyPart,
    broadcast_from_last_stage,
    cross_entropy,
    rank_and_size,
    vary,
    varying_axes,
    vocabulary_axes,
    vocabulary_columns,
    zeros,
)
from jaxpar.parallel.randomness import TokenKey

Batch = Mapping[str, jax.Array]
Grads = dict[int, jax.Array]  # by index of the parameter's leaf


@dataclass(frozen=True)
class EmbeddingAndLoss:
    """Functions of `outer`, the parameters {"embed", "head"} as the engine holds them. All stages call them together.

    Attributes:
      param_layouts: tree of `ParamLayout`.
      gather: ("embed" or "head", its parameters as held) → as the model computes with them. Linear.
      reduce: ("embed" or "head", its gradients) → float32, as they are summed over microbatches. Linear.
      constrain: tells XLA how to split activations.
      train: False in an evaluation.
      float32_grads: as in `jaxpar.backward.take_apart`.
      token_parts, vocabulary_parts: the number of parts. At most one of them is above 1, and `vocabulary_parts` only for
        explicit models.
      keep_logits: keep the logits of all parts of the vocabulary for their gradients. Otherwise the head is multiplied again
        for them.
    """

    model: FunctionalModel
    param_layouts: Any
    gather: Callable[[str, Any], Any]
    reduce: Callable[[str, Grads], Grads]
    constrain: Callable[[jax.Array], jax.Array]
    train: bool = True
    float32_grads: bool = False
    token_parts: int = 1
    vocabulary_parts: int = 1
    keep_logits: bool = False

    def embed(self, outer: Params, batch: Batch) -> jax.Array:
        """The activations that enter the first stage."""

        def of_part(index: Any) -> jax.Array:
            return self._embed(self._gathered(outer, index, "embed"), batch, self._part(index))

        if self.vocabulary_parts == 1:
            return of_part(0)
        start = zeros(jax.eval_shape(of_part, 0))
        return lax.scan(lambda x, index: (x + of_part(index), None), start, jnp.arange(self.vocabulary_parts))[0]

    def embed_grads(self, outer: Params, batch: Batch, x_grad: jax.Array) -> Params:
        """The gradient of the embedding, reduced."""

        def of_part(index: Any) -> Grads:
            embed = self._gathered(outer, index, "embed")
            _, backward = jax.vjp(lambda embed: self._embed(embed, batch, self._part(index)), embed)
            return self._reduced("embed", backward(x_grad)[0]["embed"])

        return self._over_parts(lambda _, index: (None, {"embed": of_part(index)}), None)[1]["embed"]

    def token_losses(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(loss, weight) of each token, [token parts, batch, any] each. For an automatic model, only of this stage's share
        of the tokens."""
        if self.vocabulary_parts > 1:
            x = broadcast_from_last_stage(y)
            log_total, picked, _ = self._log_softmax(outer, x, batch["targets"])
            return (log_total - picked)[None], batch["weights"][None]
        outer = self._gathered(outer)
        return lax.map(lambda pieces: self._token_losses(outer, *pieces), self._split_tokens(y, batch))

    def loss_and_grads(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Params, jax.Array]:
        """(the sum of loss times weight, its reduced gradients with respect to `outer`, and with respect to y of the last
        stage)."""
        run = self._by_tokens if self.vocabulary_parts == 1 else self._by_vocabulary
        return run(outer, y, batch)

    def _by_tokens(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Params, jax.Array]:
        outer = self._gathered(outer)

        def of_part(pieces: tuple[jax.Array, Batch]) -> tuple[jax.Array, Params, jax.Array]:
            def weighted(outer: Params, y: jax.Array) -> jax.Array:
                losses, weights = self._token_losses(outer, y, pieces[1])
                return (losses * weights).sum()

            loss, backward = jax.vjp(weighted, outer, pieces[0])
            return loss, *self._backward(backward, vary(jnp.ones_like(loss), varying_axes(loss)))

        def add_part(totals: Any, pieces: tuple[jax.Array, Batch]) -> tuple[Any, jax.Array]:
            *sums, y_grad = of_part(pieces)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, tuple(sums)), y_grad

        pieces = self._split_tokens(y, batch)
        first = jax.tree.map(lambda x: x[0], pieces)
        if self.token_parts == 1:
            loss, grads, y_grad = of_part(first)
        else:
            totals = jax.tree.map(lambda x: zeros(x, dtype=jnp.float32), jax.eval_shape(of_part, first)[:2])
            (loss, grads), y_grads = lax.scan(add_part, totals, pieces)
            y_grad = jnp.moveaxis(y_grads, 0, 1).reshape(y.shape)
        return loss, {part: self._reduced(part, g) for part, g in grads.items()}, y_grad

    def _by_vocabulary(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Params, jax.Array]:
        # Marked once as varying over the axes that split the vocabulary, so that its gradient is summed once.
        x, to_y = jax.vjp(lambda y: vary(broadcast_from_last_stage(y), ("pp", "tp")), y)
        targets, weights = batch["targets"], batch["weights"]
        log_total, picked, kept = self._log_softmax(outer, x, targets, keep_logits=self.keep_logits)

        def of_part(x_grad: jax.Array, index: Any) -> tuple[jax.Array, Params]:
            gathered, part = self._gathered(outer, index), self._part(index)
            logits, backward = jax.vjp(lambda params, x: self.model.head(params, x, part), gathered, x)
            logits = logits if kept is None else kept[index]  # then XLA drops the product that nothing needs
            softmax = jnp.exp(logits.astype(jnp.float32) - log_total[..., None])
            is_target = vocabulary_columns(logits.shape[-1], vocabulary_axes(), part) == targets[..., None]
            logits_grad = ((softmax - is_target) * weights[..., None]).astype(logits.dtype)
            grads, more = self._backward(backward, logits_grad)
            return x_grad + more, {name: self._reduced(name, g) for name, g in grads.items()}

        x_grad, grads = self._over_parts(of_part, zeros(x, dtype=jnp.float32))
        loss = ((log_total - picked) * weights).sum()
        return loss, grads, to_y(x_grad.astype(x.dtype))[0]

    def _backward(self, backward: Callable[[jax.Array], Any], y_grad: jax.Array) -> Any:
        return in_float32(backward, y_grad) if self.float32_grads else backward(y_grad)

    def _log_softmax(
        self, outer: Params, x: jax.Array, targets: jax.Array, *, keep_logits: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(log of the sum of e^logit over the vocabulary, the target's logit) of each token, and the logits of each part of
        the vocabulary if they are to be kept."""
        axes = vocabulary_axes()

        def of_part(index: Any) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array | None]:
            part = self._part(index)
            logits = self.model.head(self._gathered(outer, index), x, part)
            wide = logits.astype(jnp.float32)
            is_target = vocabulary_columns(logits.shape[-1], axes, part) == targets[..., None]
            highest = wide.max(-1)
            sums = jnp.exp(wide - highest[..., None]).sum(-1), jnp.where(is_target, wide, 0).sum(-1)
            return (highest, *sums), logits if keep_logits else None

        def merge(a: tuple[jax.Array, jax.Array, jax.Array], index: Any) -> tuple[tuple, jax.Array | None]:
            b, logits = of_part(index)
            highest = jnp.maximum(a[0], b[0])
            total = a[1] * jnp.exp(a[0] - highest) + b[1] * jnp.exp(b[0] - highest)
            return (highest, total, a[2] + b[2]), logits

        nothing = [zeros(one) for one in jax.eval_shape(of_part, 0)[0]]
        start = nothing[0] + MASKED, nothing[1], nothing[2]
        (highest, total, picked), kept = lax.scan(merge, start, jnp.arange(self.vocabulary_parts))
        if axes:
            top = lax.pmax(highest, axes)
            total, picked = lax.psum((total * jnp.exp(highest - top), picked), axes)
            highest = top
        return highest + jnp.log(total), picked, kept

    def _part(self, index: Any) -> VocabularyPart:
        return WHOLE if self.vocabulary_parts == 1 else VocabularyPart(index, self.vocabulary_parts)

    def _embed(self, gathered: Params, batch: Batch, part: VocabularyPart) -> jax.Array:
        info = token_info(self.model, batch, train=self.train)
        x = self.constrain(self.model.embed(gathered, batch["tokens"], info, part))
        return vary(x, ("pp", "dp", "cp"))

    def _token_losses(self, gathered: Params, x: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """An explicit model splits its vocabulary over the stages. An automatic model cannot, because pp is manual. Its
        tokens are split instead: each stage computes the head for a share of the sequence."""
        targets, weights = batch["targets"], batch["weights"]
        if self.model.explicit:
            logits = self.model.head(gathered, broadcast_from_last_stage(x))
            return cross_entropy(logits, targets, vocabulary_axes()), weights
        stage, stages = rank_and_size("pp")
        x = jnp.where(stage == stages - 1, x, 0)
        if stages > 1:
            share = -(-x.shape[1] // stages)  # a sequence that does not divide is padded
            pad = lambda a: jnp.pad(a, [(0, 0), (0, share * stages - a.shape[1]), *[(0, 0)] * (a.ndim - 2)])  # noqa: E731
            x = lax.psum_scatter(pad(x), "pp", scatter_dimension=1, tiled=True)
            targets, weights = (lax.dynamic_slice_in_dim(pad(a), stage * share, share, 1) for a in (targets, weights))
        return cross_entropy(self.model.head(gathered, x), targets), weights

    def _split_tokens(self, x: jax.Array, batch: Batch) -> tuple[jax.Array, Batch]:
        """Splits both into parts of the tokens, [parts, ...]. (sp splits x, but not the batch.)"""
        ways = batch["tokens"].shape[1] // x.shape[1]
        needed = {name: split_tokens(batch[name], self.token_parts, ways) for name in ("targets", "weights")}
        return split_tokens(x, self.token_parts, 1), needed

    def _gathered(self, outer: Params, index: Any = 0, *names: str) -> Params:
        """The parameters `names` of `outer` (default: both), as the model computes with them. Of those with a vocabulary,
        part `index` of it."""

        def one(param: jax.Array, layout: Any) -> jax.Array:
            if self.vocabulary_parts == 1 or "vocab" not in layout.dims:
                return param
            dimension = layout.dims.index("vocab")
            size = param.shape[dimension] // self.vocabulary_parts
            return lax.dynamic_slice_in_dim(param, index * size, size, dimension)

        names = names or ("embed", "head")
        return {name: self.gather(name, jax.tree.map(one, outer[name], self.param_layouts[name])) for name in names}

    def _reduced(self, name: str, grads: Any) -> Any:
        leaves, tree = jax.tree.flatten(grads)
        return jax.tree.unflatten(tree, list(self.reduce(name, dict(enumerate(leaves))).values()))

    def _over_parts(self, of_part: Callable[[Any, Any], tuple[Any, Params]], start: Any) -> tuple[Any, Params]:
        """Runs `of_part`, (carry, index) → (carry, gradients), for each part of the vocabulary, and returns the gradients
        of the whole."""
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
        return carry, {name: jax.tree.map(merge, grads, self.param_layouts[name]) for name, grads in stacked.items()}


def token_info(model: FunctionalModel, batch: Batch, *, train: bool, layer: Any = None) -> TokenInfo:
    """What the model is told of a microbatch. Without "segment_ids", tokens attend across documents."""
    random = TokenKey(batch["random"], *batch["tokens"].shape) if "random" in batch else None
    inputs = {name: batch[name] for name in model.inputs}
    return TokenInfo(batch["positions"], batch.get("segment_ids"), layer, inputs, random, train)


def split_tokens(x: jax.Array, parts: int, ways: int) -> jax.Array:
    """[batch, seq, ...] → [parts, batch, seq / parts, ...]. Each part has an equal piece of each of the `ways` shards into
    which sp splits the sequence."""
    batch, seq, *rest = x.shape
    pieces = x.reshape(batch, ways, parts, seq // ways // parts, *rest)
    return jnp.moveaxis(pieces, 2, 0).reshape(parts, batch, seq // parts, *rest)


def join_tokens(x: jax.Array, ways: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `split_tokens`: [microbatches, parts, batch, tokens] → [rows, seq], without padding."""
    microbatches, parts, batch, _ = x.shape
    pieces = x.reshape(microbatches, parts, batch, ways, -1)[..., : shape[1] // ways // parts]
    return jnp.moveaxis(pieces, 1, 3).reshape(shape)


def least_parts(size: int, limit: int, total: int) -> int:
    """The smallest number of equal parts of `total` elements such that `size` bytes give at most `limit` in each part."""
    return next((n for n in range(1, total) if total % n == 0 and size <= n * limit), total)


def nbytes(shape: tuple[int, ...]) -> int:
    """Bytes of a float32 array."""
    return 4 * math.prod(shape)
