"""A function's backward pass, taken apart: what is kept for it, and its two halves B and W.

`jax.vjp` returns a function that is a pytree, and its leaves are what the backward pass needs. The traced forward pass
tells how they are made. Kept are the fewest bytes from which elementwise work leads to all of these leaves: the minimum
cut of that graph (as in PyTorch's AOTAutograd, min_cut_rematerialization_partition). So norms, activation functions,
rotations and masks are computed again; products and attention are not.

B and W are found in the traced backward pass. W is the products that only the gradient of a parameter waits for; B is
everything else (Qi et al., 2023, "Zero Bubble Pipeline Parallelism", arXiv:2401.10241). So the backward pass of any
model can be split.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend import core

from jaxpar.attention.names import CORE_ATTENTION
from jaxpar.backward.float32_grads import with_float32_grads
from jaxpar.backward.min_cut import min_cut
from jaxpar.backward.recompute import Again
from jaxpar.backward.traced import depending, inlined, inputs, needed, part
from jaxpar.config import ConfigError
from jaxpar.parallel.collectives import zeros

PRODUCTS = {"dot_general", "ragged_dot_general", "conv_general_dilated"}
ELEMENTWISE = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy", "cos", "div",
    "eq", "erf", "exp", "exp2", "expand_dims", "expm1", "ge", "gt", "integer_pow", "is_finite", "iota", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "pow", "pvary", "reshape", "rev", "round",
    "rsqrt", "select_n", "sign", "sin", "slice", "split", "sqrt", "square", "squeeze", "sub", "tanh", "transpose", "xor",
}  # fmt: skip
# Gathered sequences are not kept but gathered again (Korthikanti et al., 2022, arXiv:2205.05198, section 4.2.2).
CHEAP = ELEMENTWISE | {"all_gather"}

Block = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]  # (params, x, info) → y, of the shape of x, and more


def _not_split(*_: Any) -> Any:
    raise AssertionError("take_apart(…, split=True) makes this half")


@dataclass(frozen=True)
class Pullback:
    """A block and its backward pass, as functions.

    Attributes:
      kept: avals of what the backward pass needs.
      more: avals of what the block returns beside y. No gradient comes back through it.
      forward: (params, x, info) → (y, more, kept): the block, and what its backward pass needs.
      grads: (kept, params, info, y_grad) → (gradients of params, of x).
      pending: avals of what `input_grad` hands over to `weight_grad`.
      input_grad: B, (kept, params, info, y_grad) → ({index of a leaf of params: its gradient}, gradient of x, pending).
        The gradients of params in it are those that need no product.
      weight_grad: W, (kept, params, info, pending) → the other gradients of params, by index of the leaf.
    """

    kept: list[Any]
    more: Any
    forward: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any, list[jax.Array]]]
    grads: Callable[[Sequence[jax.Array], Any, Any, jax.Array], tuple[Any, jax.Array]]
    pending: list[Any] = field(default_factory=list)
    input_grad: Callable[..., tuple[dict[int, jax.Array], jax.Array, list[jax.Array]]] = _not_split
    weight_grad: Callable[..., dict[int, jax.Array]] = _not_split


def take_apart(
    block: Block,
    params: Any,
    x: jax.Array,
    info: Any,
    *,
    again: Again,
    split: bool = False,
    float32_grads: bool = False,
) -> Pullback:
    """Traces a block and takes its backward pass apart.

    Args:
      params, x, info: examples to trace with.
      again: what is computed again instead of kept, see `jaxpar.backward.recompute.Recompute`.
      split: make `input_grad` and `weight_grad`.
      float32_grads: a product or sum whose result is the gradient of a parameter gives it in float32, in which it is
        added up anyway. Otherwise it is rounded to the compute dtype first.
    """
    pullback = _keep_input(block, params, x, info) if again == "full" else _keep_min_cut(block, params, x, info, again)
    if not (split or float32_grads):
        return pullback
    traced = inlined(pullback.grads, [zeros(aval) for aval in pullback.kept], params, info, x, split=split)
    if float32_grads:
        traced = with_float32_grads(traced)
        pullback = replace(pullback, grads=_grads_as_traced(traced, params))
    return _split_halves(pullback, traced) if split else pullback


def _differentiate(block: Block, params: Any, x: jax.Array, info: Any) -> tuple[jax.Array, Any, list[jax.Array], Any]:
    y, backward, more = jax.vjp(lambda params, x: block(params, x, info), params, x, has_aux=True)
    return y, more, *jax.tree.flatten(backward)


def _keep_input(block: Block, params: Any, x: jax.Array, info: Any) -> Pullback:
    """Only x is kept, and the block runs again before its backward pass."""

    def forward(params: Any, x: jax.Array, info: Any) -> tuple[jax.Array, Any, list[jax.Array]]:
        return *block(params, x, info), [x]

    def grads(kept: Sequence[jax.Array], params: Any, info: Any, y_grad: jax.Array) -> tuple[Any, jax.Array]:
        _, _, leaves, tree = _differentiate(block, params, kept[0], info)
        return jax.tree.unflatten(tree, leaves)(y_grad)

    return Pullback([jax.typeof(x)], jax.eval_shape(block, params, x, info)[1], forward, grads)


def _keep_min_cut(block: Block, params: Any, x: jax.Array, info: Any, modules: Sequence[str]) -> Pullback:
    """The fewest bytes are kept from which cheap work and the work of `modules` lead to what the backward pass needs."""
    tree: Any = None
    more_tree: Any = None

    def residuals(params: Any, info: Any, x: jax.Array) -> list[jax.Array]:
        nonlocal tree, more_tree
        y, more, leaves, tree = _differentiate(block, params, x, info)
        more_leaves, more_tree = jax.tree.flatten(more)
        return [y, *more_leaves, *leaves]

    traced = inlined(residuals, params, info, x)
    in_modules = _in_modules(traced.jaxpr.eqns, modules)

    def computed_again(eqn: Any) -> bool:
        return id(eqn) in in_modules or eqn.primitive.name in CHEAP

    eqns, (*inputs, x_var), outvars = traced.jaxpr.eqns, traced.jaxpr.invars, traced.jaxpr.outvars
    first_leaf = 1 + more_tree.num_leaves
    more_vars, leaf_vars = outvars[1:first_leaf], outvars[first_leaf:]
    kept_vars = min_cut(eqns, x_var, leaf_vars, computed_again)
    forward_vars = [*outvars[:first_leaf], *kept_vars]
    run_forward = part(traced, needed(eqns, forward_vars), [*inputs, x_var], forward_vars)
    make_leaves = part(traced, needed(eqns, leaf_vars, given=kept_vars), [*inputs, *kept_vars], leaf_vars)

    def forward(params: Any, x: jax.Array, info: Any) -> tuple[jax.Array, Any, list[jax.Array]]:
        found = run_forward(*jax.tree.leaves((params, info)), x)
        return found[0], jax.tree.unflatten(more_tree, found[1:first_leaf]), found[first_leaf:]

    def grads(kept: Sequence[jax.Array], params: Any, info: Any, y_grad: jax.Array) -> tuple[Any, jax.Array]:
        leaves = make_leaves(*jax.tree.leaves((params, info)), *kept)
        return jax.tree.unflatten(tree, leaves)(y_grad)

    more = jax.tree.unflatten(more_tree, [var.aval for var in more_vars])
    return Pullback([var.aval for var in kept_vars], more, forward, grads)


def _in_modules(eqns: Sequence[Any], modules: Sequence[str]) -> set[int]:
    """The ids of the equations in the name scopes `modules`. Those of attention's core are in no other."""
    found = {id(eqn): set(re.findall(r"[\w.]+", str(eqn.source_info.name_stack))) for eqn in eqns}
    scopes = {of: names & {CORE_ATTENTION} or names for of, names in found.items()}
    for module in set(modules).difference(*scopes.values()):
        raise ConfigError(
            f"actor.model.recompute_modules: {module}, but no operation of your block is in this name scope: put the "
            f"operations into `with jax.named_scope({module!r}):`, or name one that the block has: "
            f"{', '.join(sorted(set[str]().union(*scopes.values()) - {'jvp'})) or 'none'}. A Linen module is the scope of its name"
        )
    return {of for of, names in scopes.items() if names & set(modules)}


