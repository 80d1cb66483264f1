"""A loop whose transfers run beside its products: the next iteration's are begun, the last one's ended, meanwhile.

XLA moves a collective away from the products that need it, but only within one iteration, where a layer's first product
waits for its parameters and its last gradient for nothing to hide behind. So the loop is turned (software pipelining,
Lam, 1988, PLDI), as FSDP prefetches (Zhao et al., 2023, arXiv:2304.11277, section 3.3).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax


def overlapped_loop(
    carry: Any,
    count: int,
    fetch: Callable[[Any], Any],
    compute: Callable[[Any, Any, Any], tuple[Any, Any]],
    store: Callable[[Any, Any, Any], Any],
    *,
    ahead: bool = False,
    behind: bool = False,
    reverse: bool = False,
) -> Any:
    """For i in 0 … count - 1, or back: carry, result = compute(carry, i, fetch(i)); carry = store(carry, i, result).

    Every function runs `count` times, whatever the order.

    Args:
      fetch: i → what an iteration needs. Knows nothing of the carry.
      compute: (carry, i, fetched) → (carry, result). Must not read what `store` writes.
      store: (carry, i, result) → carry.
      ahead: fetch(i + 1) runs beside compute(i). The last iteration stands behind the loop then, once more in the program.
      behind: store(i - 1) runs beside compute(i). The first iteration stands before the loop then.

    Returns:
      The carry.
    """
    order = range(count)[::-1] if reverse else range(count)

    def iteration(state: tuple[Any, Any, Any], i: Any, *, is_last: bool) -> tuple[Any, Any, Any]:
        carry, fetched, result = state
        following = fetch(i + order.step) if ahead and not is_last else None
        if result is not None:
            carry = store(carry, i - order.step, result)
        carry, result = compute(carry, i, fetched if ahead else fetch(i))
        return (carry, following, result) if behind else (store(carry, i, result), following, None)

    state = carry, fetch(order[0]) if ahead else None, None
    first = order[:1] if behind else order[:0]
    last = order[max(count - 1, len(first)) :] if ahead else order[count:]
    for i in first:
        state = iteration(state, i, is_last=count == 1)
    if middle := order[len(first) : count - len(last)]:
        state, _ = lax.scan(lambda state, i: (iteration(state, i, is_last=False), None), state, jnp.asarray(middle))
    for i in last:
        state = iteration(state, i, is_last=True)
    carry, _, result = state
    return store(carry, order[-1], result) if behind else carry
