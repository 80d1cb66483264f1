"""The loop with overlapped transfers computes the same as the plain loop, for every choice of its options."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.backward.overlap import Overlap, overlapped_loop


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("prefetch", "defer", "reverse"), list(itertools.product([False, True], repeat=3)))
def test_every_way_to_turn_the_loop_gives_the_same(count, prefetch, defer, reverse):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(count, 3)))
    calls = []

    def compute(carry, i, row):
        x, kept = carry
        x = jnp.sin(x) + row  # the order matters
        return (x, kept), x * 2

    def store(carry, i, found):
        x, kept = carry
        return x, kept.at[i].add(found)

    def fetch(i):
        jax.debug.callback(lambda i: calls.append(int(i)), i)
        return table[i]

    overlap = Overlap(prefetch, defer)
    run = jax.jit(lambda carry: overlapped_loop(carry, count, fetch, compute, store, overlap, reverse=reverse))
    x, kept = jax.block_until_ready(run((jnp.ones(3), jnp.zeros((count, 3)))))
    jax.effects_barrier()

    wanted, wanted_kept = np.ones(3), np.zeros((count, 3))
    for i in range(count)[:: -1 if reverse else 1]:
        wanted = np.sin(wanted) + table[i]
        wanted_kept[i] = wanted * 2
    np.testing.assert_allclose(x, wanted, rtol=1e-6)
    np.testing.assert_allclose(kept, wanted_kept, rtol=1e-6)
    assert sorted(calls) == list(range(count))  # nothing is fetched twice


def test_transfers_stand_beside_the_products_in_the_loop():
    """The loop body computes with carried values only. Nothing in it depends on what it fetches or stores later."""
    loop = jax.make_jaxpr(
        lambda x, table: overlapped_loop(
            (x, jnp.zeros(6)),
            6,
            lambda i: jnp.cos(table[i]),
            lambda carry, i, row: ((carry[0] * row, carry[1]), jnp.tan(carry[0])),
            lambda carry, i, found: (carry[0], carry[1].at[i].set(jnp.exp(found))),
            Overlap(prefetch=True, defer=True),
        )
    )(1.0, jnp.ones(6))
    (scan,) = [eqn for eqn in loop.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert scan.params["length"] == 4
    body = scan.params["jaxpr"].jaxpr
    made = {name: eqn for eqn in body.eqns if (name := eqn.primitive.name) in ("cos", "mul", "tan", "exp")}
    assert made["mul"].invars[1] in body.invars  # fetched one iteration earlier
    assert made["exp"].invars[0] in body.invars  # computed one iteration earlier
    assert made["cos"].outvars[0] in body.outvars
