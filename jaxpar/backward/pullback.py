"""A function's backward pass, taken apart: what is kept for it, and its two halves B and W.

`jax.vjp` returns a function that is a pytree, and its leaves are what the backward pass needs. The traced forward pass
tells how they are made. Kept are the fewest bytes from which elementwise work leads to all of these leaves: the minimum
cut of that graph (as in PyTorch's AOTAutograd, min_cut_rematerialization_partition). So norms, activation functions,
rotations and masks are computed again; products and attention are not.

B and W are found in the traced backward pass. W is the products that only the gradient of a parameter waits for; B is
everything else (Qi et al., 2023, "Zero Bubble Pipeline Parallelism", arXiv:2401.10241). So the backward pass of any
model can be split.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend import core

from jaxpar.attention.names import CORE_ATTENTION, KERNEL_CALL
from jaxpar.backward.min_cut import min_cut
from jaxpar.backward.recompute import Granularity
from jaxpar.parallel.collective_matmul import BESIDE_WEIGHT_GRADS
from jaxpar.parallel.collectives import zeros

PRODUCTS = {"dot_general", "ragged_dot_general", "conv_general_dilated"}
INLINED = {"jit", "pjit", "closed_call", "checkpoint", "remat2"}
ELEMENTWISE = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy", "cos", "div",
    "eq", "erf", "exp", "exp2", "expand_dims", "expm1", "ge", "gt", "integer_pow", "is_finite", "iota", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "pow", "pvary", "reshape", "rev", "round",
    "rsqrt", "select_n", "sign", "sin", "slice", "split", "sqrt", "square", "squeeze", "sub", "tanh", "transpose", "xor",
}  # fmt: skip
# Gathered sequences are not kept but gathered again (Korthikanti et al., 2022, arXiv:2205.05198, section 4.2.2).
CHEAP = ELEMENTWISE | {"all_gather"}

Block = Callable[[Any, jax.Array, Any], jax.Array]  # (params, x, info) → y, of the shape of x


def _not_split(*_: Any) -> Any:
    raise AssertionError("take_apart(…, split=True) makes this half")


@dataclass(frozen=True)
class Pullback:
    """A block and its backward pass, as functions.

    Attributes:
      kept: avals of what `forward` returns beside y.
      forward: (params, x, info) → (y, kept): the block, and what its backward pass needs.
      grads: (kept, params, info, y_grad) → (gradients of params, of x).
      pending: avals of what `input_grad` hands over to `weight_grad`.
      input_grad: B, (kept, params, info, y_grad) → ({index of a leaf of params: its gradient}, gradient of x, pending).
        The gradients of params in it are those that need no product.
      weight_grad: W, (kept, params, info, pending) → the other gradients of params, by index of the leaf.
    """

    kept: list[Any]
    forward: Callable[[Any, jax.Array, Any], tuple[jax.Array, list[jax.Array]]]
    grads: Callable[[Sequence[jax.Array], Any, Any, jax.Array], tuple[Any, jax.Array]]
    pending: list[Any] = field(default_factory=list)
    input_grad: Callable[..., tuple[dict[int, jax.Array], jax.Array, list[jax.Array]]] = _not_split
    weight_grad: Callable[..., dict[int, jax.Array]] = _not_split


def take_apart(block: Block, params: Any, x: jax.Array, info: Any, *, recompute: Granularity, split: bool) -> Pullback:
    """Traces a block and takes its backward pass apart.

    Args:
      params, x, info: examples to trace with.
      recompute: what is computed again instead of kept, see `jaxpar.backward.recompute.Recompute`.
      split: make `input_grad` and `weight_grad`.
    """
    pullback = _keep_input(block, x) if recompute == "full" else _keep_min_cut(block, params, x, info, recompute)
    return _split_halves(pullback, params, x, info) if split else pullback


def _differentiate(block: Block, params: Any, x: jax.Array, info: Any) -> tuple[jax.Array, list[jax.Array], Any]:
    y, backward = jax.vjp(lambda params, x: block(params, x, info), params, x)
    return y, *jax.tree.flatten(backward)


def _keep_input(block: Block, x: jax.Array) -> Pullback:
    """Only x is kept, and the block runs again before its backward pass."""

    def forward(params: Any, x: jax.Array, info: Any) -> tuple[jax.Array, list[jax.Array]]:
        return block(params, x, info), [x]

    def grads(kept: Sequence[jax.Array], params: Any, info: Any, y_grad: jax.Array) -> tuple[Any, jax.Array]:
        _, leaves, tree = _differentiate(block, params, kept[0], info)
        return jax.tree.unflatten(tree, leaves)(y_grad)

    return Pullback([jax.typeof(x)], forward, grads)


def _keep_min_cut(block: Block, params: Any, x: jax.Array, info: Any, recompute: Granularity) -> Pullback:
    """The fewest bytes are kept from which cheap work leads to what the backward pass needs."""
    tree: Any = None

    def residuals(params: Any, info: Any, x: jax.Array) -> list[jax.Array]:
        nonlocal tree
        y, leaves, tree = _differentiate(block, params, x, info)
        return [y, *leaves]

    def computed_again(eqn: Any) -> bool:
        is_attention = CORE_ATTENTION in str(eqn.source_info.name_stack)
        return (recompute == "selective" and is_attention) or eqn.primitive.name in CHEAP

    traced = _inlined(residuals, params, info, x)
    eqns, (*inputs, x_var), (y_var, *leaf_vars) = traced.jaxpr.eqns, traced.jaxpr.invars, traced.jaxpr.outvars
    kept_vars = min_cut(eqns, x_var, leaf_vars, computed_again)
    run_forward = _part(traced, _needed(eqns, [y_var, *kept_vars]), [*inputs, x_var], [y_var, *kept_vars])
    make_leaves = _part(traced, _needed(eqns, leaf_vars, given=kept_vars), [*inputs, *kept_vars], leaf_vars)

    def forward(params: Any, x: jax.Array, info: Any) -> tuple[jax.Array, list[jax.Array]]:
        y, *kept = run_forward(*jax.tree.leaves((params, info)), x)
        return y, kept

    def grads(kept: Sequence[jax.Array], params: Any, info: Any, y_grad: jax.Array) -> tuple[Any, jax.Array]:
        leaves = make_leaves(*jax.tree.leaves((params, info)), *kept)
        return jax.tree.unflatten(tree, leaves)(y_grad)

    return Pullback([var.aval for var in kept_vars], forward, grads)


def _split_halves(pullback: Pullback, params: Any, x: jax.Array, info: Any) -> Pullback:
    """Adds `input_grad` and `weight_grad`."""
    traced = _inlined(pullback.grads, [zeros(aval) for aval in pullback.kept], params, info, x, split=True)
    *given, y_grad_var = traced.jaxpr.invars
    *param_grads, x_grad = traced.jaxpr.outvars
    eqns = _needed(traced.jaxpr.eqns, traced.jaxpr.outvars)
    needed_for_x = {id(eqn) for eqn in _needed(eqns, [x_grad])}
    products = [e for e in eqns if id(e) not in needed_for_x and e.primitive.name in PRODUCTS]
    late_vars = _depending(eqns, {var for eqn in products for var in eqn.outvars})
    late = [i for i, var in enumerate(param_grads) if var in late_vars]
    early = [i for i, var in enumerate(param_grads) if var not in late_vars]

    again = _cheap(eqns, set(given))
    in_weight_half = [eqn for eqn in eqns if again(eqn) or late_vars & set(eqn.outvars)]
    last = _needed(in_weight_half, [param_grads[i] for i in late])
    made = {*given, *(var for eqn in last for var in eqn.outvars)}
    pending = list(dict.fromkeys(var for eqn in last for var in _inputs(eqn) if var not in made))
    first_out = [*(param_grads[i] for i in early), x_grad, *pending]
    first_half = _part(traced, _needed(eqns, first_out), [*given, y_grad_var], first_out)
    second_half = _part(traced, last, [*given, *pending], [param_grads[i] for i in late])

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


def _inputs(eqn: Any) -> list[core.Var]:
    return [var for var in eqn.invars if isinstance(var, core.Var)]


def _needed(eqns: Sequence[Any], outvars: Iterable[Any], given: Iterable[Any] = ()) -> list[Any]:
    """The equations that lead from `given` to `outvars`."""
    known = set(given)
    wanted, result = {var for var in outvars if isinstance(var, core.Var)} - known, []
    for eqn in reversed(eqns):
        if wanted & set(eqn.outvars):
            result.append(eqn)
            wanted |= set(_inputs(eqn)) - known
    return result[::-1]


def _depending(eqns: Sequence[Any], sources: set[Any]) -> set[Any]:
    """`sources`, and the variables that depend on them."""
    found = set(sources)
    for eqn in eqns:
        if found & set(_inputs(eqn)):
            found.update(eqn.outvars)
    return found


def _cheap(eqns: Sequence[Any], given: set[Any]) -> Callable[[Any], bool]:
    """A predicate: the equation is cheap, and its inputs follow cheaply from `given`."""
    known, found = set(given), set()
    for eqn in eqns:
        if eqn.primitive.name in CHEAP and known.issuperset(_inputs(eqn)):
            known.update(eqn.outvars)
            found.add(id(eqn))
    return lambda eqn: id(eqn) in found


def _part(traced: core.ClosedJaxpr, eqns: list[Any], invars: list[Any], outvars: list[Any]) -> Callable:
    """A function that runs these equations: values of `invars` → values of `outvars`."""
    constants = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    used = {var: value for var, value in constants.items() if var not in invars}
    debug_info = traced.jaxpr.debug_info.with_unknown_names()
    part = core.Jaxpr(list(used), invars, outvars, eqns, debug_info=debug_info)
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, list(used.values())))


def _inlined(function: Callable, *args: Any, split: bool = False) -> core.ClosedJaxpr:
    """Traces a function, with the functions that it calls inlined.

    Args:
      split: leave out the barriers that tie gradients of weights to others.
    """
    traced = jax.make_jaxpr(function)(*args)
    return jax.make_jaxpr(lambda *args: _inline(traced, args, split=split))(*jax.tree.leaves(args))


def _inline(traced: core.ClosedJaxpr, args: Sequence[Any], *, split: bool) -> list[Any]:
    """Runs a traced function, and the functions that it calls as if their equations were its own."""
    values = dict(zip([*traced.jaxpr.constvars, *traced.jaxpr.invars], [*traced.consts, *args], strict=True))
    read = lambda eqn: [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars]  # noqa: E731
    for eqn in traced.jaxpr.eqns:
        invars = list(dict.fromkeys(_inputs(eqn)))
        if eqn.primitive.name in INLINED and eqn.params.get("name") != KERNEL_CALL:
            inner = eqn.params["jaxpr"]
            inner = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            found = _inline(inner, read(eqn), split=split)
        elif split and BESIDE_WEIGHT_GRADS in str(eqn.source_info.name_stack):
            found = read(eqn)  # a barrier
        else:
            found = _part(traced, [eqn], invars, eqn.outvars)(*[values[v] for v in invars])
        values.update(zip(eqn.outvars, found, strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in traced.jaxpr.outvars]
