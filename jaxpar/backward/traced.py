"""Parts of a traced program: equations chosen, run, and inlined."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxpar.attention.names import KERNEL_CALL
from jaxpar.parallel.collective_matmul import BESIDE_WEIGHT_GRADS

INLINED = {"jit", "pjit", "closed_call", "checkpoint", "remat2"}


def inputs(eqn: Any) -> list[core.Var]:
    return [var for var in eqn.invars if isinstance(var, core.Var)]


def needed(eqns: Sequence[Any], outvars: Iterable[Any], given: Iterable[Any] = ()) -> list[Any]:
    """The equations that lead from `given` to `outvars`."""
    known = set(given)
    wanted, result = {var for var in outvars if isinstance(var, core.Var)} - known, []
    for eqn in reversed(eqns):
        if wanted & set(eqn.outvars):
            result.append(eqn)
            wanted |= set(inputs(eqn)) - known
    return result[::-1]


def depending(eqns: Sequence[Any], sources: set[Any]) -> set[Any]:
    """`sources`, and the variables that depend on them."""
    found = set(sources)
    for eqn in eqns:
        if found & set(inputs(eqn)):
            found.update(eqn.outvars)
    return found


def part(traced: core.ClosedJaxpr, eqns: list[Any], invars: list[Any], outvars: list[Any]) -> Callable:
    """A function that runs these equations: values of `invars` → values of `outvars`."""
    constants = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    used = {var: value for var, value in constants.items() if var not in invars}
    debug_info = traced.jaxpr.debug_info.with_unknown_names()
    part = core.Jaxpr(list(used), invars, outvars, eqns, debug_info=debug_info)
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, list(used.values())))


def inlined(function: Callable, *args: Any, split: bool = False) -> core.ClosedJaxpr:
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
        invars = list(dict.fromkeys(inputs(eqn)))
        if eqn.primitive.name in INLINED and eqn.params.get("name") != KERNEL_CALL:
            inner = eqn.params["jaxpr"]
            inner = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            found = _inline(inner, read(eqn), split=split)
        elif split and BESIDE_WEIGHT_GRADS in str(eqn.source_info.name_stack):
            found = read(eqn)  # a barrier
        else:
            found = part(traced, [eqn], invars, eqn.outvars)(*[values[v] for v in invars])
        values.update(zip(eqn.outvars, found, strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in traced.jaxpr.outvars]
