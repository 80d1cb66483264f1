"""The two ends of a model, embedding and head with loss: their values and gradients, in parts where they are large.

The logits of a microbatch can be larger than everything else on a device; with a vocabulary of 100,000 and more, so can
the embedding and the head themselves. So the loss is computed for one part of the tokens after the other. If ZeRO has
split the weights, it is computed for one part of the vocabulary after the other instead: each part is gathered and used,
and its gradient is reduced, by itself. The logits are then computed twice, because the softmax needs all of them before
the gradient of any.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.backward import in_float32
from jaxpar.models.functional import FunctionalModel
from jaxpar.models.protocol import Params, TokenInfo
from jaxpar.objectives import (
    Asked,
    LogitSums,
    Targets,
    Totals,
    add_totals,
    logits_grad,
    merge,
    over_devices,
    start_of,
    statistics_of,
    sums_of,
    token_statistics,
)
from jaxpar.parallel.collectives import (
    MASKED,
    WHOLE,
    VocabularyPart,
    broadcast_from_last_stage,
    rank_and_size,
    vary,
    varying_axes,
    vocabulary_axes,
    vocabulary_columns,
    zeros,
)
from jaxpar.parallel.randomness import TokenKey
from jaxpar.parallel.trained import trained_layouts, vjp
from jaxpar.pipeline.loss import Loss
from jaxpar.pipeline.token_parts import from_all_stages, join_tokens, split_tokens

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
      loss_of: the objective.
      asked: the statistics that are computed. None: the objective takes the model's outputs as they are.
      train: False in an evaluation.
      float32_grads: as in `jaxpar.backward.take_apart`.
      token_parts, vocabulary_parts: the number of parts. At most one of them is above 1, and `vocabulary_parts` only for
        explicit models.
      within_documents: a token attends only to tokens of its own document.
      keep_logits: keep the logits of all parts of the vocabulary for their gradients. Otherwise the head is multiplied again
        for them.
    """

    model: FunctionalModel
    param_layouts: Any
    gather: Callable[[str, Any], Any]
    reduce: Callable[[str, Grads], Grads]
    constrain: Callable[[jax.Array], jax.Array]
    loss_of: Loss
    asked: Asked | None
    train: bool = True
    float32_grads: bool = False
    token_parts: int = 1
    vocabulary_parts: int = 1
    keep_logits: bool = False
    within_documents: bool = True

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
            _, backward = self._vjp(lambda embed: self._embed(embed, batch, self._part(index)), embed)
            return self._reduced("embed", backward(x_grad)[0]["embed"])

        return self._over_parts(lambda _, index: (None, {"embed": of_part(index)}), None)[1]["embed"]

    def features(self, outer: Params, y: jax.Array, batch: Batch) -> Any:
        """What the objective takes of each token of the microbatch that this device's cp rank has: statistics, or outputs,
        [batch, any, …] each."""
        if self.vocabulary_parts > 1:
            return statistics_of(self._logit_sums(outer, broadcast_from_last_stage(y), batch)[0])
        outer = self._gathered(outer)
        pieces = lax.map(lambda pieces: self._features(outer, *pieces)[0], self._split_tokens(y, batch))
        return self._together(pieces, batch)

    def loss(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Totals]:
        """(the sum of loss times weight, the totals of the metrics), without gradients."""
        return self.loss_of(self.features(outer, y, batch), batch)

    def loss_and_grads(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Totals, Params, jax.Array]:
        """(the sum of loss times weight, the totals of the metrics, the loss's reduced gradients with respect to `outer`, and
        with respect to y of the last stage)."""
        if self.vocabulary_parts > 1:
            return self._by_vocabulary(outer, y, batch)
        needs_two = self.loss_of.objective.whole_rows and self.token_parts > 1
        return (self._in_two_passes if needs_two else self._by_tokens)(outer, y, batch)

    def _by_tokens(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Totals, Params, jax.Array]:
        outer = self._gathered(outer)

        def of_part(pieces: tuple[jax.Array, Batch]) -> tuple[jax.Array, Totals, Params, jax.Array]:
            loss, backward, totals = self._vjp(
                lambda outer, y: self._loss_of_piece(outer, y, pieces[1]), outer, pieces[0], has_aux=True
            )
            return loss, totals, *self._backward(backward, vary(jnp.ones_like(loss), varying_axes(loss)))

        return self._over_token_parts(of_part, self._split_tokens(y, batch), y)

    def _in_two_passes(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Totals, Params, jax.Array]:
        """A loss that needs all tokens of a row, of which the head computes one part after the other: all statistics first,
        then the gradients, for which the head is multiplied again."""
        gathered, pieces = self._gathered(outer), self._split_tokens(y, batch)
        features = lax.map(lambda pieces: self._features(gathered, *pieces)[0], pieces)
        loss, backward, totals = jax.vjp(
            lambda features: self.loss_of(self._together(features, batch), batch), features, has_aux=True
        )
        grads_of_parts = backward(vary(jnp.ones_like(loss), varying_axes(loss)))[0]

        def of_part(part: tuple[tuple[jax.Array, Batch], Any]) -> tuple[jax.Array, Totals, Params, jax.Array]:
            (y, batch), grads = part
            _, backward = self._vjp(lambda outer, y: self._features(outer, y, batch)[0], gathered, y)
            return jnp.float32(0), {}, *self._backward(backward, grads)

        _, _, grads, y_grad = self._over_token_parts(of_part, (pieces, grads_of_parts), y)
        return loss, totals, grads, y_grad

    def _over_token_parts(
        self, of_part: Callable[[Any], tuple[jax.Array, Totals, Params, jax.Array]], parts: Any, y: jax.Array
    ) -> tuple[jax.Array, Totals, Params, jax.Array]:
        """Runs `of_part`, a part of the tokens → (loss, totals, gradients, gradient of y), for each part, and returns those of
        all tokens, with the gradients reduced."""

        def add_part(sums: Any, part: Any) -> tuple[Any, jax.Array]:
            loss, totals, grads, y_grad = of_part(part)
            add = lambda total, x: total + x.astype(total.dtype)  # noqa: E731
            added = *jax.tree.map(add, sums[:2], (loss, grads)), add_totals(sums[2], totals)
            return added, y_grad

        first = jax.tree.map(lambda x: x[0], parts)
        if self.token_parts == 1:
            loss, totals, grads, y_grad = of_part(first)
        else:
            like = jax.eval_shape(of_part, first)
            start = jax.tree.map(lambda x: zeros(x, dtype=jnp.float32), (like[0], like[2], like[1]))
            (loss, grads, totals), y_grads = lax.scan(add_part, (*start[:2], start_of(start[2])), parts)
            y_grad = jnp.moveaxis(y_grads, 0, 1).reshape(y.shape)
        return loss, totals, {part: self._reduced(part, g) for part, g in grads.items()}, y_grad

    def _by_vocabulary(self, outer: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Totals, Params, jax.Array]:
        # Marked once as varying over the axes that split the vocabulary, so that its gradient is summed once.
        x, to_y = jax.vjp(lambda y: vary(broadcast_from_last_stage(y), ("pp", "tp")), y)
        sums, kept = self._logit_sums(outer, x, batch, keep_logits=self.keep_logits)
        statistics, of, asked = statistics_of(sums), self._targets(batch), self.asked
        assert asked is not None
        loss, to_statistics, totals = jax.vjp(lambda found: self.loss_of(found, batch), statistics, has_aux=True)
        statistics_grads = to_statistics(vary(jnp.ones_like(loss), varying_axes(loss)))[0]

        def of_part(x_grad: jax.Array, index: Any) -> tuple[jax.Array, Params]:
            gathered, part = self._gathered(outer, index), self._part(index)
            logits, backward = self._vjp(lambda params, x: self.model.head(params, x, part), gathered, x)
            logits = logits if kept is None else kept[index]  # then XLA drops the product that nothing needs
            columns = vocabulary_columns(logits.shape[-1], vocabulary_axes(), part)
            of_logits = logits_grad(logits, columns, of, asked, statistics, sums.num_logits, statistics_grads)
            grads, more = self._backward(backward, of_logits)
            return x_grad + more, {name: self._reduced(name, g) for name, g in grads.items()}

        x_grad, grads = self._over_parts(of_part, zeros(x, dtype=jnp.float32))
        return loss, totals, grads, to_y(x_grad.astype(x.dtype))[0]

    def _vjp(self, function: Callable, gathered: Params, *args: Any, has_aux: bool = False) -> Any:
        return vjp(function, gathered, {name: self._like[name] for name in gathered}, *args, has_aux=has_aux)

    @property
    def _like(self) -> Any:
        """The layouts, with None at frozen parameters."""
        return trained_layouts(self.param_layouts)

    def _backward(self, backward: Callable[[Any], Any], y_grad: Any) -> Any:
        return in_float32(backward, y_grad) if self.float32_grads else backward(y_grad)

    def _logit_sums(
        self, outer: Params, x: jax.Array, batch: Batch, *, keep_logits: bool = False
    ) -> tuple[LogitSums, jax.Array | None]:
        """The sums over the whole vocabulary, and the logits of each part of it if they are to be kept."""
        axes, of, asked = vocabulary_axes(), self._targets(batch), self.asked
        assert asked is not None, "outputs as they are need a model whose vocabulary is not split"

        def of_part(index: Any) -> tuple[LogitSums, jax.Array | None]:
            part = self._part(index)
            logits = self.model.head(self._gathered(outer, index), x, part)
            columns = vocabulary_columns(logits.shape[-1], axes, part)
            return sums_of(logits, columns, of, asked), logits if keep_logits else None

        def add_part(sums: LogitSums, index: Any) -> tuple[LogitSums, jax.Array | None]:
            more, logits = of_part(index)
            return merge(sums, more), logits

        nothing = jax.tree.map(zeros, jax.eval_shape(of_part, 0)[0])
        start = nothing._replace(highest=nothing.highest + MASKED)
        sums, kept = lax.scan(add_part, start, jnp.arange(self.vocabulary_parts))
        return over_devices(sums, axes), kept

    def _part(self, index: Any) -> VocabularyPart:
        return WHOLE if self.vocabulary_parts == 1 else VocabularyPart(index, self.vocabulary_parts)

    def _embed(self, gathered: Params, batch: Batch, part: VocabularyPart) -> jax.Array:
        info = token_info(self.model, batch, train=self.train, within_documents=self.within_documents)
        x = self.constrain(self.model.embed(gathered, batch["tokens"], info, part))
        return vary(x, ("pp", "dp", "cp"))

    def _loss_of_piece(self, gathered: Params, x: jax.Array, batch: Batch) -> tuple[jax.Array, Totals]:
        features, own = self._features(gathered, x, batch)
        if self.loss_of.objective.whole_rows:  # then there is one piece
            return self.loss_of(self._together(jax.tree.map(lambda a: a[None], features), batch), batch)
        return self.loss_of(features, own)

    def _features(self, gathered: Params, x: jax.Array, batch: Batch) -> tuple[Any, Batch]:
        """(what the objective takes of each token, the batch of the same tokens).

        An explicit model splits its vocabulary over the stages. An automatic model cannot, because pp is manual. Its tokens
        are split instead: each stage computes the head for a share of the sequence."""
        axes = vocabulary_axes()
        if self.model.explicit:
            logits = self.model.head(gathered, broadcast_from_last_stage(x))
        else:
            x, batch = self._share_of_stage(x, batch)
            logits = self.model.head(gathered, x)
        if self.asked is None:
            return logits, batch
        columns = vocabulary_columns(logits.shape[-1], axes)
        return token_statistics(logits, columns, self._targets(batch), self.asked, axes), batch

    def _share_of_stage(self, x: jax.Array, batch: Batch) -> tuple[jax.Array, Batch]:
        stage, stages = rank_and_size("pp")
        x = jnp.where(stage == stages - 1, x, 0)
        if stages == 1:
            return x, batch
        share = -(-x.shape[1] // stages)  # a sequence that does not divide is padded
        pad = lambda a: jnp.pad(a, [(0, 0), (0, share * stages - a.shape[1]), *[(0, 0)] * (a.ndim - 2)])  # noqa: E731
        x = lax.psum_scatter(pad(x), "pp", scatter_dimension=1, tiled=True)
        return x, {key: lax.dynamic_slice_in_dim(pad(a), stage * share, share, 1) for key, a in batch.items()}

    def _together(self, features: Any, batch: Batch) -> Any:
        """Features of each part of the tokens, perhaps only of this stage's share → of all tokens [batch, seq, …], in the
        order of the batch."""
        seq = batch["weights"].shape[1]
        if not self.model.explicit:
            features = jax.tree.map(lambda x: from_all_stages(x)[:, :, : seq // self.token_parts], features)
        return jax.tree.map(lambda x: join_tokens(x, rank_and_size("sp")[1]), features)

    def _targets(self, batch: Batch) -> Targets:
        return Targets(batch["targets"], *(batch[name] for name in self._candidates))

    @property
    def _candidates(self) -> list[str]:
        """The name of the candidates, if they are asked for."""
        return [self.asked.candidates] if self.asked and self.asked.candidates else []

    def _split_tokens(self, x: jax.Array, batch: Batch) -> tuple[jax.Array, Batch]:
        """Splits both into parts of the tokens, [parts, ...]. (sp splits x, but not the batch.)"""
        ways = batch["tokens"].shape[1] // x.shape[1]
        own = {"targets", "weights", "counts", *self._candidates, *self.loss_of.keys} & batch.keys()
        needed = {name: split_tokens(batch[name], self.token_parts, ways) for name in sorted(own)}
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
        return carry, {name: jax.tree.map(merge, grads, self._like[name]) for name, grads in stacked.items()}


def token_info(
    model: FunctionalModel, batch: Batch, *, train: bool, layer: Any = None, within_documents: bool = True
) -> TokenInfo:
    """What the model is told of a microbatch."""
    random = TokenKey(batch["random"], *batch["tokens"].shape) if "random" in batch else None
    inputs = {name: batch[name] for name in model.inputs}
    documents = batch.get("segment_ids") if within_documents else None
    return TokenInfo(batch["positions"], documents, layer, inputs, random, train)