def _grads_as_traced(traced: core.ClosedJaxpr, params: Any) -> Callable[..., tuple[Any, jax.Array]]:
    run, tree = core.jaxpr_as_fun(traced), jax.tree.structure(params)

    def grads(kept: Sequence[jax.Array], params: Any, info: Any, y_grad: jax.Array) -> tuple[Any, jax.Array]:
        *param_grads, x_grad = run(*jax.tree.leaves((kept, params, info)), y_grad)
        return jax.tree.unflatten(tree, param_grads), x_grad

    return grads


def _split_halves(pullback: Pullback, traced: core.ClosedJaxpr) -> Pullback:
    """Adds `input_grad` and `weight_grad`, from the traced `grads`."""
    *given, y_grad_var = traced.jaxpr.invars
    *param_grads, x_grad = traced.jaxpr.outvars
    eqns = needed(traced.jaxpr.eqns, traced.jaxpr.outvars)
    needed_for_x = {id(eqn) for eqn in needed(eqns, [x_grad])}
    products = [e for e in eqns if id(e) not in needed_for_x and e.primitive.name in PRODUCTS]
    late_vars = depending(eqns, {var for eqn in products for var in eqn.outvars})
    late = [i for i, var in enumerate(param_grads) if var in late_vars]
    early = [i for i, var in enumerate(param_grads) if var not in late_vars]

    again = _cheap(eqns, set(given))
    in_weight_half = [eqn for eqn in eqns if again(eqn) or late_vars & set(eqn.outvars)]
    last = needed(in_weight_half, [param_grads[i] for i in late])
    made = {*given, *(var for eqn in last for var in eqn.outvars)}
    pending = list(dict.fromkeys(var for eqn in last for var in inputs(eqn) if var not in made))
    first_out = [*(param_grads[i] for i in early), x_grad, *pending]
    first_half = part(traced, needed(eqns, first_out), [*given, y_grad_var], first_out)
    second_half = part(traced, last, [*given, *pending], [param_grads[i] for i in late])

    def input_grad(
        kept: Sequence[jax.Array], params: Any, info: Any, y_grad: jax.Array
    ) -> tuple[dict[int, jax.Array], jax.Array, list[jax.Array]]:
        found = first_half(*jax.tree.leaves((kept, params, info)), y_grad)
        n = len(early)
        return dict(zip(early, found[:n], strict=True)), found[n], found[n + 1 :]

    def weight_grad(
        kept: Sequence[jax.Array], params: Any, info: Any, pending: Sequence[jax.Array]
    ) -> dict[int, jax.Array]:
        return dict(zip(late, second_half(*jax.tree.leaves((kept, params, info)), *pending), strict=True))

    return replace(pullback, pending=[var.aval for var in pending], input_grad=input_grad, weight_grad=weight_grad)


def _cheap(eqns: Sequence[Any], given: set[Any]) -> Callable[[Any], bool]:
    """A predicate: the equation is cheap, and its inputs follow cheaply from `given`."""
    known, found = set(given), set()
    for eqn in eqns:
        if eqn.primitive.name in CHEAP and known.issuperset(inputs(eqn)):
            known.update(eqn.outvars)
            found.add(id(eqn))
    return lambda eqn: id(eqn) in found
