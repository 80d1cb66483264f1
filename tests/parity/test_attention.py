"""Every kind of attention against its definition: output, gradients, work of each rank, memory and bytes sent."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import QUICK, TOLERANCE, array_shapes, make_mesh, relative_error, slow

from jaxpar.attention import (
    AttentionSettings,
    attention,
    attention_settings,
    blockwise,
    reference_attention,
    ring,
    zigzag_order,
)
from jaxpar.attention.types import AttentionSpec
from jaxpar.config import ConfigError
from jaxpar.measure.hlo import count

BATCH, SEQ, HEAD_DIM = 2, 64, 8
KINDS = {
    "causal": {},
    "full": {"causal": False},
    "packed": {"packed": True},
    "window": {"window": 13},
    "window within a tile": {"window": 3},
    "window of half the sequence": {"window": 37},
    "full window": {"causal": False, "window": 9},
    "packed full": {"packed": True, "causal": False},
    "packed window": {"packed": True, "window": 13},
}
GROUPED, EQUAL = (8, 2), (8, 8)
P2P, ALL_GATHER, A2A = AttentionSettings("p2p"), AttentionSettings("all_gather"), AttentionSettings("a2a")


def a2a_p2p(a2a_size):
    return AttentionSettings("a2a+p2p", a2a_size)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles per chunk or a single one, depending on the chunk size."""
    monkeypatch.setattr(blockwise, "MAX_TILE", 4)
    monkeypatch.setattr(blockwise, "MIN_TILE", 2)


@functools.cache
def arrays(heads: int, kv_heads: int, seq: int = SEQ, dtype: str = "float32"):
    """(query, key, value, gradient of the output), and segment ids of documents of uneven length."""
    rng = np.random.default_rng(11)
    shape = lambda n: (BATCH, seq, n, HEAD_DIM)  # noqa: E731
    values = [rng.normal(size=shape(n)) * 1.5 for n in (heads, kv_heads, kv_heads, heads)]
    segments = (rng.random((BATCH, seq)) < 0.12).cumsum(-1).astype(np.int32)
    return tuple(jnp.asarray(x, dtype) for x in values), jnp.asarray(segments)


def with_gradients(attend, cp: int | None, settings=P2P, *, packed: bool = False, **kind):
    """A function (query, key, value, output gradient, segments) → (output, gradients) on cp ranks, in zigzag order."""

    def run(query, key, value, grad, segments):
        apply = lambda q, k, v: attend(q, k, v, segment_ids=segments if packed else None, **kind)  # noqa: E731
        with attention_settings(settings):
            output, backward = jax.vjp(apply, query, key, value)
        return output, *backward(grad)

    if cp is None:
        return jax.jit(run)
    spec = P(None, "cp")
    return jax.jit(jax.shard_map(run, mesh=make_mesh((1, 1, 1, 1, cp)), in_specs=(spec,) * 5, out_specs=(spec,) * 4))


def to_zigzag(tree, cp: int | None):
    return jax.tree.map(lambda x: x[:, zigzag_order(x.shape[1], cp or 1)], tree)


def from_zigzag(tree, cp: int | None):
    return jax.tree.map(lambda x: np.asarray(x)[:, np.argsort(zigzag_order(x.shape[1], cp or 1))], tree)


def run(function, cp, values, segments):
    inputs = to_zigzag((*values, segments), cp)
    return from_zigzag(function.lower(*inputs).compile(compiler_options=QUICK)(*inputs), cp)


def results(attend, cp, heads, settings=P2P, dtype="float32", **kind) -> dict[str, np.ndarray]:
    outputs = run(with_gradients(attend, cp, settings, **kind), cp, *arrays(*heads, dtype=dtype))
    assert all(x.dtype == dtype for x in outputs)
    return dict(zip(("output", "query", "key", "value"), outputs, strict=True))


@functools.cache
def expected(heads, kind, dtype="float32"):
    return results(reference_attention, None, heads, dtype=dtype, **KINDS[kind])


def check(cp, heads, kind, settings=P2P):
    actual = results(attention, cp, heads, settings, **KINDS[kind])
    for name, value in expected(heads, kind).items():
        assert relative_error(actual[name], value) < TOLERANCE, name


RANKS = [(s, 4) for s in (P2P, ALL_GATHER, A2A, a2a_p2p(2))]
MORE_RANKS = [(s, cp) for s in (P2P, ALL_GATHER, A2A, a2a_p2p(2)) for cp in (2, 8)] + [(a2a_p2p(4), 8)]
RANKS += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_RANKS]


@pytest.mark.parametrize("kind", ["causal", "full", "packed", "window"])
@pytest.mark.parametrize(
    "heads",
    [pytest.param(EQUAL, id="as many kv heads", marks=pytest.mark.slow), pytest.param(GROUPED, id="grouped")],
)
@pytest.mark.parametrize(("settings", "cp"), RANKS, ids=lambda x: getattr(x, "cp_comm_type", x))
def test_output_and_gradients(settings, cp, heads, kind):
    check(cp, heads, kind, settings)


@pytest.mark.parametrize("kind", KINDS)
def test_without_context_parallelism(kind):
    check(None, GROUPED, kind)


