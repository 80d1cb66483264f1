"""A group of layers as one function, which `jaxpar.backward` takes apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.parallel.collectives import vary, varying_axes
from jaxpar.parallel.trained import merge


@dataclass(frozen=True)
class LayerFunctions:
    """How a layer computes, and how its parameters and gradients travel.

    Attributes:
      block: (one layer's parameters, x, info, the layer's index or None) → (x, auxiliary outputs by name). An auxiliary
        output is a float32 scalar, a sum over this device's tokens.
      gather: (stacked layers as the engine holds them) → as `block` takes them, stacked. Linear.
      reduce: ({index of a leaf: gradient of stacked layers}) → the same, float32, as it is summed over microbatches.
        Linear. The leaves are the trained ones.
      like: parameters of a layer, with None at the frozen ones.
      float32_grads: products give gradients of parameters in float32, as `reduce` takes them.
      overlap_param_gather: gather a layer while the one before it computes.
      overlap_grad_reduce: reduce a layer's gradients while the next one computes.
      num_real: int [chunks], how many layers each chunk of this stage has; the others are padding and do nothing. None:
        no padding.
      layer_index: int [chunks, layers of a chunk], the index of each layer of this stage. None: blocks do not need it.
      auxiliary_weights: of the auxiliary outputs in the loss.
    """

    block: Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
    gather: Callable[[Any], Any]
    reduce: Callable[[dict[int, jax.Array]], dict[int, jax.Array]]
    like: Any
    float32_grads: bool = False
    overlap_param_gather: bool = False
    overlap_grad_reduce: bool = False
    num_real: jax.Array | None = None
    layer_index: jax.Array | None = None
    auxiliary_weights: Mapping[str, float] = field(default_factory=dict)


class LayerInfo(NamedTuple):
    """What a group of layers is told.

    Attributes:
      item: info of the `Item`.
      is_real: bool [layers of the group], which are not padding. None: all.
      layer: int [layers of the group], their indices. None: blocks do not need them.
      frozen: the frozen parameters of the layers, which have no gradient; None in the place of the others.
    """

    item: Any
    is_real: jax.Array | None
    layer: jax.Array | None
    frozen: Any


def layer_group(
    functions: LayerFunctions, size: int, *, unrolled: bool
) -> Callable[[Any, jax.Array, LayerInfo], tuple]:
    """`size` layers as one function of their trained parameters, x and info → (x, auxiliary outputs)."""

    def layer(params: Any, x: jax.Array, item: Any, is_real: Any, index: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, auxiliary = functions.block(params, x, item, index)
        if is_real is not None:
            y, auxiliary = jnp.where(is_real, y, x), {name: jnp.where(is_real, a, 0) for name, a in auxiliary.items()}
        for name, weight in functions.auxiliary_weights.items():
            if weight:
                y = with_gradient_of(y, auxiliary[name] * weight)
        return y, auxiliary

    def group(params: Any, x: jax.Array, info: LayerInfo) -> tuple[jax.Array, dict[str, jax.Array]]:
        params, of_layers = merge(params, info.frozen), (info.is_real, info.layer)
        if size == 1:
            return layer(params, x, info.item, *jax.tree.map(lambda a: a[0], of_layers))
        if unrolled:  # W is looked for among products outside of loops
            found = []
            for i in range(size):
                one, own = jax.tree.map(lambda p, i=i: p[i], (params, of_layers))
                x, auxiliary = layer(one, x, info.item, *own)
                found.append(auxiliary)
            return x, jax.tree.map(lambda *a: sum(a), *found)
        x, stacked = lax.scan(lambda x, each: layer(each[0], x, info.item, *each[1]), x, (params, of_layers))
        return x, jax.tree.map(lambda a: a.sum(0), stacked)

    return group


@jax.custom_vjp
def with_gradient_of(y: jax.Array, loss: jax.Array) -> jax.Array:
    """y. Backward, the gradient of the scalar `loss` comes along, as if it had been added to the loss."""
    return y


def _forward_with_gradient_of(y: jax.Array, loss: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, loss


def _backward_with_gradient_of(loss: jax.Array, y_grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y_grad, vary(jnp.ones_like(loss), varying_axes(loss))


with_gradient_of.defvjp(_forward_with_gradient_of, _backward_with_gradient_of)
