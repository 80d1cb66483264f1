"""Ring attention over cp against the definition: output and gradients, and what the compiled program keeps."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import QUICK, TOLERANCE, array_shapes, make_mesh, relative_error

from jaxpar.attention import attention, reference_attention, ring

BATCH, SEQ, HEAD_DIM = 2, 32, 8
KINDS = {
    "causal": {},
    "full": {"causal": False},
    "window within a block": {"window": 3},
    "window over blocks": {"window": 13},
    "full window": {"causal": False, "window": 5},
    "packed": {"packed": True},
    "packed full": {"packed": True, "causal": False},
    "packed window": {"packed": True, "window": 6},
}
GROUPED, EQUAL = (8, 2), (4, 4)


@functools.cache
def arrays(heads: int, kv_heads: int, seq: int = SEQ, dtype: str = "float32"):
    """query, key, value, the gradient of the output; and documents of uneven length."""
    rng = np.random.default_rng(11)
    shape = lambda n: (BATCH, seq, n, HEAD_DIM)  # noqa: E731
    values = [rng.normal(size=shape(n)) * 1.5 for n in (heads, kv_heads, kv_heads, heads)]
    segments = (rng.random((BATCH, seq)) < 0.12).cumsum(-1).astype(np.int32)
    return tuple(jnp.asarray(x, dtype) for x in values), jnp.asarray(segments)


def with_gradients(attend, cp: int | None, *, packed: bool = False, **kind):
    """(query, key, value, output gradient, segments) → (output, (query, key, value gradients)), on a ring of `cp`."""

    def run(query, key, value, grad, segments):
        apply = lambda q, k, v: attend(q, k, v, segment_ids=segments if packed else None, **kind)  # noqa: E731
        output, backward = jax.vjp(apply, query, key, value)
        return output, backward(grad)

    if cp is None:
        return jax.jit(run)
    spec = P(None, "cp")
    ring = jax.shard_map(run, mesh=make_mesh((1, 1, 1, 1, cp)), in_specs=(spec,) * 5, out_specs=(spec, (spec,) * 3))
    return jax.jit(ring)


def results(attend, cp, heads, dtype="float32", **kind) -> dict[str, np.ndarray]:
    values, segments = arrays(*heads, dtype=dtype)
    lowered = with_gradients(attend, cp, **kind).lower(*values, segments)
    output, grads = lowered.compile(compiler_options=QUICK)(*values, segments)
    assert output.dtype == dtype and all(grad.dtype == dtype for grad in grads)
    return {"output": np.asarray(output), **dict(zip(("query", "key", "value"), map(np.asarray, grads), strict=True))}


@functools.cache
def expected(heads, kind, dtype="float32"):
    return results(reference_attention, None, heads, dtype, **KINDS[kind])


CASES = [(cp, GROUPED, kind, 4) for kind in KINDS for cp in (None, 2, 4)]  # 8, 4 and 2 blocks a rank
CASES += [(cp, EQUAL, kind, SEQ) for kind in ("causal", "full", "packed window") for cp in (None, 1, 2, 4)]  # one


@pytest.mark.parametrize(("cp", "heads", "kind", "block_size"), CASES, ids=str)
def test_output_and_gradients(monkeypatch, cp, heads, kind, block_size):
    monkeypatch.setattr(ring, "BLOCK_SIZE", block_size)
    actual = results(attention, cp, heads, **KINDS[kind])
    for name, value in expected(heads, kind).items():
        assert relative_error(actual[name], value) < TOLERANCE, name


@pytest.mark.parametrize("cp", [None, 4])
@pytest.mark.parametrize("kind", ["causal", "packed window"])
def test_bfloat16(cp, kind):
    """Products in bfloat16, statistics and sums in float32: within 1% of attention in float32 (a rounding is 0.4%)."""
    actual = results(attention, cp, GROUPED, "bfloat16", **KINDS[kind])
    for name, value in expected(GROUPED, kind).items():
        assert relative_error(actual[name], value) < 1e-2, name


def test_large_scores_do_not_overflow():
    (query, key, value, grad), segments = arrays(*GROUPED)
    for cp in (None, 4):
        output, grads = with_gradients(attention, cp)(query * 100, key * 100, value, grad, segments)
        assert all(np.isfinite(x).all() for x in (output, *grads))
        wanted, _ = with_gradients(reference_attention, None)(query * 100, key * 100, value, grad, segments)
        assert relative_error(output, wanted) < 1e-3  # scores of 1e5 have no more digits than that


@pytest.mark.parametrize("cp", [None, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_a_token_that_may_attend_to_nothing(cp, causal):
    # A window of 0 leaves only later keys: with causal order none at all, without it none to the last token.
    actual = results(attention, cp, GROUPED, causal=causal, window=0)
    wanted = results(reference_attention, None, GROUPED, causal=causal, window=0)
    empty = slice(None) if causal else slice(-1, None)
    assert all(np.isfinite(x).all() for x in actual.values())
    assert not actual["output"][:, empty].any() and not actual["query"][:, empty].any()
    if causal:
        assert not any(x.any() for x in (*actual.values(), *wanted.values()))
    else:
        assert all(relative_error(actual[name], wanted[name]) < TOLERANCE for name in wanted)


@pytest.mark.parametrize("cp", [None, 2])
def test_documents_of_one_token_attend_to_themselves_alone(cp):
    (query, key, value, grad), _ = arrays(*EQUAL)
    segments = jnp.broadcast_to(jnp.arange(SEQ, dtype=jnp.int32), (BATCH, SEQ))
    output, grads = with_gradients(attention, cp, packed=True)(query, key, value, grad, segments)
    np.testing.assert_allclose(output, value, rtol=1e-6)
    np.testing.assert_allclose(grads[2], grad, rtol=1e-6)
    np.testing.assert_allclose(grads[0], 0, atol=1e-5)


def test_heads_that_are_no_multiple_of_kv_heads():
    (query, key, value, _), _ = arrays(8, 3)
    with pytest.raises(ValueError, match="8 query heads are not a multiple of 3 kv heads"):
        attention(query, key, value)


# --- what the compiled program keeps ------------------------------------------------------------------------------------

SHARE = 64  # tokens a cp rank


@pytest.mark.parametrize("block_size", [16, 1024])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_never_more_than_one_block_of_scores(monkeypatch, backward, block_size):
    monkeypatch.setattr(ring, "BLOCK_SIZE", block_size)
    heads, kv_heads, seq = 4, 2, 4 * SHARE
    block = BATCH * heads * SHARE * min(block_size, SHARE)

    def compiled(attend, cp):
        run = with_gradients(attend, cp, packed=True)
        if not backward:
            run = jax.jit(lambda *args, run=run: run(*args)[0])
        values, segments = arrays(heads, kv_heads, seq=(cp or 4) * SHARE)
        return run.lower(*values, segments).compile()

    program = compiled(attention, 4)
    shapes = array_shapes(program.as_text())
    assert max(map(math.prod, shapes)) == block  # the scores themselves, and nothing is larger
    assert not [shape for shape in shapes if sum(n >= seq for n in shape) >= 2]
    # Several arrays of a block's size are in use at once, but a longer ring (of twice as many scores a rank) has no more.
    temporaries = [p.memory_analysis().temp_size_in_bytes for p in (program, compiled(attention, 8))]
    assert temporaries[1] < 1.05 * temporaries[0]
    # That the look at the text sees what it shall: the definition keeps all scores.
    assert max(map(math.prod, array_shapes(compiled(reference_attention, None).as_text()))) >= BATCH * heads * seq**2


def test_only_the_kv_heads_travel():
    values, segments = arrays(*GROUPED)
    text = with_gradients(attention, 4, packed=True).lower(*values, segments).compile().as_text()
    sent = re.findall(r" = (\w+)\[([\d,]+)\]\S* collective-permute\(", text)
    # Key, value and segments forward; the same and two gradients backward, which go one step further to get home.
    assert {shape for _, shape in sent} == {f"{BATCH},{SEQ // 4},2,{HEAD_DIM}", f"{BATCH},{SEQ // 4}"}
    assert len(sent) == 3 + 5 + 2
