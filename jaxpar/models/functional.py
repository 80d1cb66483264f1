"""A model as pure functions of its parameters, whatever it was given as."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.interpreters import partial_eval
from jaxtyping import Array, Float, Int

from jaxpar.config import ConfigError
from jaxpar.models.dimensions import named_dimensions
from jaxpar.models.part_of import part_of
from jaxpar.models.parts import Auxiliary, Part
from jaxpar.models.protocol import Model, Params, Stack, TokenInfo, Whole, takes_layer
from jaxpar.parallel.collectives import WHOLE, VocabularyPart
from jaxpar.parallel.randomness import TokenKey

EXAMPLE_TOKENS = 8
METRICS = {"loss", "grad_norm", "learning_rate", "tokens", "skipped", "loss_scale", "step"}
UserModel = Model | Stack | Whole | nnx.Module | linen.Module | Callable[[nnx.Rngs], nnx.Module | linen.Module]


class FunctionalModel:
    """A `Model` as pure functions of its parameters.

    Where blocks are of several kinds, the engine's layer is one repetition of the pattern of kinds: `params["layers"]` is then
    {"0": …, "1": …}, and entry j has the parameters of blocks j, j + period, j + 2 · period, …, stacked.

    Attributes:
      num_blocks: number of blocks.
      num_layers: number of repetitions of the pattern, the last of which may be cut short. Without one, `num_blocks`.
      period: number of blocks in the pattern.
      explicit: the modules call the tensor collectives themselves.
      shapes: tree of ShapeDtypeStruct, the global shapes; layers are stacked, [num_layers, ...].
      dims: the same tree with a tuple of dimension names at each leaf, or None if a parameter has none.
      width: size of the activations' last dimension; of a whole model, of the logits'.
      parts: the modules, {"embed", "layers", "head"}, with "layers" {"0", "1", …} if blocks are of several kinds.
      own_params: the weights that a whole model came with; None: it is to be initialized.
      auxiliary: {name: weight in the loss} of the blocks' auxiliary outputs that are taken.
      inputs: {name: ShapeDtypeStruct of one token's} of a batch's additional arrays.

    Args:
      user_model: see `jaxpar.models.protocol`.
      seq_length: tokens to trace with.

    Raises:
      ConfigError: it is no model, or holds what cannot be trained with.
    """

    def __init__(self, user_model: UserModel, seq_length: int = EXAMPLE_TOKENS):
        model: Model = _as_model(user_model)
        self.num_blocks = model.num_layers
        self.own_params = model.own_params if isinstance(model, Whole) else None
        self.explicit = bool(getattr(model, "explicit_tensor_collectives", False))
        self.mixes_tokens_itself = bool(getattr(model, "mixes_tokens_itself", False))
        self.inputs: Mapping[str, jax.ShapeDtypeStruct] = getattr(model, "inputs", None) or {}
        self._taken: Mapping[str, float | None] = getattr(model, "auxiliary", None) or {}
        if reserved := sorted(METRICS & self._taken.keys()):
            raise ConfigError(f"model: auxiliary: {reserved[0]!r} is the name of another metric: choose another")
        self.auxiliary = {name: weight for name, weight in self._taken.items() if weight is not None}
        tokens = jax.ShapeDtypeStruct((1, seq_length), jnp.int32)
        self._tokens, self._info = tokens, example_info(tokens, self.inputs)
        extra = (WHOLE,) if self.explicit else ()
        self._embed = part_of("embed", model.embed, (tokens, self._info), lambda *args: (*args, *extra))
        x = jax.eval_shape(
            lambda *args: self._embed(*args, *extra, info=args[-1])[0], self._embed.shapes, tokens, self._info
        )
        self.width = x.shape[-1]
        self._kinds = self._pattern_of_kinds(model, x)
        self._head = part_of(
            "head", model.head, (x, self._embed.shapes), lambda x, embed: (x, self._embed.bind(embed), *extra)
        )
        self.shapes, self.dims = self._shapes_and_dims(model)

    def _pattern_of_kinds(self, model: Model, x: Any) -> list[Part]:
        """The kind of each block of the shortest pattern."""
        examples = x, self._info
        if not takes_layer(model.block) or not self.num_blocks:
            return [part_of("layers", model.block, examples)]
        build: Any = model.block  # whose type names the first parameter only
        blocks: list[Part] = []
        for layer in range(self.num_blocks):
            block = part_of("layers", functools.partial(lambda layer, rngs: build(rngs, layer), layer), examples)
            blocks.append(next((kind for kind in blocks if block.differs_in(kind) is None), block))
        return next(
            blocks[:period]
            for period in range(1, self.num_blocks + 1)
            if all(block is blocks[i % period] for i, block in enumerate(blocks))
        )

    def _shapes_and_dims(self, model: Model) -> tuple[Params, Params]:
        parts: dict[str, Any] = {"embed": self._embed, "layers": self._kinds[0], "head": self._head}
        if self.period > 1:
            parts["layers"] = {str(j): kind for j, kind in enumerate(self._kinds)}
        self.parts, is_part = parts, lambda x: isinstance(x, Part)
        shapes = jax.tree.map(lambda part: part.shapes, parts, is_leaf=is_part)
        own = jax.tree.map(lambda part: part.names, parts, is_leaf=is_part)
        dims = named_dimensions(shapes, own, getattr(model, "dims", None), getattr(model, "names", None))

        def stacked(kind: int, tree: Any) -> Any:
            repeats = self._repeats(kind)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct((repeats, *x.shape), x.dtype), tree)

        layers = shapes["layers"]
        shapes["layers"] = (
            {j: stacked(int(j), tree) for j, tree in layers.items()} if self.period > 1 else stacked(0, layers)
        )
        is_names = lambda x: x is None or isinstance(x, tuple)  # noqa: E731
        dims["layers"] = jax.tree.map(
            lambda names: None if names is None else ("layers", *names), dims["layers"], is_leaf=is_names
        )
        return shapes, dims

    @property
    def pattern(self) -> str:
        """What the engine's layers are, if they are several blocks; for messages."""
        if self.period == 1:
            return ""
        differs = f" (blocks 0 and 1 differ in {self._kinds[1].differs_in(self._kinds[0])})"
        return (
            f"{self.num_blocks} blocks that repeat a pattern of {self.period}{differs}, of which a stage takes whole "
            f"repetitions: {self.num_layers}"
        )

    @property
    def period(self) -> int:
        return len(self._kinds)

    @property
    def num_layers(self) -> int:
        return self._repeats(0)

    def _repeats(self, j: int) -> int:
        """How many blocks have place j in the pattern."""
        return -(-(self.num_blocks - j) // self.period)

    def init(self, seed: int) -> Params:
        """Initial parameters, float32. Each depends only on the seed, the index of its layer and its path in the module,
        so they are bitwise the same on every mesh."""
        key = jax.random.key(seed)
        embed, layers, head = (jax.random.fold_in(key, part) for part in range(3))

        def blocks(j: int) -> Params:
            index = jnp.arange(self._repeats(j)) * self.period + j
            keys = jax.vmap(lambda index: jax.random.fold_in(layers, index))(index)
            return jax.vmap(self._kinds[j].init)(keys)

        return {
            "embed": self._embed.init(embed),
            "layers": {str(j): blocks(j) for j in range(self.period)} if self.period > 1 else blocks(0),
            "head": self._head.init(head),
        }

    def embed(
        self, params: Params, tokens: Int[Array, "batch seq"], info: TokenInfo, part: VocabularyPart = WHOLE
    ) -> jax.Array:
        """Activations of tokens.

        Args:
          params: with the part "embed".
          part: of the vocabulary, that the embedding in `params` holds; for explicit models.
        """
        info = replace(info, random=None if info.random is None else info.random.fold_in(0))
        output, found = self._embed(params["embed"], tokens, info, *([part] if self.explicit else []), info=info)
        _refuse_outside_of_blocks("embed", found)
        return output

    def block(self, params: Params, x: Float[Array, "batch seq embed"], info: TokenInfo) -> jax.Array:
        """The activations of `block_and_auxiliary`."""
        return self.block_and_auxiliary(params, x, info)[0]

    def block_and_auxiliary(
        self, params: Params, x: Float[Array, "batch seq embed"], info: TokenInfo
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One layer of the engine.

        Args:
          params: of one layer.
          info: `layer` is the engine's. It may be None if blocks need no index (`needs_layer`).

        Returns:
          (activations, the auxiliary outputs that are taken, each [batch, seq] or [batch, 1], float32).
        """
        total: dict[str, jax.Array] = {}
        for j, kind in enumerate(self._kinds):
            own = params[str(j)] if self.period > 1 else params
            layer = None if info.layer is None else info.layer * self.period + j
            random = info.random
            if random is not None:
                assert layer is not None, "a model that draws random numbers needs the layer's index"
                random = random.fold_in(1 + layer)
            y, found = self._one_block(kind, own, x, replace(info, layer=layer, random=random))
            if j >= self.num_blocks - (self.num_layers - 1) * self.period:  # missing in the last repetition
                assert layer is not None
                is_there = layer < self.num_blocks
                y = jnp.where(is_there, y, x)
                found = {name: jnp.where(is_there, value, 0) for name, value in found.items()}
            x = y
            total = {name: total[name] + value if total else value for name, value in found.items()}
        return x, total

    def _one_block(
        self, kind: Part, params: Params, x: jax.Array, info: TokenInfo
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, found = kind(params, x, info, info=info)
        if isinstance(y, tuple):
            y, returned = y
            if not isinstance(returned, Mapping):
                raise ConfigError("model: a block returns (activations, auxiliary), but auxiliary is no dict of names")
            found = {**found, **returned}
        if y.shape != x.shape or y.dtype != x.dtype:
            raise ConfigError(
                f"model: a block maps activations {x.dtype}{list(x.shape)} to {y.dtype}{list(y.shape)}: the two must be alike"
            )
        return y, self._checked(found, x.shape[:2])

    def _checked(self, found: Auxiliary, tokens: tuple[int, ...]) -> dict[str, jax.Array]:
        """The auxiliary outputs that are taken, with a number for each token or row."""
        unknown = sorted(found.keys() - self._taken.keys())
        if unknown:
            raise ConfigError(
                f"model: a block gives the auxiliary output {unknown[0]!r}, and nothing takes it: give the model "
                f"auxiliary={{{unknown[0]!r}: weight}}, its weight in the loss (0: it is only reported; None: dropped)"
            )
        result = {}
        for name in self.auxiliary:
            value = found.get(name)
            if value is not None and value.shape not in (tokens, tokens[:1], (tokens[0], 1)):
                raise ConfigError(
                    f"model: the auxiliary output {name!r} has the shape {list(value.shape)}: give a number for each token, "
                    f"[batch, seq] = {list(tokens)}, or for each row, [batch] (see `info.mean_over_sequence`). What is averaged "
                    f"over the rows that a device happens to hold would depend on the layout"
                )
            result[name] = (
                jnp.zeros((tokens[0], 1)) if value is None else value.reshape(tokens[0], -1).astype(jnp.float32)
            )
        return result

    def head(self, params: Params, x: Float[Array, "batch seq embed"], part: VocabularyPart = WHOLE) -> jax.Array:
        """Logits; `params` with the parts "embed" and "head", `part` as in `embed`."""
        embed = self._embed.bind(params["embed"]) if self.num_blocks or self._head.shapes else None
        output, found = self._head(params["head"], x, embed, *([part] if self.explicit else []))
        _refuse_outside_of_blocks("head", found)
        return output

    def modules(self, params: Params) -> tuple[Any, list[Any], Any]:
        """(embedding, the blocks in order, head): the user's own modules with these parameters, for evaluation."""
        info = self._info

        def block(layer: int) -> Any:
            place, repeat = layer % self.period, layer // self.period
            own = params["layers"][str(place)] if self.period > 1 else params["layers"]
            return self._kinds[place].bind(jax.tree.map(lambda p: p[repeat], own), info)

        blocks = [block(layer) for layer in range(self.num_blocks)]
        return self._embed.bind(params["embed"], info), blocks, self._head.bind(params["head"], info)

    @cached_property
    def _used(self) -> set[str]:
        """What has a say in what the embedding and the blocks compute, of "layer", "rngs of embed", "rngs of blocks" and
        "info.…", found by tracing them."""

        def run(given: dict[str, Any], tokens: Any, params: Params) -> Any:
            rows, seq = tokens.shape
            info = replace(given["info"], train=True, random=TokenKey(given["rngs of embed"], rows, seq))
            x = self.embed(params, tokens, info)
            info = replace(info, layer=given["layer"], random=TokenKey(given["rngs of blocks"], rows, seq))
            return self.block_and_auxiliary(params["layers"], x, info) if self.num_blocks else x

        words = jax.ShapeDtypeStruct((5,), jnp.uint32)
        layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.shapes["layers"])
        given = {
            "info": self._info,
            "layer": jax.ShapeDtypeStruct((), jnp.int32),
            "rngs of blocks": words,
            "rngs of embed": words,
        }
        traced = jax.make_jaxpr(run)(given, self._tokens, {**self.shapes, "layers": layer}).jaxpr
        _, used = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
        paths = [
            jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(given)
        ]
        return {path for path, is_used in zip(paths, used, strict=False) if is_used}

    @cached_property
    def outputs(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what the head gives for one token; logits have [vocab]."""

        def head(params: Params, tokens: Any, info: TokenInfo) -> jax.Array:
            return self.head(params, self.embed(params, tokens, info))

        found = jax.eval_shape(head, self.shapes, self._tokens, self._info)
        return jax.ShapeDtypeStruct(found.shape[2:], found.dtype)

    @property
    def vocab_size(self) -> int:
        """Size of the logits' last dimension."""
        return self.outputs.shape[-1]

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers in training."""
        return not self.explicit and bool({"rngs of embed", "rngs of blocks"} & self._used)

    @property
    def needs_layer(self) -> bool:
        """Whether blocks must be given their index."""
        return not self.explicit and (self.is_random or "layer" in self._used)

    @property
    def knows_documents(self) -> bool:
        """Whether `info.segment_ids` has a say. Otherwise tokens of different documents attend to each other."""
        return self.explicit or "info.segment_ids" in self._used


def _as_model(model: Any) -> Any:
    """What a user gives as a model → a `Model`."""
    if isinstance(model, Model):
        return model
    if isinstance(model, type) and issubclass(model, linen.Module):
        raise ConfigError(f"model: {model.__name__} is a class of flax.linen: give an instance, {model.__name__}(…)")
    if isinstance(model, nnx.bridge.ToNNX):
        raise ConfigError(
            f"model: an nnx.bridge.ToNNX: give the Linen module itself, {type(model.to_nnx__module).__name__}(…)"
        )
    if isinstance(model, nnx.Module | linen.Module) or callable(model):
        return Whole(model)
    raise ConfigError(
        f"model: a {type(model).__name__} is no model: give a jaxpar.Stack, an object with the members of jaxpar.Model "
        f"(num_layers, embed, block, head), a module of flax.nnx or flax.linen, or a function of nnx.Rngs that builds one"
    )


def example_info(tokens: Any, inputs: Mapping[str, jax.ShapeDtypeStruct]) -> TokenInfo:
    extra: Any = {name: jax.ShapeDtypeStruct((*tokens.shape, *x.shape), x.dtype) for name, x in inputs.items()}
    return TokenInfo(tokens, tokens, inputs=extra, train=False)


def _refuse_outside_of_blocks(part: str, found: Auxiliary) -> None:
    if found:
        raise ConfigError(
            f"model: the {part} sows {sorted(found)[0]!r}, which nothing takes: auxiliary outputs come from blocks"
        )
