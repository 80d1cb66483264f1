"""A loop whose transfers run beside its computation.

XLA moves a collective away from the products that need it, but only within one iteration. There, a layer's first product
must wait for its parameters, and its last gradient has nothing left to hide behind. So the loop is turned: an iteration
begins the fetch of the next one and ends the store of the one before (software pipelining, Lam, 1988, PLDI), which is how
FSDP prefetches (Zhao et al., 2023, arXiv:2304.11277, section 3.3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Overlap:
    """What runs beside the computation of an iteration.

    Attributes:
      prefetch: the fetch of the next iteration. The last iteration is then outside of the loop, after it.
      defer: the store of the iteration before. The first iteration is then outside of the loop, before it.
      in_pairs: two iterations in a loop's body, each with a place for what it fetches. Otherwise what arrives while the
        previous is still in use is copied at the end of an iteration, but only one is in memory.
    """

    prefetch: bool = False
    defer: bool = False
    in_pairs: bool = False


def overlapped_loop(
    carry: Any,
    count: int,
    fetch: Callable[[Any], Any],
    compute: Callable[[Any, Any, Any], tuple[Any, Any]],
    store: Callable[[Any, Any, Any], Any],
    overlap: Overlap = Overlap(),
    *,
    reverse: bool = False,
) -> Any:
    """For i in 0 … count - 1: `carry, result = compute(carry, i, fetch(i))`, then `carry = store(carry, i, result)`.

    Each function is called `count` times, whatever the overlap.

    Args:
      fetch: i → what iteration i needs. It cannot see the carry.
      compute: (carry, i, fetched) → (carry, result). It must not read what `store` writes.
      store: (carry, i, result) → carry.
      reverse: i counts down.

    Returns:
      The carry.
    """
    order = range(count)[::-1] if reverse else range(count)

    def iteration(state: tuple[Any, Any, Any], i: Any, *, is_last: bool) -> tuple[Any, Any, Any]:
        carry, fetched, result = state
        following = fetch(i + order.step) if overlap.prefetch and not is_last else None
        if result is not None:
            carry = store(carry, i - order.step, result)
        carry, result = compute(carry, i, fetched if overlap.prefetch else fetch(i))
        return (carry, following, result) if overlap.defer else (store(carry, i, result), following, None)

    state = carry, fetch(order[0]) if overlap.prefetch else None, None
    first = order[:1] if overlap.defer else order[:0]
    last = order[max(count - 1, len(first)) :] if overlap.prefetch else order[count:]
    for i in first:
        state = iteration(state, i, is_last=count == 1)
    if middle := order[len(first) : count - len(last)]:
        unroll = 2 if overlap.in_pairs else 1
        step = lambda state, i: (iteration(state, i, is_last=False), None)  # noqa: E731
        state, _ = lax.scan(step, state, jnp.asarray(middle), unroll=unroll)
    for i in last:
        state = iteration(state, i, is_last=True)
    carry, _, result = state
    return store(carry, order[-1], result) if overlap.defer else carry
