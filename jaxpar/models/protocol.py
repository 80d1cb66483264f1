"""What a model is to jaxpar: an embedding, a stack of like blocks, a head.

Any object with the four members of `Model` will do. Its three methods build `flax.nnx` modules whose parameters carry
dimension names from the table in `jaxpar.parallel.sharding`:

    nnx.Param(value, out_sharding=("embed", "mlp"))   or   nnx.with_partitioning(initializer, ("embed", "mlp"))

The methods are called while tracing: no weight exists before it is made on the device that keeps it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import Array, Float, Int

from jaxpar.attention import AttentionSettings, attention_settings
from jaxpar.config import ConfigError

Params = dict[str, Any]  # {"embed", "layers", "head"}: nested dicts of arrays; layers have a leading [num_layers]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenInfo:
    """What a block may need to know about its tokens besides their activations.

    Attributes:
      positions: int32 [batch, seq], place of each token in its document, for rotary or learned embeddings.
      segment_ids: int32 [batch, seq], document of each token; pass it to `jaxpar.attention.attention`.
    """

    positions: Int[Array, "batch seq"]
    segment_ids: Int[Array, "batch seq"] | None


@runtime_checkable
class Model(Protocol):
    """A stack of like blocks.

    Attributes:
      num_layers: number of blocks.
      explicit_tensor_collectives: (optional, default False) True if the modules call the functions of
        `jaxpar.parallel.collectives` themselves; False if XLA shall place the tensor collectives from the dimension names.
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
    """A model that is no stack of blocks: all of it stands in the embedding's place. It cannot be pipelined.

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

    Args:
      attention: how calls of `jaxpar.attention.attention` in the model's modules are computed.

    Attributes:
      shapes: tree of ShapeDtypeStruct, global shapes, float32 as the modules made them.
      dims: the same tree with a tuple of dimension names at each leaf, or None where a parameter has none.
    """

    def __init__(
        self,
        model: Model | Callable[[nnx.Rngs], nnx.Module],
        attention: AttentionSettings = AttentionSettings(),  # noqa: B008 (frozen)
    ):
        if not isinstance(model, Model):
            if isinstance(model, nnx.Module) or not callable(model):
                raise ConfigError(
                    f"model: {type(model).__name__} has not the members num_layers, embed, block and head of "
                    f"jaxpar.Model. A model that is no stack of blocks is given as a function of nnx.Rngs: "
                    f"lambda rngs: MyModule(..., rngs=rngs)"
                )
            model = WholeModel(model)
        self.num_layers = model.num_layers
        self.attention = attention
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
        """Initial parameters, float32. Each depends on the seed, its layer's index and its place in the module only, so
        they are bitwise the same on every mesh."""
        key = jax.random.key(seed)
        embed, layers, head = (jax.random.fold_in(key, part) for part in range(3))
        layer_keys = jax.vmap(lambda index: jax.random.fold_in(layers, index))(jnp.arange(self.num_layers))
        return {
            "embed": self._values("embed", embed),
            "layers": jax.vmap(lambda key: self._values("layers", key))(layer_keys),
            "head": self._values("head", head),
        }

    def embed(self, params: Params, tokens: Int[Array, "batch seq"], info: TokenInfo) -> jax.Array:
        with attention_settings(self.attention):  # a model that is no stack has all its layers here
            return self._module("embed", params["embed"])(tokens, info)

    def block(self, params: Params, x: Float[Array, "batch seq embed"], info: TokenInfo) -> jax.Array:
        """One block; `params` are one layer's."""
        with attention_settings(self.attention):
            return self._module("layers", params)(x, info)

    def head(self, params: Params, x: Float[Array, "batch seq embed"]) -> jax.Array:
        """`params` need the parts "embed" and "head"."""
        return self._module("head", params["head"])(x, self._module("embed", params["embed"]))

    def _module(self, part: str, params: Params) -> Any:
        return nnx.merge(self._graphs[part], nnx.State(params))

    def _values(self, part: str, key: jax.Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(_build(self._build[part], key), nnx.Param))
        return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _inspect(part: str, build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Params, Params]:
    """Graph, shapes and dimension names of a module, without making its weights."""
    module = nnx.eval_shape(lambda: _build(build, jax.random.key(0)))
    # With two filters it returns three; its type says a tuple of any length.
    graph, params, others = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    if found := [f"{'/'.join(map(str, path))} ({type(v).__name__})" for path, v in nnx.to_flat_state(others)]:
        raise ConfigError(
            f"model: {part} holds state that is no nnx.Param: {', '.join(found)}. Only parameters are trained and "
            f"saved: running statistics and dropout are not supported"
        )
    for path, v in nnx.to_flat_state(params):
        if v.get_metadata().get("linen_meta_type") is linen.Partitioned:
            raise ConfigError(
                f"model: {part}/{'/'.join(map(str, path))} names its dimensions by flax.linen.with_partitioning, which "
                f"means mesh axes: use flax.linen.with_logical_partitioning"
            )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), nnx.to_pure_dict(params))
    names = {path: v.get_metadata().get("out_sharding") for path, v in nnx.to_flat_state(params)}
    return graph, shapes, nnx.traversals.unflatten_mapping(names)


def _build(build: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> nnx.Module:
    # Flax would look for a mesh that has axes of these names, but they are names of dimensions.
    with nnx.use_eager_sharding(False):
        module = build(nnx.Rngs(key))
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.bridge.ToNNX):  # needed its keys to make the weights, and keeps them
            node.to_nnx__rngs = None
    return module


def _is_names(x: Any) -> bool:
    return x is None or isinstance(x, tuple)
