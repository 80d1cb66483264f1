"""The name scope that tells a reader of the compiled program how often the engine takes a conditional. Needs no jax.

The engine runs embedding, head and loss only in the ticks that need them, in a `lax.cond` inside this scope. The scope
becomes part of the conditional's op_name, from which `jaxpar.measure.hlo.count` can learn what to count.
"""

import re
from fractions import Fraction


def scope_name(taken: int, ticks: int) -> str:
    """Name of the scope around a conditional that is taken in `taken` of a loop's `ticks` ticks."""
    return f"in_{taken}_of_{ticks}_ticks"


def taken_fraction(op_name: str) -> Fraction | None:
    """How often the conditional with this op_name is taken; None if `scope_name` is not its innermost scope."""
    found = re.search(r"in_(\d+)_of_(\d+)_ticks/[^/]*$", op_name)
    return Fraction(int(found[1]), int(found[2])) if found else None
