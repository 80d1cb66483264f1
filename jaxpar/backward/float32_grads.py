"""Gradients of parameters in float32 from the products and sums that make them.

A product of bfloat16 numbers is added up in float32. `jax.vjp` rounds its result to bfloat16, and the gradient is then
converted back, in a pass of its own, to be added to those of other microbatches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxpar.backward.traced import inlined, needed

MOVES = {"expand_dims", "reshape", "squeeze", "transpose"}


def with_float32_grads(traced: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The traced `Pullback.grads`, with products and sums that give gradients of parameters in float32. What only moves or
    adds up their results follows."""
    makers = {var: eqn for eqn in traced.jaxpr.eqns for var in eqn.outvars}
    found: dict[Any, Any] = {}
    eqns: list[Any] = []

    def wide(var: Any) -> Any:
        """The same value in float32; None if no product made it."""
        if isinstance(var, core.Literal) or var not in makers or var.aval.dtype == jnp.float32:
            return None
        if var in found:
            return found[var]
        eqn = makers[var]
        if (swapped := _product_in_order(eqn, makers)) is not None:
            eqn = swapped
        invars, params = eqn.invars, eqn.params
        if eqn.primitive.name == "dot_general":
            params = {**params, "preferred_element_type": jnp.dtype(jnp.float32)}
        elif eqn.primitive.name in MOVES | {"add_any"}:
            invars = [wide(invar) for invar in invars]
        elif eqn.primitive.name == "reduce_sum":
            invars = [as_float32(eqn.invars[0], eqn)]
        else:
            return None
        if None in invars:
            return None
        found[var] = core.Var(var.aval.update(dtype=jnp.dtype(jnp.float32)))
        eqns.append(eqn.replace(invars=invars, params=params, outvars=[found[var]]))
        return found[var]

    def as_float32(var: Any, eqn: Any) -> Any:
        params = {"new_dtype": jnp.dtype(jnp.float32), "weak_type": False, "sharding": None}
        result = core.Var(var.aval.update(dtype=jnp.dtype(jnp.float32)))
        eqns.append(eqn.replace(primitive=lax.convert_element_type_p, invars=[var], params=params, outvars=[result]))
        return result

    *param_grads, x_grad = traced.jaxpr.outvars
    outvars = [*(wide(var) or var for var in param_grads), x_grad]
    jaxpr = traced.jaxpr.replace(eqns=needed([*traced.jaxpr.eqns, *eqns], outvars), outvars=outvars)
    return core.ClosedJaxpr(jaxpr, traced.consts)


def _product_in_order(eqn: Any, makers: dict[Any, Any]) -> Any:
    """If `eqn` transposes a product a·b so that the dimensions of b come first: the product b·a, which needs no
    transpose. Otherwise None."""
    product = makers.get(eqn.invars[0]) if eqn.primitive.name == "transpose" else None
    if product is None or product.primitive.name != "dot_general":
        return None
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = product.params["dimension_numbers"]
    lhs, rhs = product.invars
    from_lhs, from_rhs = lhs.aval.ndim - len(lhs_sum), rhs.aval.ndim - len(rhs_sum)
    if lhs_batch or eqn.params["permutation"] != (*range(from_lhs, from_lhs + from_rhs), *range(from_lhs)):
        return None
    numbers = (rhs_sum, lhs_sum), (rhs_batch, lhs_batch)
    return product.replace(
        invars=[rhs, lhs], outvars=eqn.outvars, params={**product.params, "dimension_numbers": numbers}
    )


def in_float32(backward: Callable[[jax.Array], Any], y_grad: jax.Array) -> Any:
    """`backward(y_grad)`, the gradients of parameters and then of the input, with those of parameters in float32 where a
    product or sum makes them (see `take_apart`)."""
    tree = jax.tree.structure(jax.eval_shape(backward, y_grad))
    traced = with_float32_grads(inlined(backward, y_grad))
    return jax.tree.unflatten(tree, core.jaxpr_as_fun(traced)(y_grad))
