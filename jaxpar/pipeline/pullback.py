"""A function's backward pass, taken apart: what to keep for it, and its two halves B and W.

`jax.vjp` returns a function that is a pytree. Its leaves are what the backward pass needs, and a trace tells where they
come from: leaves that depend on the activations are kept; those that follow from parameters and tokens alone (masks,
rotary angles, weights in another dtype) are computed again.

B and W are found in the traced backward pass: W is the products that nothing but a parameter's gradient waits for, B is
the rest (Qi et al., 2023, "Zero Bubble Pipeline Parallelism", arXiv:2401.10241). So any model's backward pass splits.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxpar.collectives import zeros

PRODUCTS = {"dot_general", "ragged_dot_general", "conv_general_dilated"}
INLINED = {"jit", "pjit", "closed_call", "checkpoint", "remat2"}
# Done again in W where they follow from what is kept, rather than handed over from B.
CHEAP = {"transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "pvary", "slice"}


class Pullback:
    """`function` (params, x, info) → y of x's shape, and its gradients with respect to params and x.

    Args:
      params, x, info: examples, to trace with.
      recompute: keep x alone; the backward pass runs the function again first.
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
        recompute: bool,
        split: bool,
    ):
        self._function, self._recompute = function, recompute
        self.kept: list[Any] = [jax.typeof(x)]
        if not recompute:
            self._find_residuals(params, x, info)
        self.pending: list[Any] = []
        if split:
            self._find_halves(params, x, info)

    def forward(self, params: Any, x: jax.Array, info: Any) -> tuple[jax.Array, list[jax.Array]]:
        """(y, what to keep for the backward pass)."""
        if self._recompute:
            return self._function(params, x, info), [x]
        y, leaves, _ = self._differentiate(params, x, info)
        return y, [leaves[i] for i in self._kept_leaves]

    def grads(self, kept: Sequence[jax.Array], params: Any, info: Any, y_grad: jax.Array) -> tuple[Any, jax.Array]:
        """(gradients of params, of x)."""
        if self._recompute:
            _, leaves, tree = self._differentiate(params, kept[0], info)
        else:
            inputs = jax.tree.leaves((params, info))
            pools = {"kept": kept, "input": inputs, "derived": self._derived(*inputs)}
            leaves, tree = [pools[pool][i] for pool, i in self._sources], self._tree
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
        def leaves(params: Any, info: Any, x: jax.Array) -> list[jax.Array]:
            _, leaves, self._tree = self._differentiate(params, x, info)
            return leaves

        traced = jax.make_jaxpr(leaves)(params, info, x)
        *inputs, x_var = traced.jaxpr.invars
        of_x = _depending(traced.jaxpr.eqns, {x_var})
        places = {var: ("input", i) for i, var in enumerate(inputs)}
        counts = {"kept": 0, "derived": 0}
        self._sources, self._kept_leaves, self.kept, derived = [], [], [], []
        for i, var in enumerate(traced.jaxpr.outvars):
            if isinstance(var, core.Literal) or var not in places:
                pool = "kept" if not isinstance(var, core.Literal) and var in of_x else "derived"
                place = (pool, counts[pool])
                counts[pool] += 1
                if pool == "kept":
                    self._kept_leaves.append(i)
                    self.kept.append(var.aval)
                else:
                    derived.append(var)
                if isinstance(var, core.Literal):
                    self._sources.append(place)
                    continue
                places[var] = place
            self._sources.append(places[var])
        self._derived = _part(traced, _needed(traced.jaxpr.eqns, derived), inputs, derived)

    def _find_halves(self, params: Any, x: jax.Array, info: Any) -> None:
        examples = [zeros(aval) for aval in self.kept], params, info, x

        def grads(*args: Any) -> Any:
            return _inline(jax.make_jaxpr(self.grads)(*args), jax.tree.leaves(args))

        traced = jax.make_jaxpr(grads)(*examples)
        *given, y_grad = traced.jaxpr.invars
        *param_grads, x_grad = traced.jaxpr.outvars
        eqns = _needed(traced.jaxpr.eqns, traced.jaxpr.outvars)
        needed_for_x = {id(eqn) for eqn in _needed(eqns, [x_grad])}
        products = [e for e in eqns if id(e) not in needed_for_x and e.primitive.name in PRODUCTS]
        late_vars = _depending(eqns, {var for eqn in products for var in eqn.outvars})
        late = {i for i, var in enumerate(param_grads) if var in late_vars}
        self._late, self._early = sorted(late), [i for i in range(len(param_grads)) if i not in late]
        again = _cheap(eqns, set(given))
        last = _needed([e for e in eqns if again(e) or late_vars & set(e.outvars)], [param_grads[i] for i in self._late])
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


def _needed(eqns: Sequence[Any], outvars: Iterable[Any]) -> list[Any]:
    """The equations that lead to `outvars`."""
    wanted, result = {var for var in outvars if isinstance(var, core.Var)}, []
    for eqn in reversed(eqns):
        if wanted & set(eqn.outvars):
            result.append(eqn)
            wanted.update(_inputs(eqn))
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
    part = core.Jaxpr(traced.jaxpr.constvars, invars, outvars, eqns)
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, traced.consts))


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
            found = _part(core.ClosedJaxpr(traced.jaxpr, ()), [eqn], invars, eqn.outvars)(*[values[v] for v in invars])
        values.update(zip(eqn.outvars, found, strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in traced.jaxpr.outvars]
