"""What jaxpar takes for a model: an embedding, a stack of blocks, and a head; or one whole module.

Each part is a `flax.nnx` module, which a function of `nnx.Rngs` builds, or a `flax.linen` module. Functions are called while
tracing, so each weight is made on the device that keeps it and nowhere else. Dimensions of parameters have names from the
table in `jaxpar.parallel.sharding`. They stand on the parameter, or in `dims` (see `jaxpar.models.dimensions`).
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import jax
from flax import linen, nnx
from jaxtyping import Array, Float, Int

from jaxpar.parallel.collectives import rank_and_size, sum_over, vary, varying_axes
from jaxpar.parallel.randomness import TokenKey

Params = dict[str, Any]  # {"embed", "layers", "head"}: nested dicts of arrays; layers have a leading [num_layers]
Build = Callable[..., nnx.Module | linen.Module]  # (rngs) or (rngs, layer) → module
PartOfModel = Build | linen.Module
ACROSS_SEQUENCE = "jaxpar_mean_over_sequence"  # a name scope


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "segment_ids", "layer", "inputs", "random"],
    meta_fields=["train"],
)
@dataclass(frozen=True)
class TokenInfo:
    """What a module may need to know about its tokens, besides their activations.

    Attributes:
      positions: int32 [batch, seq], the position of each token in its document, for rotary or learned embeddings.
      segment_ids: int32 [batch, seq], the document of each token, to pass to `jaxpar.attention.attention`.
      layer: int32 scalar, the block's index in the stack; None in an embedding and outside of jaxpar's step.
      inputs: what else the batch has for each token, by name, see `Stack`.
      random: where random numbers come from; `rngs` is made of it.
      train: False in an evaluation.
    """

    positions: Int[Array, "batch seq"]
    segment_ids: Int[Array, "batch seq"] | None
    layer: Any = None
    inputs: Mapping[str, Array] = field(default_factory=dict)
    random: TokenKey | None = None
    train: bool = True

    @cached_property
    def rngs(self) -> nnx.Rngs | None:
        """For dropout, as in `self.dropout(x, rngs=info.rngs)`: depends on the seed, the step, the layer and the token, and
        on no layout. None in an evaluation."""
        return nnx.Rngs(self.random.key) if self.train and self.random is not None else None

    def mean_over_sequence(self, x: Float[Array, "batch seq *rest"]) -> Float[Array, "batch *rest"]:
        """The mean over all tokens of a row, also where each cp rank holds a part of them."""
        with jax.named_scope(ACROSS_SEQUENCE):
            axes = varying_axes(x)
            mean = sum_over(vary(x.mean(1), ("cp",)), ("cp",)) / rank_and_size("cp")[1]
            return vary(mean, axes)


@runtime_checkable
class Model(Protocol):
    """A stack of blocks. `Stack` is one; so is any object with these four members, and with those of the optional ones that
    it needs.

    Attributes:
      num_layers: number of blocks.
      dims, names, auxiliary, inputs, mixes_tokens_itself: (optional) as in `Stack`.
      explicit_tensor_collectives: (optional, default False) True if the modules call the functions of
        `jaxpar.parallel.collectives` themselves. Embedding and head then also take a `VocabularyPart` as their last
        argument, and pass it on to these functions. False: XLA places the tensor collectives, guided by the names of
        dimensions.
    """

    num_layers: int

    def embed(self, rngs: nnx.Rngs) -> nnx.Module | linen.Module:
        """A module (tokens int32 [batch, seq], info) → activations [batch, seq, embed]."""
        ...

    def block(self, rngs: nnx.Rngs) -> nnx.Module | linen.Module:
        """A module (activations, info) → activations of the same shape and dtype; or (activations, auxiliary outputs by
        name). If blocks differ, the method takes the layer's index too: `block(self, rngs, layer)`."""
        ...

    def head(self, rngs: nnx.Rngs) -> nnx.Module | linen.Module:
        """A module (activations, embed) → logits [batch, seq, vocab]; the second argument, the embedding's module, serves
        tied weights."""
        ...


