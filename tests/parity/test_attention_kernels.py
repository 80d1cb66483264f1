"""Pallas flash kernels, interpreted, alone and in a ring, against plain JAX. tests/system compiles them for H100."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, TOLERANCE, make_mesh, relative_error

from jaxpar.attention import (
    AttentionSettings,
    attention,
    attention_settings,
    blockwise,
    flash,
    reference_attention,
    zigzag_order,
)
from jaxpar.attention.blocks import output_grads_of
from jaxpar.attention.types import AttentionSpec, Keys, Queries
from jaxpar.config import ConfigError

BATCH, TOKENS, KV_HEADS, GROUP, HEAD_DIM = 2, 64, 2, 2, 16


@pytest.fixture(autouse=True)
def _interpreted_in_small_tiles(monkeypatch):
    monkeypatch.setattr(flash, "INTERPRET", True)
    monkeypatch.setattr(flash, "FORWARD_TILES", (32, 16))
    monkeypatch.setattr(flash, "BACKWARD_TILES", (16, 32))


def random(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


CASES = {
    "whole": (True, None, [None], False),
    "whole, packed": (True, None, [None], True),
    "causal": (True, None, [0], False),
    "causal, offset by rank, packed": (True, None, [16, -24, TOKENS], True),
    "window, offset by rank": (True, 9, [0, 8, 64, 200], False),
    "window without order, offset by rank": (False, 9, [0, -TOKENS, 64], False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_block(case):
    causal, window, offsets, packed = CASES[case]
    spec, rng = AttentionSpec(causal, window, HEAD_DIM**-0.5, "pallas"), np.random.default_rng(3)
    heads = (KV_HEADS, GROUP, HEAD_DIM)
    query, grad = random(rng, BATCH, TOKENS, *heads), random(rng, BATCH, TOKENS, *heads)
    key, value = (random(rng, BATCH, TOKENS, KV_HEADS, HEAD_DIM) for _ in range(2))
    # The log-sum-exp includes other keys as well, so the weights of the block do not add up to 1.
    more = jnp.abs(random(rng, BATCH, TOKENS, KV_HEADS, GROUP))
    segments = jnp.asarray((rng.random((BATCH, TOKENS)) < 0.06).cumsum(-1), jnp.int32) if packed else None

    def both(offset, module):
        queries, keys = Queries(query, segments), Keys(key, value, segments)
        partial = module.forward(spec, queries, keys, offset)
        lse = jnp.maximum(blockwise.forward(spec, queries, keys, offset).lse, -10) + more
        grads = module.backward(spec, queries, keys, offset, output_grads_of(grad, query, lse))
        return partial.output, jnp.maximum(partial.lse, -1e20), *grads

    for offset in offsets:
        static = (0, 1) if "rank" not in case else (1,)
        results = (
            jax.jit(both, static_argnums=static, compiler_options=QUICK)(offset, module)
            for module in (flash, blockwise)
        )
        for actual, wanted in zip(*results, strict=True):
            assert np.abs(actual - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_unsupported_shapes_are_refused():
    shape = lambda tokens, head_dim: jax.ShapeDtypeStruct((1, tokens, 1, 1, head_dim), jnp.float32)  # noqa: E731
    flash.check_shapes(shape(64, 128), shape(32, 128))
    for tokens, head_dim in ((48, 64), (64, 96), (8, 64), (64, 8)):
        with pytest.raises(ConfigError, match=f"attention_backend: pallas .* {tokens} keys of head_dim {head_dim}"):
            flash.check_shapes(shape(tokens, head_dim), shape(tokens, head_dim))


@pytest.mark.parametrize(("window", "packed"), [(None, False), (None, True), (37, False)])
def test_a_ring_of_kernels(window, packed):
    rng, seq, cp = np.random.default_rng(5), 128, 4
    values = [random(rng, BATCH, seq, n, HEAD_DIM) for n in (4, 2, 2, 4)]
    segments = jnp.asarray((rng.random((BATCH, seq)) < 0.06).cumsum(-1), jnp.int32)

    def run(attend):
        def function(query, key, value, grad, segments):
            apply = lambda *x: attend(*x, segment_ids=segments if packed else None, window=window)  # noqa: E731
            output, backward = jax.vjp(apply, query, key, value)
            return output, *backward(grad)

        return function

    # check_vma=False because the interpreter's own loops fail the check. The kernels pass it: see tests/system.
    spec, order = jax.P(None, "cp"), zigzag_order(seq, cp)
    ring = jax.shard_map(
        run(attention), mesh=make_mesh((1, 1, 1, 1, cp)), in_specs=(spec,) * 5, out_specs=(spec,) * 4, check_vma=False
    )
    with attention_settings(AttentionSettings(backend="pallas")):
        actual = jax.jit(ring, compiler_options=QUICK)(*(x[:, order] for x in (*values, segments)))
    definition = jax.jit(run(reference_attention), compiler_options=QUICK)
    for one, wanted in zip(actual, definition(*values, segments), strict=True):
        assert relative_error(one[:, np.argsort(order)], wanted) < TOLERANCE
