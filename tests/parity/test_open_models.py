"""Users' models beyond a stack of like blocks: kinds of blocks, constants, Linen modules, auxiliary outputs, dropout.

The reference is plain Flax: each block is built by the user's own function and called by itself.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import QUICK, Step, assert_parity, make_batch, mesh_id, random_params, slow
from user_models import EMBED, HEAD_DIM, HEADS, MLP, VOCAB, Block, NormAndLogits, TokenAndPosition, named, normal, ones

import jaxpar
from jaxpar.attention import attention, reference_attention
from jaxpar.backward.recompute import Recompute
from jaxpar.models import FunctionalModel, TokenInfo

ALL = {"1f1b": 1, "gpipe": 1, "interleaved_1f1b": 2, "zb1p": 1}


class LocalBlock(nnx.Module):
    """A block with a window, constants of every sort, and auxiliary outputs."""

    def __init__(self, rngs, window, attend):
        self.block = Block(rngs, functools.partial(attend, window=window))
        self.freqs = jnp.arange(EMBED) / EMBED
        self.mask = np.linspace(0.5, 1, EMBED).astype(np.float32)
        self.shift = nnx.Variable(jnp.full(EMBED, 0.1))

    def __call__(self, x, info):
        x = self.block(x, info) + jnp.sin(self.freqs) * self.mask + self.shift[...]
        rows = jnp.square(info.mean_over_sequence(x)).mean(-1)
        return x, {"per_token": jnp.square(x).mean(-1), "per_row": rows}


class GlobalBlock(nnx.Module):
    """Another set of parameters. It sows one output, twice."""

    def __init__(self, rngs, layer, attend):
        self.block = Block(rngs, attend)
        self.gate = nnx.Linear(EMBED, EMBED, use_bias=False, kernel_init=named(normal, ("embed", None)), rngs=rngs)

    def __call__(self, x, info):
        gated = nnx.sigmoid(self.gate(x))
        for _ in range(2):
            self.sow(nnx.Intermediate, "per_token", gated.mean(-1))
        return self.block(x, info) * gated


def kinds(attend=attention, num_layers=7):
    """Two local blocks and a global one, and so on; the last repetition has one block."""

    def block(rngs, layer):
        return GlobalBlock(rngs, layer, attend) if layer % 3 == 2 else LocalBlock(rngs, 4 + layer % 3, attend)

    weights = {"per_token": 0.02, "per_row": 0.3}
    return jaxpar.Stack(TokenAndPosition, block, NormAndLogits, num_layers, auxiliary=weights)


class LinenEmbed(nn.Module):
    @nn.compact
    def __call__(self, tokens, info):
        x = nn.Embed(VOCAB, EMBED, embedding_init=normal, name="wte")(tokens)
        return x + nn.Embed(64, EMBED, embedding_init=normal, name="wpe")(info.positions)


class LinenBlock(nn.Module):
    attend: Any = attention
    window: int | None = None
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, info):
        y = nn.LayerNorm(name="norm", scale_init=ones)(x)
        q, k, v = (nn.DenseGeneral((HEADS, HEAD_DIM), kernel_init=normal, name=n, use_bias=n != "k")(y) for n in "qkv")
        y = self.attend(q, k, v, segment_ids=info.segment_ids, window=self.window)
        y = nn.DenseGeneral(EMBED, axis=(-2, -1), name="out", kernel_init=normal, use_bias=False)(y)
        x = x + nn.Dropout(self.rate, deterministic=not info.train)(y)
        scale = self.variable("constants", "scale", lambda: jnp.float32(0.5)).value
        y = nn.gelu(nn.Dense(MLP, name="up", kernel_init=normal, use_bias=False)(x)) * scale
        self.sow("losses", "size", jnp.square(y).mean(-1))
        return x + nn.Dense(EMBED, name="down", kernel_init=normal, use_bias=False)(y)


LINEN_DIMS = {
    "*wte/embedding": ("vocab", "embed"), "*wpe/embedding": (None, "embed"), "*/norm/*": ("embed",),
    "*/[qkv]/kernel": ("embed", "heads", "head_dim"), "*/[qkv]/bias": ("heads", "head_dim"),
    "*/out/kernel": ("heads", "head_dim", "embed"), "*/up/kernel": ("embed", "mlp"), "*/down/kernel": ("mlp", "embed"),
    "head/kernel": ("embed", "vocab"),
}  # fmt: skip


class LinenHead(nn.Module):
    @nn.compact
    def __call__(self, x, embed):
        return x @ self.param("kernel", normal, (EMBED, VOCAB))


def linen_stack(attend=attention, rate=0.0, num_layers=4):
    blocks = [LinenBlock(attend, 4, rate), LinenBlock(attend, None, rate)]
    return jaxpar.Stack(LinenEmbed(), blocks, LinenHead(), num_layers, dims=LINEN_DIMS, auxiliary={"size": 0.1})


def plain_block(model, params, layer, x, info):
    """(activations, auxiliary) of one block, as Flax computes it."""
    with nnx.use_eager_sharding(False):
        module = model.block(nnx.Rngs(0), layer)
    if isinstance(module, nn.Module):
        constants = {"constants": {"scale": jnp.float32(0.5)}}
        x, more = module.apply({"params": params, **constants}, x, info, mutable=["losses"])
        return x, {name: sum(values) for name, values in more["losses"].items()}
    nnx.update(module, nnx.State(params))
    x = module(x, info)
    sown = nnx.to_pure_dict(nnx.state(module, nnx.Intermediate))
    x, returned = x if isinstance(x, tuple) else (x, {})
    return x, returned | {name: sum(values) for name, values in sown.items()}


def plain_loss(model, functional, params, batch):
    info = TokenInfo(batch["positions"], batch["segment_ids"])
    x, weights, total = (
        functional.embed(params, batch["tokens"], info),
        batch["loss_mask"] / batch["loss_mask"].sum(),
        0.0,
    )
    period = functional.period
    for layer in range(model.num_layers):
        own = params["layers"][str(layer % period)] if period > 1 else params["layers"]
        own = jax.tree.map(lambda p, i=layer // period: p[i], own)
        x, auxiliary = plain_block(model, own, layer, x, info)
        for name, value in auxiliary.items():
            value = value if value.ndim == 2 else value[:, None]
            total += model.auxiliary[name] * (weights * value).sum()
    losses = optax.softmax_cross_entropy_with_integer_labels(functional.head(params, x), batch["targets"])
    return (losses * weights).sum() + total


@functools.cache
def case(build):
    model, plain = FunctionalModel(build()), build(reference_attention)
    params, batch, functional = random_params(model), make_batch(), FunctionalModel(plain)
    step = jax.jit(jax.value_and_grad(lambda p: plain_loss(plain, functional, p, batch)), compiler_options=QUICK)
    return model, params, batch, jax.tree.map(np.asarray, step(params))


def check(build, sizes, **options):
    model, params, batch, expected = case(build)
    assert_parity(*Step(model, sizes, **options)(params, batch), *expected)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 2, 1, 2, 2), {}),
        *slow(
            ((1, 3, 2, 1, 1), {"schedule": "zb1p", "zero_stage": 2}),
            ((1, 1, 1, 1, 1), {"recompute": Recompute("full", "uniform", 2)}),
            ((1, 1, 2, 1, 4), {"zero_stage": 3}),
            ((2, 1, 1, 1, 1), {"zero_stage": 0, "schedule": "gpipe"}),
            ((2, 2, 2, 1, 1), {"zero_stage": 3, "schedule": "zb1p", "recompute": Recompute("selective")}),
        ),
    ],
)
def test_kinds_of_blocks(sizes, options):
    assert case(kinds)[0].period == 3 and case(kinds)[0].num_layers == 3
    check(kinds, sizes, **options)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2, 2), *slow((1, 2, 2, 1, 2), (1, 1, 1, 1, 1))], ids=mesh_id)
def test_linen_modules_with_dimensions_by_path(sizes):
    assert case(linen_stack)[0].period == 2
    check(linen_stack, sizes)


def dropout_stack():
    return linen_stack(rate=0.1, num_layers=8)  # four repetitions, one for each chunk


class DropoutBlock(nnx.Module):
    """Dropout of both sorts: with the module's own stream, and with `info.rngs`."""

    def __init__(self, rngs):
        self.block = Block(rngs)
        self.own, self.given = nnx.Dropout(0.1, rngs=rngs), nnx.Dropout(0.1, broadcast_dims=(1,))

    def __call__(self, x, info):
        return x + self.own(self.block(x, info)) + self.given(x, rngs=info.rngs)


