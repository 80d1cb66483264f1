"""Attention by cuDNN and tokamax, through stand-ins with their contracts, against the definition of attention.

tests/system/test_compile_attention.py compiles the kernels themselves for H100s; tests/gpu runs them, where there is a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_ins
from support import QUICK, TOLERANCE, slow
from test_attention import ALL_GATHER, GROUPED, KINDS, P2P, a2a_p2p, check

from jaxpar.attention import AttentionSettings, Backend, blockwise, choice_lines, choose, cudnn, tokamax
from jaxpar.attention.blocks import output_grads_of
from jaxpar.attention.types import AttentionSpec, BlockNeeds, Keys, Queries
from jaxpar.config import ConfigError

BATCH, TOKENS, KV_HEADS, GROUP, HEAD_DIM = 2, 64, 2, 2, 16


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    stand_ins.install(monkeypatch)


def on_kernels(settings, name="auto"):
    backend = stand_ins.backend(name)
    return AttentionSettings(settings.cp_comm_type, settings.a2a_size, backend), backend


A2A = AttentionSettings("a2a")
EXCHANGES = {
    "one rank": (P2P, None),
    "p2p": (P2P, 4),
    "all_gather": (ALL_GATHER, 4),
    "a2a": (A2A, 2),
    "both": (a2a_p2p(2), 4),
}


USUAL = ("causal", "packed", "window", "packed window")
CASES = [(exchange, kind) for exchange in EXCHANGES for kind in KINDS]


@pytest.mark.parametrize(
    ("exchange", "kind"),
    [case for case in CASES if case[1] in USUAL] + slow(*(case for case in CASES if case[1] not in USUAL)),
)
def test_output_and_gradients(exchange, kind):
    """Of every exchange and mask, with what `auto` takes on an H100."""
    settings, backend = on_kernels(EXCHANGES[exchange][0])
    check(EXCHANGES[exchange][1], GROUPED, kind, settings)
    used = {name.partition(":")[0] for name in backend.choices}
    assert used <= {"cuDNN", "tokamax"}, backend.choices  # never plain JAX
    if "packed" in kind:
        assert used == {"tokamax"}


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_a_named_kernel_takes_all_blocks(kind):
    for name, used in (("cudnn", "cuDNN"), ("tokamax", "tokamax"), ("xla", "plain JAX")):
        settings, backend = on_kernels(P2P, name)
        check(4, GROUPED, kind, settings)
        assert {choice.partition(":")[0] for choice in backend.choices} == {used}


def random(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


BLOCKS = {
    "whole": (True, None, None, False),
    "whole, packed": (True, None, None, True),
    "causal": (True, None, 0, False),
    "causal window": (True, 9, 0, False),
    "causal, packed": (True, None, 0, True),
    "shifted, packed": (True, None, 16, True),
    "shifted the other way": (True, None, -24, False),
    "all masked": (True, None, -TOKENS, False),
    "window, shifted": (True, 9, 8, False),
    "window, far": (True, 9, 200, False),
    "window without order": (False, 9, -TOKENS, False),
}


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("kernel", [cudnn, tokamax], ids=["cudnn", "tokamax"])
def test_a_block(kernel, case):
    """Against plain JAX, with the statistics of a query that has seen other keys too."""
    causal, window, offset, packed = BLOCKS[case]
    backend = stand_ins.backend()
    spec, rng = AttentionSpec(causal, window, HEAD_DIM**-0.5, backend), np.random.default_rng(3)
    heads = (KV_HEADS, GROUP, HEAD_DIM)
    query, grad = random(rng, BATCH, TOKENS, *heads), random(rng, BATCH, TOKENS, *heads)
    key, value = (random(rng, BATCH, TOKENS, KV_HEADS, HEAD_DIM) for _ in range(2))
    segments = jnp.asarray((rng.random((BATCH, TOKENS)) < 0.06).cumsum(-1), jnp.int32) if packed else None
    later = None if segments is None else segments + (offset == 16)  # some queries then have no key here
    queries, keys = Queries(query, later), Keys(key, value, segments)
    needs = BlockNeeds("float32", HEAD_DIM, packed, choose._mask(spec, offset))
    if problem := kernel.problem(backend, needs):
        assert kernel is cudnn and problem in ("documents", "the order of queries and keys is shifted")
        return
    # The log-sum-exp includes other keys as well, so the weights of the block do not add up to 1.
    more = jnp.abs(random(rng, BATCH, KV_HEADS, GROUP, TOKENS))
    lse = jnp.maximum(blockwise.forward(spec, queries, keys, offset).lse, -10) + more

    def both(module):
        def run():
            partial = module.forward(spec, queries, keys, offset)
            grads = module.backward(spec, queries, keys, offset, output_grads_of(grad, query, lse))
            return partial.output, jnp.maximum(partial.lse, -1e20), *grads

        return jax.jit(run, compiler_options=QUICK)()

    for actual, wanted in zip(both(kernel), both(blockwise), strict=True):
        assert np.abs(actual - wanted).max() <= TOLERANCE * max(np.abs(wanted).max(), 1e-3)


def test_what_auto_takes():
    """And why. The stand-ins take float32; cuDNN and tokamax themselves do not, see the next test."""
    plain = dict(head_dim=128, documents=False, mask="causal")
    for device, changes, name in (
        (stand_ins.H100, {}, "cudnn"),
        (stand_ins.H100, {"mask": None}, "cudnn"),
        (stand_ins.H100, {"mask": "window"}, "cudnn"),
        (stand_ins.H100, {"head_dim": 256}, "cudnn"),
        (stand_ins.H100, {"mask": "shifted"}, "tokamax"),
        (stand_ins.H100, {"documents": True}, "tokamax"),
        (stand_ins.H100, {"head_dim": 512}, "xla"),
        (stand_ins.H100, {"head_dim": 20}, "tokamax"),
        (stand_ins.H100, {"soft_cap": True}, "tokamax"),
        (stand_ins.H100, {"head_dim": 192, "value_dim": 128}, "tokamax"),
        (stand_ins.H100, {"value_dim": 512}, "xla"),
        (stand_ins.A100, {}, "cudnn"),
        (stand_ins.A100, {"head_dim": 256}, "xla"),
        (stand_ins.A100, {"documents": True}, "xla"),
        (stand_ins.A100, {"soft_cap": True}, "xla"),
        (stand_ins.FakeGpu("10.0"), {}, "cudnn"),
        (stand_ins.FakeGpu("10.0"), {"documents": True}, "xla"),
    ):
        needs = BlockNeeds("bfloat16", **{**plain, **changes})
        found, why = choose.choose(Backend("auto", device), needs)
        assert found == name, (device, needs)
        assert ("cuDNN" in why, "tokamax" in why) == (name != "cudnn", name == "xla"), why


def test_float32_is_plain_jax_and_a_named_kernel_says_why_not(monkeypatch):
    monkeypatch.undo()
    needs = BlockNeeds("float32", 128, False, "causal")
    assert choose.choose(stand_ins.backend(), needs) == (
        "xla",
        "cuDNN and tokamax cannot: float32 is not bfloat16 or float16; set actor.model.precision: bf16",
    )
    message = "attention_backend: cudnn cannot compute causal blocks in float32, which this run needs: float32 is not"
    with pytest.raises(ConfigError, match=message):
        choose.choose(stand_ins.backend("cudnn"), needs)
    with pytest.raises(ConfigError, match=r"causal blocks with documents in bfloat16.*: documents; set auto"):
        choose.choose(stand_ins.backend("cudnn"), BlockNeeds("bfloat16", 128, True, "causal"))


def test_a_missing_tokamax_is_named(monkeypatch):
    monkeypatch.setattr(tokamax, "find_spec", lambda name: None)
    name, why = choose.choose(stand_ins.backend(), BlockNeeds("bfloat16", 128, True, "causal"))
    assert name == "xla" and "tokamax cannot: it is not installed: pip install" in why


@pytest.mark.parametrize("name", ["auto", "xla"])
def test_on_the_cpu_there_is_nothing_to_say(name):
    for device in (jax.devices()[0], None):
        found = choose.choose(Backend(name, device), BlockNeeds("bfloat16", 128, True, "causal"))
        assert found == ("xla", "") and not choice_lines({"plain JAX: causal blocks": ""})


def test_what_the_user_reads():
    """Plain JAX on a GPU cannot be overlooked, and what to change is said."""

    def line(device, name="auto", **changes):
        needs = BlockNeeds(**{"dtype": "bfloat16", "head_dim": 128, "documents": True, "mask": "causal", **changes})
        found, why = choose.choose(Backend(name, device), needs)
        return "".join(choice_lines({f"{choose.NAMES[found]}: {needs}": why}))

    fast = "attention: tokamax: causal blocks with documents in bfloat16 (cuDNN cannot: documents)"
    assert line(stand_ins.H100) == fast
    fastest = "attention: cuDNN: causal blocks in bfloat16 (the fastest, by published times)"
    assert line(stand_ins.H100, documents=False) == fastest
    slow = line(stand_ins.A100)
    assert slow.startswith("attention: SLOW, in plain JAX: causal blocks with documents in bfloat16 (cuDNN cannot: doc")
    assert "set data.reset_attention_mask: false, if" in slow
    assert "set actor.model.cp_comm_type: a2a" in line(stand_ins.A100, documents=False, mask="shifted")
    both = line(stand_ins.H100, soft_cap=True, value_dim=64)
    assert both.startswith(
        "attention: tokamax: causal blocks with documents, a soft cap and values of size 64 in bfloat16"
    )
    slow = line(stand_ins.A100, soft_cap=True)
    assert "(cuDNN cannot: a soft cap; tokamax cannot: " in slow
    assert "; set " not in slow  # without documents cuDNN could not either
    named = line(stand_ins.H100, "xla")
    assert "SLOW, in plain JAX" in named and "(attention_backend: xla; set auto)" in named
