"""The arguments of `attention` beyond the masks, against a definition of their own: output and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_ins
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from support import QUICK, TOLERANCE, relative_error

from jaxpar.attention import (
    AttentionSettings,
    attention,
    attention_settings,
    blockwise,
    reference_attention,
    zigzag_order,
)
from jaxpar.attention.order import from_zigzag, to_zigzag

BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 48, 4, 2, 8, 12
EXCHANGES = {
    "one rank": (AttentionSettings("p2p"), 1),
    "p2p": (AttentionSettings("p2p"), 4),
    "all_gather": (AttentionSettings("all_gather"), 4),
    "a2a": (AttentionSettings("a2a"), 2),
    "a2a+p2p": (AttentionSettings("a2a+p2p", 2), 4),
}
ARGUMENTS = {
    "scale": {"scale": 0.7},
    "soft cap": {"soft_cap": 1.5},
    "values of another size": {"value_dim": VALUE_DIM},
    "contiguous": {"order": "contiguous"},
    "all": {"scale": 0.7, "soft_cap": 1.5, "value_dim": VALUE_DIM, "order": "contiguous"},
}
MASKS = {
    "causal": {},
    "full": {"causal": False},
    "packed": {"packed": True},
    "packed window": {"packed": True, "window": 13},
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(blockwise, "MAX_TILE", 4)
    monkeypatch.setattr(blockwise, "MIN_TILE", 2)


def definition(query, key, value, *, segment_ids=None, causal=True, window=None, scale=None, soft_cap=None):
    """Attention in the words of its papers, one row of scores for each query."""
    key, value = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bshd->bhqs", query, key) * (1 / HEAD_DIM**0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    back = np.arange(SEQ)[:, None] - np.arange(SEQ)
    allowed = (back >= 0 if causal else back == back) & (back < (SEQ if window is None else window))
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jnp.einsum("bhqs,bshd->bqhd", jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1), value)


@functools.cache
def arrays(value_dim=HEAD_DIM):
    """(query, key, value, gradient of the output), and the document of each token."""
    rng = np.random.default_rng(5)
    sizes = (HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, value_dim), (HEADS, value_dim)
    values = [jnp.asarray(rng.normal(size=(BATCH, SEQ, *size)), jnp.float32) for size in sizes]
    return *values, jnp.asarray((rng.random((BATCH, SEQ)) < 0.1).cumsum(-1), jnp.int32)


def with_gradients(attend, packed=False, **arguments):
    def run(query, key, value, grad, segments):
        call = functools.partial(attend, segment_ids=segments if packed else None, **arguments)
        output, backward = jax.vjp(call, query, key, value)
        return output, *backward(grad)

    return run


def compiled(function, inputs):
    return jax.jit(function).lower(*inputs).compile(compiler_options=QUICK)(*inputs)


def on_ranks(size, inputs, settings=None, axis="context", order="zigzag", **arguments):
    """Output and gradients in the order of the sequence, split over the axis `axis` of a mesh of two axes."""
    mesh = Mesh(np.array(jax.devices()[:size]).reshape(1, size), ("rows", axis))
    run = with_gradients(attention, axis=axis, order=order, **arguments)
    if settings is not None:
        run = attention_settings(settings)(run)
    spec = P("rows", axis)
    spread = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 5, out_specs=(spec,) * 4)
    index = zigzag_order(SEQ, size) if order == "zigzag" else np.arange(SEQ)
    return [np.asarray(x)[:, np.argsort(index)] for x in compiled(spread, [x[:, index] for x in inputs])]


@functools.cache
def expected(argument, mask):
    arguments = {**ARGUMENTS[argument], **MASKS[mask]}
    inputs = arrays(arguments.pop("value_dim", HEAD_DIM))
    arguments.pop("order", None)
    return compiled(with_gradients(definition, **arguments), inputs)


def assert_close(actual, wanted):
    for name, one, other in zip(("output", "query", "key", "value"), actual, wanted, strict=True):
        assert one.shape == other.shape and relative_error(one, other) < TOLERANCE, name


def check(exchange, argument, mask, settings=None):
    arguments = {**ARGUMENTS[argument], **MASKS[mask]}
    inputs = arrays(arguments.pop("value_dim", HEAD_DIM))
    actual = on_ranks(EXCHANGES[exchange][1], inputs, settings or EXCHANGES[exchange][0], **arguments)
    assert_close(actual, expected(argument, mask))


QUICK_CASES = [(exchange, "all", "packed window") for exchange in EXCHANGES]
QUICK_CASES += [("p2p", "all", "causal"), ("p2p", "values of another size", "full")]
CASES = [(exchange, argument, mask) for exchange in EXCHANGES for argument in ARGUMENTS for mask in MASKS]


@pytest.mark.parametrize(
    ("exchange", "argument", "mask"),
    QUICK_CASES + [pytest.param(*case, marks=pytest.mark.exhaustive) for case in CASES if case not in QUICK_CASES],
)
def test_output_and_gradients(exchange, argument, mask):
    check(exchange, argument, mask)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_the_definition_of_the_other_tests_agrees(argument):
    arguments = {**ARGUMENTS[argument], **MASKS["packed window"]}
    inputs = arrays(arguments.pop("value_dim", HEAD_DIM))
    arguments.pop("order", None)
    actual = compiled(with_gradients(reference_attention, **arguments), inputs)
    assert_close(actual, expected(argument, "packed window"))


ON_KERNELS = [("p2p", "all", "packed"), ("p2p", "soft cap", "causal"), ("one rank", "values of another size", "causal")]
MORE_ON_KERNELS = [
    (exchange, argument, mask)
    for exchange in EXCHANGES
    for argument in ("soft cap", "values of another size", "all")
    for mask in ("causal", "packed", "packed window")
]


@pytest.mark.parametrize(
    ("exchange", "argument", "mask"),
    ON_KERNELS
    + [pytest.param(*case, marks=pytest.mark.exhaustive) for case in MORE_ON_KERNELS if case not in ON_KERNELS],
)
def test_soft_cap_and_value_size_reach_tokamax(monkeypatch, exchange, argument, mask):
    """And cuDNN is never asked for them, not even where a rank has one unpacked causal block."""
    stand_ins.install(monkeypatch)
    backend = stand_ins.backend()
    settings = EXCHANGES[exchange][0]
    check(exchange, argument, mask, AttentionSettings(settings.cp_comm_type, settings.a2a_size, backend))
    assert {choice.partition(":")[0] for choice in backend.choices} == {"tokamax"}
    why = (
        "cuDNN cannot: a soft cap" if argument == "soft cap" else "cuDNN cannot: values of size 12 with keys of size 8"
    )
    assert all(why in found for found in backend.choices.values())


# --- the order of the sequence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_contiguous_parts_become_zigzag_chunks_and_come_back(size):
    mesh, tokens = Mesh(np.array(jax.devices()[:size]), ("x",)), jnp.arange(SEQ)[None]
    across = lambda f: jax.shard_map(  # noqa: E731
        lambda x: f(x, "x"), mesh=mesh, in_specs=P(None, "x"), out_specs=P(None, "x")
    )
    assert (across(to_zigzag)(tokens)[0] == zigzag_order(SEQ, size)).all()
    assert (across(from_zigzag)(tokens[:, zigzag_order(SEQ, size)]) == tokens).all()


def test_without_settings_a_call_says_what_a_rank_holds():
    """And then it is computed by a ring, in either order."""
    for order in ("zigzag", "contiguous"):
        assert_close(on_ranks(2, arrays(), order=order, packed=True, scale=0.7), expected("scale", "packed"))
    with pytest.raises(ValueError, match=r'order="zigzag" if .*zigzag_order, or order="contiguous" if each rank holds'):
        on_ranks(2, arrays(), order=None)
    with pytest.raises(ValueError, match="order='sequential' is neither"):
        on_ranks(2, arrays(), order="sequential")


@pytest.mark.parametrize("order", [None, "zigzag", "contiguous"])
def test_on_one_rank_the_order_has_no_effect(order):
    assert_close(on_ranks(1, arrays(), order=order, scale=0.7), expected("scale", "causal"))
    assert_close(compiled(with_gradients(attention, order=order, scale=0.7), arrays()), expected("scale", "causal"))


# --- the axis ---------------------------------------------------------------------------------------------------------


def test_an_axis_that_does_not_split_the_sequence():
    """axis=None, or an axis of the mesh that is not manual: each device holds whole sequences."""
    mesh, inputs = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("rows", "cp")), arrays()
    spec = P("rows")

    def spread(run, names):
        return jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 5, out_specs=(spec,) * 4, axis_names=names)

    for axis, names in ((None, {"rows", "cp"}), ("cp", {"rows"})):
        run = spread(with_gradients(attention, axis=axis, scale=0.7), names)
        assert_close(compiled(run, inputs), expected("scale", "causal"))


@pytest.mark.parametrize("axis", ["cp", "contxt"])
def test_an_axis_that_the_mesh_does_not_have(axis):
    """With the default too: `context` may well split the sequence, and nothing would tell."""
    mesh, spec = Mesh(np.array(jax.devices()[:2]), ("context",)), P(None, "context")
    run = with_gradients(attention, axis=axis, order="zigzag")
    spread = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 5, out_specs=(spec,) * 4)
    with pytest.raises(ValueError, match=rf"axis='{axis}' is not an axis of the mesh, whose axes are context: write"):
        jax.jit(spread).lower(*arrays())


# --- errors, and the counter ------------------------------------------------------------------------------------------


def test_errors():
    query, key, value, *_ = arrays()
    for soft_cap in (0, -1.0):
        with pytest.raises(ValueError, match="soft_cap=.* is not more than 0; for scores without a cap, leave it out"):
            attention(query, key, value, soft_cap=soft_cap)
    with pytest.raises(ValueError, match="24 queries, 48 keys and 48 values: a sequence attends to itself"):
        attention(query[:, :24], key, value, causal=False)
    with pytest.raises(ValueError, match="48 queries, 48 keys and 47 values"):
        attention(query, key, value[:, 1:])
    for wrong in ((query[..., 1:], key, value), (query, key, value[:, :, :1]), (query[:1], key, value)):
        with pytest.raises(ValueError, match="do not fit together"):
            attention(*wrong)


def test_calls_are_counted_where_settings_are_in_force():
    query, key, value, *_ = arrays()
    settings = AttentionSettings("all_gather")
    assert settings.calls == [] and settings == AttentionSettings("all_gather")
    with attention_settings(settings):
        jax.eval_shape(lambda: [attention(query, key, value) for _ in range(2)])
    assert settings.calls == ["all_gather", "all_gather"]
    assert settings == AttentionSettings("all_gather") and hash(settings) == hash(AttentionSettings("all_gather"))
    attention(query, key, value)
    assert len(settings.calls) == 2 and AttentionSettings().calls == []