class DropoutEmbedding(nnx.Module):
    def __init__(self, rngs):
        self.embedding, self.dropout = TokenAndPosition(rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, tokens, info):
        return self.dropout(self.embedding(tokens, info))


class Head(nnx.Module):
    def __init__(self, rngs):
        self.logits = nnx.Linear(EMBED, VOCAB, use_bias=False, kernel_init=named(normal, ("embed", "vocab")), rngs=rngs)

    def __call__(self, x, embed):
        return self.logits(x)


def nnx_dropout_stack():
    return jaxpar.Stack(DropoutEmbedding, DropoutBlock, Head, 4)


SEED = np.array([3, 7], np.uint32)


@functools.cache
def on_one_device(build):
    model = FunctionalModel(build())
    params, batch = random_params(model), make_batch()
    step = Step(model, (1, 1, 1, 1, 1))
    return model, params, batch, step(params, batch, SEED)


ZB1P = {"schedule": "zb1p", "recompute": Recompute("full", "uniform", 1)}
GPIPE = {"schedule": "gpipe", "recompute": Recompute("full", "uniform", 2)}
CHUNKS = {"schedule": "interleaved_1f1b", "num_chunks": 2, "zero_stage": 3}


@pytest.mark.parametrize(
    ("build", "sizes", "options"),
    [
        (nnx_dropout_stack, (1, 2, 2, 1, 1), ZB1P),
        *slow(
            (dropout_stack, (2, 2, 1, 2, 2), {}),
            (dropout_stack, (1, 2, 2, 1, 1), ZB1P),
            (nnx_dropout_stack, (2, 2, 1, 2, 2), {}),
            *((build, (1, 1, 1, 1, 4), GPIPE) for build in (dropout_stack, nnx_dropout_stack)),
            *((build, (2, 2, 1, 1, 1), CHUNKS) for build in (dropout_stack, nnx_dropout_stack)),
        ),
    ],
)
def test_dropout_is_the_same_on_every_layout(build, sizes, options):
    model, params, batch, expected = on_one_device(build)
    loss, grads = Step(model, sizes, **options)(params, batch, SEED)
    assert_parity(loss, grads, *expected)


def test_dropout_depends_on_the_seed_and_is_off_in_an_evaluation():
    model, params, batch, (loss, _) = on_one_device(nnx_dropout_stack)
    step = Step(model, (1, 1, 1, 1, 1))
    assert abs(step(params, batch, SEED + 1)[0] - loss) > 1e-4
    evaluated = step.evaluate(params, batch)
    without = Step(FunctionalModel(jaxpar.Stack(TokenAndPosition, TwiceBlock, Head, 4)), (1, 1, 1, 1, 1))
    bare = {**params, "embed": params["embed"]["embedding"]}
    np.testing.assert_allclose(evaluated["loss"], without.evaluate(bare, batch)["loss"], rtol=1e-5)


class TwiceBlock(nnx.Module):
    """`DropoutBlock` without dropout."""

    def __init__(self, rngs):
        self.block = Block(rngs)

    def __call__(self, x, info):
        return x + self.block(x, info) + x
