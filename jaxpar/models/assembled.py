"""A trained model as one module of Flax, for use outside of jaxpar."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jaxtyping import Array, Float, Int

from jaxpar.models.functional import FunctionalModel
from jaxpar.models.protocol import Params, TokenInfo


class Assembled(nnx.Module):
    """The modules of a stack with their weights, one after the other.

    Attributes:
      embed, head: the model's own.
      blocks: the same for each layer, in order.
    """

    def __init__(self, embed: Any, blocks: list[Any], head: Any):
        self.embed, self.blocks, self.head = (
            _as_nnx(embed),
            nnx.List([_as_nnx(block) for block in blocks]),
            _as_nnx(head),
        )

    def __call__(
        self, tokens: Int[Array, "batch seq"], info: TokenInfo | None = None
    ) -> Float[Array, "batch seq vocab"]:
        """Logits.

        Args:
          info: default: each row is one document, and this is an evaluation.
        """
        if info is None:
            info = TokenInfo(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), None, train=False)
        x = self.embed(tokens, info)
        for block in self.blocks:
            x = block(x, info)
            x = x[0] if isinstance(x, tuple) else x
        embed = self.embed.bound() if isinstance(self.embed, LinenModule) else self.embed
        return self.head(x, embed)


class LinenModule(nnx.Module):
    """A Linen module with its variables, as an nnx module. Unlike `nnx.bridge.ToNNX`, it needs no random keys."""

    def __init__(self, bound: linen.Module):
        module, variables = bound.unbind()
        self.module = nnx.static(module)
        self.params = nnx.data(jax.tree.map(nnx.Param, variables["params"]))
        self.constants = nnx.data({name: tree for name, tree in variables.items() if name != "params"})

    def bound(self) -> linen.Module:
        """The Linen module, bound to the variables."""
        is_param = lambda x: isinstance(x, nnx.Param)  # noqa: E731
        params = jax.tree.map(lambda x: x[...], self.params, is_leaf=is_param)
        return self.module.bind({"params": params, **self.constants})

    def __call__(self, *args: Any) -> Any:
        return self.bound()(*args)


def assemble(model: FunctionalModel, params: Params) -> Any:
    """The model with these parameters, for evaluation: of a whole model the user's own module (if it is Linen, bound to its
    variables), of a stack an `Assembled`.

    Args:
      params: as `FunctionalModel.init` gives them; any float dtypes.
    """
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    embed, blocks, head = model.modules(params)
    return Assembled(embed, blocks, head) if blocks else embed


def _as_nnx(module: Any) -> nnx.Module:
    return LinenModule(module) if isinstance(module, linen.Module) else module