class Stack:
    """A model of an embedding, blocks and a head.

    Blocks may differ. Those that build the same module with the same static attributes are of one kind. The engine repeats
    the shortest pattern of kinds; its last repetition may be cut short. Pipeline stages and groups of recomputed layers are
    made of whole repetitions.

    Args:
      embed, head: a Linen module, or a function of `nnx.Rngs` that builds an nnx or Linen module. See `Model` for what the
        modules take and give.
      blocks: the same, and if the function has a second parameter, it is the layer's index. Or a list of these: one for each
        layer, or a pattern that is repeated.
      num_layers: number of blocks; default: the length of the list.
      dims: {pattern of a parameter's path: names of its dimensions}, such as
        {"*/q_proj/kernel": ("embed", "heads", "head_dim")}. Paths begin with embed, layers or head. The first pattern that
        matches counts, and it counts more than names on the parameter. Blocks leave out the dimension of layers.
      names: {a name on the parameters: one of jaxpar's, or None}, for models whose parameters have names of their own.
      auxiliary: {name: weight} of outputs that blocks return or `sow`, [batch, seq] or [batch] for each block. The sum over
        blocks, averaged over the trained tokens, is reported, and weight times it is added to the loss. 0: only reported.
        None: dropped.
      inputs: {name: ShapeDtypeStruct of one token's} of arrays [rows, seq, …] that batches have in addition.
      mixes_tokens_itself: the modules mix tokens without `jaxpar.attention`, and are right on a part of the sequence.
    """

    def __init__(
        self,
        embed: PartOfModel,
        blocks: PartOfModel | Sequence[PartOfModel],
        head: PartOfModel,
        num_layers: int | None = None,
        *,
        dims: Mapping[str, tuple[str | None, ...]] | None = None,
        names: Mapping[str, str | None] | None = None,
        auxiliary: Mapping[str, float | None] | None = None,
        inputs: Mapping[str, jax.ShapeDtypeStruct] | None = None,
        mixes_tokens_itself: bool = False,
    ):
        pattern = list(blocks) if isinstance(blocks, Sequence) else [blocks]
        if num_layers is None and not isinstance(blocks, Sequence):
            raise ValueError("Stack: num_layers is missing: how many blocks are there?")
        self.num_layers = len(pattern) if num_layers is None else num_layers
        self.dims, self.names, self.auxiliary, self.inputs = dims, names, auxiliary, inputs
        self.mixes_tokens_itself = mixes_tokens_itself
        self._embed, self._pattern, self._head = embed, pattern, head

    def embed(self, rngs: nnx.Rngs) -> nnx.Module | linen.Module:
        return build_part(self._embed, rngs)

    def block(self, rngs: nnx.Rngs, layer: int) -> nnx.Module | linen.Module:
        return build_part(self._pattern[layer % len(self._pattern)], rngs, layer)

    def head(self, rngs: nnx.Rngs) -> nnx.Module | linen.Module:
        return build_part(self._head, rngs)


class Whole:
    """A model that is not a stack of blocks. All of it takes the place of the embedding, and it cannot be pipelined.

    Args:
      module: a Linen module, a function of `nnx.Rngs` that builds an nnx or Linen module, or an nnx module with its weights,
        from which training then starts. It maps (tokens, info) to logits [batch, seq, vocab].
      dims, names, inputs, mixes_tokens_itself: as in `Stack`. Paths begin with embed.
    """

    num_layers = 0

    def __init__(
        self,
        module: PartOfModel | nnx.Module,
        *,
        dims: Mapping[str, tuple[str | None, ...]] | None = None,
        names: Mapping[str, str | None] | None = None,
        inputs: Mapping[str, jax.ShapeDtypeStruct] | None = None,
        mixes_tokens_itself: bool = False,
    ):
        self.dims, self.names, self.inputs, self.mixes_tokens_itself = dims, names, inputs, mixes_tokens_itself
        self._module = module

    @property
    def own_params(self) -> Params | None:
        """The weights of an nnx module that is there already."""
        if not isinstance(self._module, nnx.Module):
            return None
        return {"embed": nnx.to_pure_dict(nnx.state(self._module, nnx.Param)), "layers": {}, "head": {}}

    def embed(self, rngs: nnx.Rngs) -> nnx.Module | linen.Module:
        if isinstance(self._module, nnx.Module):
            return self._module
        return build_part(self._module, rngs)

    def block(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Nothing()

    def head(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Nothing()


class _Nothing(nnx.Module):
    def __call__(self, x: jax.Array, _: Any) -> jax.Array:
        return x


def build_part(part: PartOfModel, rngs: nnx.Rngs, layer: int = 0) -> nnx.Module | linen.Module:
    """The module of a part, as `Stack` takes it."""
    if isinstance(part, linen.Module):
        return part
    return part(rngs, layer) if takes_layer(part) else part(rngs)


def takes_layer(build: Build) -> bool:
    """Whether the function has a second positional parameter that must be given, or one named `layer`."""
    positional = [p for p in parameters_of(build) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (positional[1].default is inspect.Parameter.empty or positional[1].name == "layer")


def parameters_of(function: Any) -> list[inspect.Parameter]:
    """The parameters of a function, or of a class's constructor; none if there is no telling."""
    if not callable(function):
        return []
    try:
        if inspect.isclass(function):  # Flax's classes have a metaclass, whose signature says nothing
            return list(inspect.signature(function.__init__).parameters.values())[1:]
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return []
