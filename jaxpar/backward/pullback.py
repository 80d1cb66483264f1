"""A function's backward pass, taken apart: what to keep for it, and its two halves B and W.

`jax.vjp` returns a function that is a pytree; its leaves are what the backward pass needs. The traced forward pass tells
how they are made, and what is kept is the fewest bytes from which elementwise work alone leads to all of them: the
smallest cut of that graph (as in PyTorch's AOTAutograd, min_cut_rematerialization_partition). So norms, activation
functions, rotations and masks are computed again, products and attention are not.

B and W are found in the traced backward pass: W is the products that nothing but a parameter's gradient waits for, B is
the rest (Qi et al., 2023, "Zero Bubble Pipeline Parallelism", arXiv:2401.10241). So any model's backward pass splits.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
from jax.extend import core

from jaxpar.attention.dispatch import CORE_ATTENTION
from jaxpar.backward.min_cut import smallest_cut
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


class Pullback:
    """`function` (params, x, info) → y of x's shape, and its gradients with respect to params and x.

    Args:
      params, x, info: examples, to trace with.
      recompute: what is not kept but computed again. "cheap": what elementwise work leads to. "core": also what
        `jaxpar.attention` computes. "all": everything; x alone is kept, and the function runs again first.
      split: prepare `input_grad` and `weight_grad`.

    Attributes:
      kept: avals of what `forward` returns beside y.
      pending: avals of what `input_grad` hands over to `weight_grad`.
    """

    def __init__(
        self,
        function: Callable[[Any, jax.Array, Any], jax.Array],
        params: Any,
        x: jax.Array,
        info: Any,
        *,
        recompute: Literal["cheap", "core", "all"],
        split: bool,
    ):
        self._function, self._recompute = function, recompute
        self.kept: list[Any] = [jax.typeof(x)]
        if recompute != "all":
            self._find_residuals(params, x, info)
        self.pending: list[Any] = []
        if split:
            self._find_halves(params, x, info)

    def forward(self, params: Any, x: jax.Array, info: Any) -> tuple[jax.Array, list[jax.Array]]:
        """(y, what to keep for the backward pass)."""
        if self._recompute == "all":
            return self._function(params, x, info), [x]
        y, *kept = self._forward(*jax.tree.leaves((params, info)), x)
        return y, kept

    def grads(self, kept: Sequence[jax.Array], params: Any, info: Any, y_grad: jax.Array) -> tuple[Any, jax.Array]:
        """(gradients of params, of x)."""
        if self._recompute == "all":
            leaves, tree = self._differentiate(params, kept[0], info)[1:]
        else:
            leaves, tree = self._residuals(*jax.tree.leaves((params, info)), *kept), self._tree
        return jax.tree.unflatten(tree, leaves)(y_grad)

    def input_grad(
        self, kept: Sequence[jax.Array], params: Any, info: Any, y_grad: jax.Array
    ) -> tuple[dict[int, jax.Array], jax.Array, list[jax.Array]]:
        """B: (gradients of params that need no product, by index of the leaf; gradient of x; pending)."""
        grads, x_grad, pending = self._input_grad(kept, params, info, y_grad)
        return dict(zip(self._early, grads, strict=True)), x_grad, pending

    def weight_grad(
        self, kept: Sequence[jax.Array], params: Any, info: Any, pending: Sequence[jax.Array]
    ) -> dict[int, jax.Array]:
        """W: the other gradients of params, by index of the leaf."""
        return dict(zip(self._late, self._weight_grad(kept, params, info, pending), strict=True))

    def _differentiate(self, params: Any, x: jax.Array, info: Any) -> tuple[jax.Array, list[jax.Array], Any]:
        y, backward = jax.vjp(lambda params, x: self._function(params, x, info), params, x)
        return y, *jax.tree.flatten(backward)

    def _find_residuals(self, params: Any, x: jax.Array, info: Any) -> None:
        def residuals(params: Any, info: Any, x: jax.Array) -> list[jax.Array]:
            y, leaves, self._tree = self._differentiate(params, x, info)
            return [y, *leaves]

        traced = _inlined(residuals, params, info, x)
        eqns, (*inputs, x_var), (y, *leaves) = traced.jaxpr.eqns, traced.jaxpr.invars, traced.jaxpr.outvars
        kept = smallest_cut(eqns, x_var, leaves, self._is_computed_again)
        self.kept = [var.aval for var in kept]
        self._forward = _part(traced, _needed(eqns, [y, *kept]), [*inputs, x_var], [y, *kept])
        self._residuals = _part(traced, _needed(eqns, leaves, given=kept), [*inputs, *kept], leaves)

    def _is_computed_again(self, eqn: Any) -> bool:
        in_core = self._recompute == "core" and CORE_ATTENTION in str(eqn.source_info.name_stack)
        return in_core or eqn.primitive.name in CHEAP

    def _find_halves(self, params: Any, x: jax.Array, info: Any) -> None:
        examples = [zeros(aval) for aval in self.kept], params, info, x

        traced = _inlined(self.grads, *examples)
        *given, y_grad = traced.jaxpr.invars
        *param_grads, x_grad = traced.jaxpr.outvars
        eqns = _needed(traced.jaxpr.eqns, traced.jaxpr.outvars)
        needed_for_x = {id(eqn) for eqn in _needed(eqns, [x_grad])}
        products = [e for e in eqns if id(e) not in needed_for_x and e.primitive.name in PRODUCTS]
        late_vars = _depending(eqns, {var for eqn in products for var in eqn.outvars})
        late = {i for i, var in enumerate(param_grads) if var in late_vars}
        self._late, self._early = sorted(late), [i for i in range(len(param_grads)) if i not in late]
        again = _cheap(eqns, set(given))
        last = _needed(
            [e for e in eqns if again(e) or late_vars & set(e.outvars)], [param_grads[i] for i in self._late]
        )
        made = {*given, *(var for eqn in last for var in eqn.outvars)}
        pending = list(dict.fromkeys(v for eqn in last for v in _inputs(eqn) if v not in made))
        self.pending = [var.aval for var in pending]
        early = [param_grads[i] for i in self._early]
        first = _needed(eqns, [*early, x_grad, *pending])
        first_half = _part(traced, first, [*given, y_grad], [*early, x_grad, *pending])
        second_half = _part(traced, last, [*given, *pending], [param_grads[i] for i in self._late])

        def run_first(kept: Any, params: Any, info: Any, y_grad: jax.Array) -> tuple:
            found = first_half(*jax.tree.leaves((kept, params, info)), y_grad)
            return found[: len(early)], found[len(early)], found[len(early) + 1 :]

        def run_second(kept: Any, params: Any, info: Any, pending: Any) -> list[jax.Array]:
            return second_half(*jax.tree.leaves((kept, params, info)), *pending)

        self._input_grad, self._weight_grad = run_first, run_second


def _inputs(eqn: Any) -> list[core.Var]:
    return [var for var in eqn.invars if isinstance(var, core.Var)]


def _needed(eqns: Sequence[Any], outvars: Iterable[Any], given: Iterable[Any] = ()) -> list[Any]:
    """The equations that lead to `outvars` from what is given."""
    known = set(given)
    wanted, result = {var for var in outvars if isinstance(var, core.Var)} - known, []
    for eqn in reversed(eqns):
        if wanted & set(eqn.outvars):
            result.append(eqn)
            wanted |= set(_inputs(eqn)) - known
    return result[::-1]


def _depending(eqns: Sequence[Any], sources: set[Any]) -> set[Any]:
    """The variables that depend on `sources`, these included."""
    found = set(sources)
    for eqn in eqns:
        if found & set(_inputs(eqn)):
            found.update(eqn.outvars)
    return found


def _cheap(eqns: Sequence[Any], given: set[Any]) -> Callable[[Any], bool]:
    """Tells equations that are cheap and follow from what is given."""
    known, found = set(given), set()
    for eqn in eqns:
        if eqn.primitive.name in CHEAP and known.issuperset(_inputs(eqn)):
            known.update(eqn.outvars)
            found.add(id(eqn))
    return lambda eqn: id(eqn) in found


def _part(traced: core.ClosedJaxpr, eqns: list[Any], invars: list[Any], outvars: list[Any]) -> Callable:
    """A function (values of invars) → values of outvars that runs these equations."""
    constants = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    used = {var: value for var, value in constants.items() if var not in invars}
    debug_info = traced.jaxpr.debug_info.with_unknown_names()
    part = core.Jaxpr(list(used), invars, outvars, eqns, debug_info=debug_info)
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, list(used.values())))


def _inlined(function: Callable, *args: Any) -> core.ClosedJaxpr:
    """The function traced, with the functions that it calls in place."""
    traced = jax.make_jaxpr(function)(*args)
    return jax.make_jaxpr(lambda *args: _inline(traced, args))(*jax.tree.leaves(args))


def _inline(traced: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Run a traced function, and those it calls as if their equations were its own."""
    values = dict(zip([*traced.jaxpr.constvars, *traced.jaxpr.invars], [*traced.consts, *args], strict=True))
    for eqn in traced.jaxpr.eqns:
        invars = list(dict.fromkeys(_inputs(eqn)))
        if eqn.primitive.name in INLINED:
            inner = eqn.params["jaxpr"]
            inner = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            found = _inline(inner, [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars])
        else:
            found = _part(traced, [eqn], invars, eqn.outvars)(*[values[v] for v in invars])
        values.update(zip(eqn.outvars, found, strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in traced.jaxpr.outvars]
