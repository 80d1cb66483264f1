"""The cheapest values from which others can be computed again: a minimum cut of a traced program."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

UNLIMITED = 2**30  # scipy's flows are int32

Edge = tuple[int, int]


def min_cut(eqns: Sequence[Any], source: Any, wanted: Iterable[Any], recomputable: Callable[[Any], bool]) -> list[Any]:
    """The variables of the fewest bytes from which `recomputable` equations lead to all of `wanted`.

    Variables that do not depend on `source` cost nothing and are never kept. In the flow network, each variable is an edge
    with its size as capacity, and each equation an edge without limit. By the max-flow min-cut theorem, the edges that
    the maximum flow fills are the cut (Ford and Fulkerson, 1956). Of several cuts of the same size, this is the one nearest
    to `wanted`, from which the least is computed again.
    """
    depends = _depending_on(eqns, source)
    ends = [var for var in wanted if isinstance(var, core.Var) and var in depends]
    numbers, edges = _network(eqns, source, ends, depends, recomputable)
    if not numbers:
        return []
    limits, first, last = _capacities(numbers, edges, ends)
    rows, columns = np.array(list(limits)).T
    graph = csr_array((np.array(list(limits.values()), np.int32), (rows, columns)), shape=(last + 1, last + 1))
    left = graph - maximum_flow(graph, first, last).flow
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    leads_on = set(breadth_first_order(left.T.tocsr(), last, return_predecessors=False).tolist())
    return [var for var, n in numbers.items() if 2 * n not in leads_on and 2 * n + 1 in leads_on]


def _depending_on(eqns: Sequence[Any], source: Any) -> set[Any]:
    found = {source}
    for eqn in eqns:
        if found & {var for var in eqn.invars if isinstance(var, core.Var)}:
            found.update(eqn.outvars)
    return found


def _network(
    eqns: Sequence[Any], source: Any, ends: Sequence[Any], depends: set[Any], recomputable: Callable[[Any], bool]
) -> tuple[dict[Any, int], list[Edge]]:
    """Numbers of the variables that may be kept, in the order found, and (from, to) of each dependence between them. From
    -1: the variable cannot be computed again."""
    makers = {var: eqn for eqn in eqns for var in eqn.outvars}
    edges: list[Edge] = []
    to_visit = list(dict.fromkeys(ends))
    numbers = {var: number for number, var in enumerate(to_visit)}
    while to_visit:
        var = to_visit.pop()
        if var is source or not recomputable(makers[var]):
            edges.append((-1, numbers[var]))
            continue
        for below in dict.fromkeys(v for v in makers[var].invars if isinstance(v, core.Var) and v in depends):
            if below not in numbers:
                numbers[below] = len(numbers)
                to_visit.append(below)
            edges.append((numbers[below], numbers[var]))
    return numbers, edges


def _capacities(
    numbers: Mapping[Any, int], edges: Sequence[Edge], ends: Sequence[Any]
) -> tuple[dict[Edge, int], int, int]:
    """The capacity of each edge between nodes, and the network's first and last node. Variable n is the edge from node 2n
    to node 2n + 1."""
    sizes = [math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in numbers]
    unit = max(1, sum(sizes) / (UNLIMITED / 2))
    first, last = 2 * len(numbers), 2 * len(numbers) + 1
    limits = {(2 * n, 2 * n + 1): math.ceil(size / unit) for n, size in enumerate(sizes)}
    limits |= {(first if a < 0 else 2 * a + 1, 2 * b): UNLIMITED for a, b in edges}
    limits |= {(2 * numbers[var] + 1, last): UNLIMITED for var in ends}
    return limits, first, last
