"""What jaxpar takes for a model: an embedding, a stack of blocks that are alike, and a head.

Any object with the four members of `Model` will do. Its three methods build `flax.nnx` modules. Their parameters name
their dimensions, with names from the table in `jaxpar.parallel.sharding`:

    nnx.Param(value, out_sharding=("embed", "mlp"))   or   nnx.with_partitioning(initializer, ("embed", "mlp"))

The methods are called while tracing, so each weight is made on the device that keeps it and nowhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import Array, Float, Int

from jaxpar.config import ConfigError
from jaxpar.parallel.collectives import WHOLE, VocabularyPart

Params = dict[str, Any]  # {"embed", "layers", "head"}: nested dicts of arrays; layers have a leading [num_layers]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenInfo:
    """What a block may need to know about its tokens, besides their activations.

    Attributes:
      positions: int32 [batch, seq], the position of each token in its document, for rotary or learned embeddings.
      segment_ids: int32 [batch, seq], the document of each token, to pass to `jaxpar.attention.attention`.
    """

    positions: Int[Array, "batch seq"]
    segment_ids: Int[Array, "batch seq"] | None


@runtime_checkable
class Model(Protocol):
    """A stack of blocks that are alike.

    Attributes:
      num_layers: number of blocks.
      explicit_tensor_collectives: (optional, default False) True if the modules call the functions of
        `jaxpar.parallel.collectives` themselves. Embedding and head then also take a `VocabularyPart` as their last
        argument, and pass it on to these functions. False: XLA places the tensor collectives, guided by the names of
        dimensions.
    """

    num_layers: int

    def embed(self, rngs: nnx.Rngs) -> nnx.Module:
        """A module (tokens int32 [batch, seq], info) → activations [batch, seq, embed]."""
        ...

    def block(self, rngs: nnx.Rngs) -> nnx.Module:
        """A module (activations, info) → activations of the same shape and dtype."""
        ...

    def head(self, rngs: nnx.Rngs) -> nnx.Module:
        """A module (activations, embed) → logits [batch, seq, vocab]; the second argument serves tied weights."""
        ...


class WholeModel:
    """A model that is not a stack of blocks. All of it takes the place of the embedding, and it cannot be pipelined.

    Args:
      build: rngs → a module (tokens, info) → logits [batch, seq, vocab].
    """

    num_layers = 0

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self.embed = build

    def block(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Nothing()

    def head(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Nothing()


class _Nothing(nnx.Module):
    def __call__(self, x: jax.Array, _: Any) -> jax.Array:
        return x


class FunctionalModel:
    """A `Model` as pure functions of its parameters.

    Attributes:
      explicit: the modules call the tensor collectives themselves.
      shapes: tree of ShapeDtypeStruct, the global shapes; layers are stacked, [num_layers, ...].
      dims: the same tree with a tuple of dimension names at each leaf, or None if a parameter has none.
    """

    def __init__(self, model: Model | Callable[[nnx.Rngs], nnx.Module]):
        if not isinstance(model, Model):
            if isinstance(model, nnx.Module) or not callable(model):
                raise ConfigError(
                    f"model: {type(model).__name__} lacks members of jaxpar.Model, which are num_layers, embed, block and "
                    f"head. If your model is not a stack of blocks, give a function of nnx.Rngs: "
                    f"lambda rngs: MyModule(..., rngs=rngs)"
                )
            model = WholeModel(model)
        self.num_layers = model.num_layers
        self.explicit = bool(getattr(model, "explicit_tensor_collectives", False))
        self._build = {"embed": model.embed, "layers": model.block, "head": model.head}
        parts = {part: _inspect(part, build) for part, build in self._build.items()}
        self._graphs = {part: graph for part, (graph, _, _) in parts.items()}
        self.shapes = {part: shapes for part, (_, shapes, _) in parts.items()}
        self.dims = {part: dims for part, (_, _, dims) in parts.items()}
        self.shapes["layers"] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.num_layers, *x.shape), x.dtype), self.shapes["layers"]
        )
        self.dims["layers"] = jax.tree.map(
            lambda names: None if names is None else ("layers", *names), self.dims["layers"], is_leaf=_is_names
        )

    def init(self, seed: int) -> Params:
        """Initial parameters, float32. Each depends only on the seed, the index of its layer and its path in the module,
        so they are bitwise the same on every mesh."""
        key = jax.random.key(seed)
        embed, layers, head = (jax.random.fold_in(key, part) for part in range(3))
        layer_keys = jax.vmap(lambda index: jax.random.fold_in(layers, index))(jnp.arange(self.num_layers))
        return {
            "embed": self._values("embed", embed),
            "layers": jax.vmap(lambda key: self._values("layers", key))(layer_keys),
            "head": self._values("head", head),
        }

    def module(self, part: str, params: Params) -> Any:
        """The module of a part ("embed", "layers": one block, "head") with these parameters."""
        return nnx.merge(self._graphs[part], nnx.State(params))

    def embed(
        self, params: Params, tokens: Int[Array, "batch seq"], info: TokenInfo, part: VocabularyPart = WHOLE
    ) -> jax.Array:
        """Activations of tokens.

        Args:
          params: with the part "embed".
          part: of the vocabulary, that the embedding in `params` holds; for explicit models.
        """
        return self.module("embed", params["embed"])(tokens, info, *([part] if self.explicit else []))

    def block(self, params: Params, x: Float[Array, "batch seq embed"], info: TokenInfo) -> jax.Array:
        """One block with the parameters of one layer."""
        return self.module("layers", params)(x, info)

    def head(self, params: Params, x: Float[Array, "batch seq embed"], part: VocabularyPart = WHOLE) -> jax.Array:
        """Logits; `params` with the parts "embed" and "head", `part` as in `embed`."""
        embed = self.module("embed", params["embed"])
        return self.module("head", params["head"])(x, embed, *([part] if self.explicit else []))

    def _values(self, part: str, key: jax.Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(_build(self._build[part], key), nnx.Param))
        return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _inspect(part: str, build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Params, Params]:
    """The graph, shapes and dimension names of a module, found without making its weights."""
    module = nnx.eval_shape(lambda: _build(build, jax.random.key(0)))
    # With two filters it returns three; its type says a tuple of any length.
    graph, params, others = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    if found := [f"{'/'.join(map(str, path))} ({type(v).__name__})" for path, v in nnx.to_flat_state(others)]:
        raise ConfigError(
            f"model: {part} holds state that is not an nnx.Param: {', '.join(found)}. Only parameters are trained and "
            f"saved: running statistics and dropout are not supported"
        )
    for path, v in nnx.to_flat_state(params):
        if v.get_metadata().get("linen_meta_type") is linen.Partitioned:
            raise ConfigError(
                f"model: {part}/{'/'.join(map(str, path))} names its dimensions with flax.linen.with_partitioning, "
                f"whose names are mesh axes: use flax.linen.with_logical_partitioning"
            )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), nnx.to_pure_dict(params))
    names = {path: v.get_metadata().get("out_sharding") for path, v in nnx.to_flat_state(params)}
    return graph, shapes, nnx.traversals.unflatten_mapping(names)


def _build(build: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> nnx.Module:
    # Flax would look for mesh axes of these names, but they are names of dimensions.
    with nnx.use_eager_sharding(False):
        module = build(nnx.Rngs(key))
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.bridge.ToNNX):  # it keeps its keys, which it needed only to make the weights
            node.to_nnx__rngs = None
    return module


def _is_names(x: Any) -> bool:
    return x is None or isinstance(x, tuple)