def test_a_cp_axis_of_one():
    check(1, GROUPED, "packed")


@pytest.mark.parametrize("kind", list(KINDS)[4:])
@pytest.mark.parametrize(
    "settings", [P2P, pytest.param(ALL_GATHER, marks=pytest.mark.slow)], ids=lambda s: s.cp_comm_type
)
def test_other_masks(settings, kind):
    check(4, GROUPED, kind, settings)


@pytest.mark.parametrize("seq", [1, 7, *slow(12), 53])
def test_any_length_without_context_parallelism(seq):
    values, segments = arrays(*GROUPED, seq=seq)
    for kind in ({}, {"window": 3}, {"packed": True}):
        actual, wanted = (
            run(with_gradients(f, None, **kind), None, values, segments) for f in (attention, reference_attention)
        )
        assert relative_error(actual[0], wanted[0]) < TOLERANCE
        for one, other in zip(actual, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("cp", [None, 4])
@pytest.mark.parametrize("kind", ["causal", "packed window"])
def test_bfloat16(cp, kind):
    """With products in bfloat16, and statistics and sums in float32, within 1% of float32 (one rounding is 0.4%)."""
    actual = results(attention, cp, GROUPED, dtype="bfloat16", **KINDS[kind])
    for name, value in expected(GROUPED, kind).items():
        assert relative_error(actual[name], value) < 1e-2, name


def test_large_scores_do_not_overflow():
    (query, key, value, grad), segments = arrays(*GROUPED)
    values = (query * 100, key * 100, value, grad)
    wanted, *_ = run(with_gradients(reference_attention, None), None, values, segments)
    for cp in (None, 4):
        actual = run(with_gradients(attention, cp), cp, values, segments)
        assert all(np.isfinite(x).all() for x in actual)
        assert relative_error(actual[0], wanted) < 1e-3  # scores of 1e5 leave no more significant digits


@pytest.mark.parametrize("cp", [None, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_a_token_with_no_key_to_attend_to(cp, causal):
    # A window of 0 allows only later keys: none at all if causal, and otherwise none for the last token.
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
    function = with_gradients(attention, cp, packed=True)
    output, query_grad, _, value_grad = run(function, cp, (query, key, value, grad), segments)
    np.testing.assert_allclose(output, value, rtol=1e-6)
    np.testing.assert_allclose(value_grad, grad, rtol=1e-6)
    np.testing.assert_allclose(query_grad, 0, atol=1e-5)


@pytest.mark.parametrize("settings", [P2P, ALL_GATHER], ids=lambda s: s.cp_comm_type)
def test_blocks_that_no_document_spans_are_not_computed(settings):
    """Nor are they computed and masked, because 0 · NaN would spread the NaN of another document's values."""
    (query, key, value, grad), _ = arrays(*EQUAL)
    segments = jnp.broadcast_to(jnp.arange(SEQ, dtype=jnp.int32) // (SEQ // 8), (BATCH, SEQ))  # one per chunk
    poisoned = to_zigzag(value, 4).at[:, 0].set(np.nan)
    value = jnp.asarray(from_zigzag(poisoned, 4))  # in the first rank's early chunk
    outputs = run(with_gradients(attention, 4, settings, packed=True), 4, (query, key, value, grad), segments)
    first_rank = zigzag_order(SEQ, 4)[: SEQ // 4]
    others = np.delete(np.arange(SEQ), first_rank)
    assert np.isnan(outputs[0][:, first_rank]).any()
    assert all(np.isfinite(x[:, others]).all() for x in outputs)


def test_errors():
    (query, key, value, _), _ = arrays(8, 3)
    with pytest.raises(ValueError, match="8 query heads are not a multiple of 3 kv heads"):
        attention(query, key, value)
    values, segments = arrays(6, 2)
    with pytest.raises(ConfigError, match=r"over 4 cp ranks cannot divide the 6 heads .*6 / 4 = 1.5"):
        with_gradients(attention, 4, A2A).lower(*values, segments)
    values, segments = arrays(8, 2, seq=12)
    with pytest.raises(ValueError, match="3 tokens on a cp rank are not two chunks"):
        with_gradients(attention, 4).lower(*values, segments)


# --- the work of each rank --------------------------------------------------------------------------------------------

HEADS = GROUPED[0]


def executed_flops(cp, settings=P2P, seq=SEQ, **kind) -> float:
    """FLOPs of one device, forward and backward. All devices run the same program, so all do the same work."""
    values, segments = arrays(*GROUPED, seq=seq)
    text = with_gradients(attention, cp, settings, **kind).lower(*values, segments).compile(QUICK).as_text()
    assert kind or not re.search(r"\bconditional\(", text)
    counted = count(text)
    assert counted.uncounted == []
    return counted.flops


def full_square(seq=SEQ) -> float:
    """FLOPs without a mask: two products forward, five backward (query · key is recomputed: scores are not kept)."""
    return 7 * 2 * BATCH * HEADS * HEAD_DIM * seq**2


@pytest.mark.parametrize(
    ("settings", "cp"),
    [(P2P, 4), *slow((P2P, 8)), (ALL_GATHER, 4), (A2A, 4), (a2a_p2p(2), 8)],
    ids=lambda x: getattr(x, "cp_comm_type", x),
)
def test_causal_work_is_the_same_on_every_rank_and_half_of_the_square(settings, cp):
    share = executed_flops(cp, settings) / (full_square() / cp)
    assert share <= 0.55
    chunk = SEQ // (2 * cp)
    if settings == P2P:  # per rank 2·cp - 1 whole chunks, and two diagonal ones with (tiles + 1) / 2 tiles each
        assert share == ((2 * cp - 1) + (chunk // 2 + 1) / (chunk // 2)) / (4 * cp) if chunk > 2 else True


def test_causal_work_without_context_parallelism():
    assert executed_flops(None) == full_square() * 17 / 32  # 16 tiles along each side


@pytest.mark.parametrize("settings", [P2P, A2A], ids=lambda s: s.cp_comm_type)
def test_full_attention_is_the_whole_square(settings):
    assert executed_flops(4, settings, causal=False) == full_square() / 4


@pytest.mark.parametrize(("window", "hops"), [(1, set()), (9, {1, 3}), (17, {1, 2, 3}), (64, {1, 2, 3})])
def test_ring_steps_beyond_the_window_are_left_out(window, hops):
    assert set(ring._stops(AttentionSpec(True, window, 1.0, "xla"), ring.Ring(4), SEQ // 4)) == {0} | hops
    values, segments = arrays(*GROUPED)
    text = with_gradients(attention, 4, window=window).lower(*values, segments).compile(QUICK).as_text()
    pairs = re.findall(r"collective-permute\(.*source_target_pairs=\{(.*?)\}\}", text)
    distances = {(int(b) - int(a)) % 4 for found in pairs for a, b in re.findall(r"(\d),(\d)", found)}
    assert distances == ({1, 2} if hops == {1, 3} else {1} if hops else set())  # from step 1 to step 3 in one hop


# --- what the compiled program keeps and sends ------------------------------------------------------------------------

SHARE = 64  # tokens per cp rank


@pytest.mark.parametrize("settings", [P2P, ALL_GATHER], ids=lambda s: s.cp_comm_type)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_never_more_than_one_tile_of_scores(monkeypatch, backward, settings):
    monkeypatch.setattr(blockwise, "MAX_TILE", 16)
    monkeypatch.setattr(blockwise, "MIN_TILE", 16)
    heads, kv_heads, seq = 4, 2, 4 * SHARE
    tile = BATCH * heads * 16 * 16

    def compiled(attend, cp):
        run = with_gradients(attend, cp, settings, packed=True)
        if not backward:
            run = jax.jit(lambda *args, run=run: run(*args)[0])
        values, segments = arrays(heads, kv_heads, seq=(cp or 4) * SHARE)
        return run.lower(*values, segments).compile(QUICK)

    program = compiled(attention, 4)
    shapes = array_shapes(program.as_text())
    tokens = BATCH * heads * HEAD_DIM * (seq if settings == ALL_GATHER else SHARE)
    assert tile <= max(map(math.prod, shapes)) <= max(tile, tokens)  # a tile's scores, or an array of tokens
    assert not [shape for shape in shapes if sum(n >= SHARE for n in shape) >= 2]
    if settings == P2P:  # a longer ring has twice as many scores per rank, but no larger temporaries
        temporaries = [p.memory_analysis().temp_size_in_bytes for p in (program, compiled(attention, 8))]
        assert temporaries[1] < 1.05 * temporaries[0]
    # A check of the check: the definition of attention keeps all scores.
    assert max(map(math.prod, array_shapes(compiled(reference_attention, None).as_text()))) >= BATCH * heads * seq**2


def sent(settings, cp=4):
    values, segments = arrays(*GROUPED)
    text = with_gradients(attention, cp, settings).lower(*values, segments).compile(QUICK).as_text()
    counted = count(text, np.arange(cp).reshape(1, 1, 1, 1, cp))
    assert all(c.axes == ("cp",) and c.dtype == "f32" for c in counted.collectives)
    return {
        kind: sum(c.bytes for c in counted.collectives if c.kind == kind)
        for kind in {c.kind for c in counted.collectives}
    }


def test_only_the_kv_heads_travel():
    keys, heads = 4 * BATCH * SEQ // 4 * HEAD_DIM * GROUPED[1], 4 * BATCH * SEQ // 4 * HEAD_DIM * GROUPED[0]
    # Keys and values go to 3 other ranks, forward and backward; the first hop serves both passes. Their gradients go
    # one step further, back to their own rank.
    assert sent(P2P) == {"collective-permute": 2 * (1 + 2 + 2 + 4) * keys}
    # Gathered once for both passes, because this program does nothing else.
    assert sent(ALL_GATHER) == {"all-gather": 2 * 4 * keys, "reduce-scatter": 2 * 4 * keys}
    # Query and output are sent with all their heads, keys and values with one head per rank.
    assert sent(A2A) == {"all-to-all": 2 * (2 * heads + 2 * 2 * keys)}
