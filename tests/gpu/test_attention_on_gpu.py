"""Attention by cuDNN and tokamax against its definition, in bfloat16: on a real GPU with `pytest -m gpu -n 0`, and otherwise
through stand-ins on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_ins
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from support import QUICK, relative_error

from jaxpar.attention import (
    AttentionSettings,
    Backend,
    attention,
    attention_settings,
    choose,
    reference_attention,
    zigzag_order,
)
from jaxpar.attention.blocks import output_grads_of
from jaxpar.attention.types import AttentionSpec, Keys, Queries, merge_partials

BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 2, 512, 4, 2, 128
TOLERANCE = 1e-2  # relative; one rounding to bfloat16 is 0.4%
KINDS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 150},
    "packed": {"packed": True},
    "packed window": {"packed": True, "window": 150},
}
EXCHANGES = {
    "p2p": AttentionSettings("p2p"),
    "all_gather": AttentionSettings("all_gather"),
    "a2a": AttentionSettings("a2a"),
    "a2a+p2p": AttentionSettings("a2a+p2p", 2),
}
RANKS = {"p2p": 4, "all_gather": 4, "a2a": 2, "a2a+p2p": 4}


@pytest.fixture(params=[pytest.param("stand-ins", marks=pytest.mark.slow), pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The GPU, or what a choice of kernels takes for one."""
    if request.param == "stand-ins":
        stand_ins.install(monkeypatch)
        return stand_ins.H100
    first = jax.devices()[0]
    if first.platform != "gpu" or not hasattr(first, "compute_capability"):
        pytest.skip(f"jax has no NVIDIA GPU here, only {first.platform}")
    return first


def skip_unless_able(device, kernel):
    needs = choose.BlockNeeds("bfloat16", HEAD_DIM, False, "causal")
    if problem := choose.KERNELS[kernel].problem(Backend(kernel, device), needs):
        pytest.skip(f"{kernel} does not run on {device.device_kind}: {problem}")


