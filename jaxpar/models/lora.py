"""Low-rank adapters of the built-in decoder (LoRA, Hu et al., 2021, arXiv:2106.09685), and products with them.

A frozen matrix W becomes W + A B · alpha / rank. A and B are split like W. Column-parallel, W [embed, …] is split along its
outputs: A [embed, rank] is whole on each device, and B [rank, …] is split. Row-parallel, W […, embed] is split along its
inputs: A […, rank] is split, and B [rank, embed] is whole. In both, what travels over the tensor group for the adapter is as
wide as the rank.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpar.config.lora import TARGETS, Lora
from jaxpar.models.protocol import Params
from jaxpar.parallel.collective_matmul import gather_then_multiply, multiply_then_scatter
from jaxpar.parallel.collectives import gather_sequence

ADAPTERS = "lora"  # the name under which a module has them


class Adapter(nnx.Module):
    """A and B of one matrix. A is uniform in ±1/√inputs (PEFT's default), and B zero, so that training starts from W.

    Args:
      weight: the matrix, whose first dimension (column-parallel) or last one (row-parallel) is "embed".
    """

    def __init__(self, weight: nnx.Param, lora: Lora, rngs: nnx.Rngs):
        dims, shape = weight.get_metadata()["out_sharding"], weight.shape
        inputs = 1 if dims[0] == "embed" else len(shape) - 1  # how many dimensions are summed over
        bound = math.prod(shape[:inputs]) ** -0.5
        a = jax.random.uniform(rngs.params(), (*shape[:inputs], lora.rank), minval=-bound, maxval=bound)
        self.a = nnx.LoRAParam(a, out_sharding=(*dims[:inputs], None))
        self.b = nnx.LoRAParam(jnp.zeros((lora.rank, *shape[inputs:])), out_sharding=(None, *dims[inputs:]))
        self.scale = lora.scale


def add_adapters(modules: list[nnx.Module], lora: Lora, rngs: nnx.Rngs) -> None:
    """Gives the modules of a block adapters of those of their matrices that `lora` names."""
    for module in modules:
        names = [name for target, name in TARGETS.items() if target in lora.targets and hasattr(module, name)]
        if names:
            setattr(module, ADAPTERS, nnx.Dict({name: Adapter(getattr(module, name), lora, rngs) for name in names}))


def column_parallel(
    module: nnx.Module, names: list[str], equation: str, x: jax.Array, *, overlap: bool
) -> list[jax.Array]:
    """`gather_then_multiply` of x [batch, seq, embed] with the matrices `names` of a module and their adapters."""
    weights = [getattr(module, name)[...] for name in names]
    products = gather_then_multiply(equation, x, *weights, overlap=overlap)
    adapters = {i: found for i, name in enumerate(names) if (found := _adapter(module, name)) is not None}
    if not adapters:
        return products
    narrow = jnp.concatenate([x @ adapter.a[...] * adapter.scale for adapter in adapters.values()], axis=-1)
    parts = jnp.split(gather_sequence(narrow), len(adapters), axis=-1)
    for (i, adapter), part in zip(adapters.items(), parts, strict=True):
        products[i] += jnp.tensordot(part, adapter.b[...], 1)
    return products


def row_parallel(
    module: nnx.Module, name: str, equation: str, function: Callable[..., jax.Array], *inputs: jax.Array, overlap: bool
) -> jax.Array:
    """`multiply_then_scatter` with the matrix `name` of a module and its adapter, [batch, seq, embed].

    Args:
      equation: with the letter e for embed.
    """
    weight = getattr(module, name)[...]
    product = multiply_then_scatter(equation, function, *inputs, weight=weight, overlap=overlap)
    adapter = _adapter(module, name)
    if adapter is None:
        return product
    narrow = multiply_then_scatter(equation.replace("e", "r"), function, *inputs, weight=adapter.a[...])
    return product + narrow * adapter.scale @ adapter.b[...]


def _adapter(module: nnx.Module, name: str) -> Adapter | None:
    return getattr(module, ADAPTERS, {}).get(name)


def merged(params: Params, scale: float) -> Params:
    """Parameters with adapters → those of the model without, float32: each matrix plus its A B · scale.

    Args:
      params: of the decoder; layers are stacked, [num_layers, ...].
      scale: `Lora.scale`.
    """

    def fold(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return jnp.array(tree, jnp.float32)
        adapters = tree.get(ADAPTERS, {})
        return without_adapters({name: with_adapter(fold(below), adapters.get(name)) for name, below in tree.items()})

    def with_adapter(weight: Any, adapter: Any) -> Any:
        if adapter is None:
            return weight
        layers, rank = len(weight), adapter["a"].shape[-1]
        a, b = adapter["a"].reshape(layers, -1, rank), adapter["b"].reshape(layers, rank, -1)
        return weight + scale * jnp.matmul(a, b, precision="highest").reshape(weight.shape)

    return fold(params)


def only_adapters(tree: Any, inside: bool = False) -> Any:
    """A tree like the parameters, with None at everything that is no adapter."""
    if not isinstance(tree, dict):
        return tree if inside else None
    return {name: only_adapters(below, inside or name == ADAPTERS) for name, below in tree.items()}


def without_adapters(tree: Any) -> Any:
    """A tree like the parameters, without its adapters."""
    if not isinstance(tree, dict):
        return tree
    return {name: without_adapters(below) for name, below in tree.items() if name != ADAPTERS}
