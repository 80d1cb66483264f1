"""The cheapest values to keep, from which others can be computed again: a smallest cut of a traced program."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend import core
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

UNLIMITED = 2**30  # scipy's flows are int32


def smallest_cut(
    eqns: Sequence[Any], source: Any, wanted: Iterable[Any], recomputable: Callable[[Any], bool]
) -> list[Any]:
    """Variables of the fewest bytes from which `recomputable` equations lead to all of `wanted`.

    Variables that do not depend on `source` cost nothing and are never kept. Each variable is an edge of its size between
    two nodes, what makes it is an edge without limit; the edges of a minimal cut are those that maximal flow fills (Ford
    and Fulkerson, 1956).
    """
    makers = {var: eqn for eqn in eqns for var in eqn.outvars}
    of_source = {source}
    for eqn in eqns:
        if of_source & {var for var in eqn.invars if isinstance(var, core.Var)}:
            of_source.update(eqn.outvars)
    numbers: dict[Any, int] = {}  # of variables that may be kept, in the order found
    edges: list[tuple[int, int]] = []  # (maker's variable or -1 for what must be kept, variable)
    ends = [var for var in wanted if isinstance(var, core.Var) and var in of_source]
    open_ends = list(dict.fromkeys(ends))
    numbers.update({var: number for number, var in enumerate(open_ends)})
    while open_ends:
        var = open_ends.pop()
        if var is source or not recomputable(makers[var]):
            edges.append((-1, numbers[var]))
            continue
        for below in dict.fromkeys(v for v in makers[var].invars if isinstance(v, core.Var) and v in of_source):
            if below not in numbers:
                numbers[below] = len(numbers)
                open_ends.append(below)
            edges.append((numbers[below], numbers[var]))
    if not numbers:
        return []
    sizes = [math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in numbers]
    unit = max(1, sum(sizes) / (UNLIMITED / 2))
    first, last = 2 * len(numbers), 2 * len(numbers) + 1  # of variable n: node 2n to node 2n + 1
    limits = {(2 * n, 2 * n + 1): math.ceil(size / unit) for n, size in enumerate(sizes)}
    limits |= {(first if a < 0 else 2 * a + 1, 2 * b): UNLIMITED for a, b in edges}
    limits |= {(2 * numbers[var] + 1, last): UNLIMITED for var in ends}
    rows, columns = np.array(list(limits)).T
    graph = csr_array((np.array(list(limits.values()), np.int32), (rows, columns)), shape=(last + 1, last + 1))
    left = graph - maximum_flow(graph, first, last).flow
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    reached = set(breadth_first_order(left, first, return_predecessors=False).tolist())
    return [var for var, n in numbers.items() if 2 * n in reached and 2 * n + 1 not in reached]