@functools.cache
def arrays():
    """(query, key, value, gradient of the output) in bfloat16, and the document of each token."""
    rng = np.random.default_rng(7)
    shapes = [(BATCH, TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    segments = (rng.random((BATCH, TOKENS)) < 0.012).cumsum(-1)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes], jnp.asarray(segments, jnp.int32)


def with_gradients(attend, packed=False, **kind):
    def run(query, key, value, grad, segments):
        call = functools.partial(attend, segment_ids=segments if packed else None, **kind)
        output, backward = jax.vjp(call, query, key, value)
        return output, *backward(grad)

    return run


@functools.cache
def expected(kind):
    """Output and gradients of query, key and value by the definition, in float32."""
    values, segments = arrays()
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(with_gradients(reference_attention, **KINDS[kind]))
        return [np.asarray(x) for x in reference(*(x.astype(jnp.float32) for x in values), segments)]


def run(device, function, *args):
    """On a GPU with the options of a user."""
    options = QUICK if isinstance(device, stand_ins.FakeGpu) else None
    return [np.asarray(x, np.float32) for x in jax.jit(function).lower(*args).compile(compiler_options=options)(*args)]


def check(actual, wanted):
    for name, one, other in zip(("output", "query", "key", "value"), actual, wanted, strict=True):
        assert relative_error(one, other) < TOLERANCE, name


@pytest.mark.parametrize(
    ("kernel", "kind"), [("cudnn", k) for k in ("causal", "full", "window")] + [("tokamax", k) for k in KINDS]
)
def test_attention(device, kernel, kind):
    skip_unless_able(device, kernel)
    values, segments = arrays()
    with attention_settings(AttentionSettings(backend=Backend(kernel, device))):
        check(run(device, with_gradients(attention, **KINDS[kind]), *values, segments), expected(kind))


@pytest.mark.parametrize("arguments", [{"soft_cap": 2.0}, {"scale": 0.2}], ids=["soft cap", "scale"])
@pytest.mark.parametrize("value_dim", [64, HEAD_DIM])
def test_other_scores_and_values(device, arguments, value_dim):
    """By tokamax, which alone has them."""
    skip_unless_able(device, "tokamax")
    (query, key, value, grad), segments = arrays()
    values = query, key, value[..., :value_dim], grad[..., :value_dim]
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(with_gradients(reference_attention, packed=True, **arguments))
        wanted = reference(*(x.astype(jnp.float32) for x in values), segments)
    with attention_settings(AttentionSettings(backend=Backend("tokamax", device))):
        check(run(device, with_gradients(attention, packed=True, **arguments), *values, segments), wanted)


@pytest.mark.parametrize(
    ("kernel", "kind", "known"),
    [("cudnn", "causal", True), ("tokamax", "causal", True), ("tokamax", "packed", True)]
    + [("tokamax", kind, known) for kind in ("window", "packed window") for known in (True, False)],
)
def test_blocks_with_the_statistics_of_all_keys(device, kernel, kind, known):
    """The late half of the queries attends to the early half of the keys and to its own, as at two stops of a ring. `known`: whether the
    offset is an int, or an array as where it differs between ranks."""
    skip_unless_able(device, kernel)
    (query, key, value, grad), segments = arrays()
    window, half = KINDS[kind].get("window"), TOKENS // 2
    spec = AttentionSpec(True, window, HEAD_DIM**-0.5, Backend(kernel, device))
    module = choose.KERNELS[kernel]

    def late(offset, query, key, value, grad, segments):
        segments = segments if "packed" in KINDS[kind] else None
        grouped = lambda x: x[:, half:].reshape(BATCH, half, KV_HEADS, -1, HEAD_DIM)  # noqa: E731
        part = lambda x, n: None if x is None else x[:, n * half :][:, :half]  # noqa: E731
        queries = Queries(grouped(query), part(segments, 1))
        keys = [Keys(*(part(x, n) for x in (key, value, segments))) for n in range(2)]
        # Of causal order alone, an earlier block shows nothing.
        offsets = [None if window is None else offset, 0]
        partials = [module.forward(spec, queries, *block) for block in zip(keys, offsets, strict=True)]
        output, lse = merge_partials(*partials)
        given = output_grads_of(grouped(grad), output.astype(query.dtype), lse)
        grads = [module.backward(spec, queries, *block, given) for block in zip(keys, offsets, strict=True)]
        query_grad = sum(one.query.astype(jnp.float32) for one in grads)
        flat = lambda x: x.reshape(BATCH, half, HEADS, HEAD_DIM)  # noqa: E731
        return (
            flat(output),
            flat(query_grad),
            *(jnp.concatenate(x, 1) for x in zip(*(g[1:] for g in grads), strict=True)),
        )

    offset, args = half, (query, key, value, grad.at[:, :half].set(0), segments)
    if known:
        actual = run(device, functools.partial(late, offset), *args)
    else:
        actual = run(device, late, jnp.int32(offset), *args)
    with jax.default_matmul_precision("highest"):
        wide = (x.astype(jnp.float32) for x in args[:-1])
        output, query_grad, *rest = jax.jit(with_gradients(reference_attention, **KINDS[kind]))(*wide, segments)
    check(actual, [output[:, half:], query_grad[:, half:], *rest])


@pytest.mark.parametrize("kind", ["causal", "window", "packed"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_an_exchange_between_gpus(device, exchange, kind):
    """With what `auto` takes."""
    size, settings = RANKS[exchange], EXCHANGES[exchange]
    if len(jax.devices()) < size:
        pytest.skip(f"{exchange} is tested on {size} GPUs, and here are {len(jax.devices())}")
    settings = AttentionSettings(settings.cp_comm_type, settings.a2a_size, Backend("auto", device))
    order = zigzag_order(TOKENS, size)
    values, segments = arrays()
    spread = jax.shard_map(
        with_gradients(attention, **KINDS[kind]),
        mesh=Mesh(np.array(jax.devices()[:size]), ("cp",)),
        in_specs=(P(None, "cp"),) * 5,
        out_specs=(P(None, "cp"),) * 4,
    )
    with attention_settings(settings):
        found = run(device, spread, *(x[:, order] for x in (*values, segments)))
    check([x[:, np.argsort(order)] for x in found], expected(kind))
