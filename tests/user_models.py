"""Models as a user of jaxpar writes them: plain Flax with dimension names; only `attention` comes from jaxpar."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from jaxpar.attention import attention as ring_attention
from jaxpar.models import TokenInfo

EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, CONTEXT = 64, 8, 4, 8, 96, 256, 64

normal, ones, zeros = nnx.initializers.normal(0.1), nnx.initializers.ones, nnx.initializers.zeros
named = nnx.with_partitioning


class TokenAndPosition(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(VOCAB, EMBED, embedding_init=named(normal, ("vocab", "embed")), rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, EMBED, embedding_init=named(normal, (None, "embed")), rngs=rngs)

    def __call__(self, tokens, info):
        return self.tokens(tokens) + self.positions(info.positions)


class Block(nnx.Module):
    """A GPT block: layer norm with bias, grouped-query attention, GELU."""

    def __init__(self, rngs: nnx.Rngs, attention: Any = ring_attention):
        norm = dict(scale_init=named(ones, ("embed",)), bias_init=named(zeros, ("embed",)), rngs=rngs)
        self.norm1, self.norm2 = nnx.LayerNorm(EMBED, **norm), nnx.LayerNorm(EMBED, **norm)
        self.query, self.key, self.value = (
            nnx.LinearGeneral(EMBED, (heads, HEAD_DIM), kernel_init=named(normal, ("embed", dim, "head_dim")),
                              bias_init=named(zeros, (dim, "head_dim")), use_bias=bias, rngs=rngs)
            # Without rotary embedding, a key bias adds the same to all scores of a query and would have no gradient.
            for dim, heads, bias in (("heads", HEADS, True), ("kv_heads", KV_HEADS, False), ("kv_heads", KV_HEADS, True))
        )  # fmt: skip
        self.out = nnx.LinearGeneral((HEADS, HEAD_DIM), EMBED, axis=(-2, -1), use_bias=False, rngs=rngs,
                                     kernel_init=named(normal, ("heads", "head_dim", "embed")))  # fmt: skip
        self.up = nnx.Linear(EMBED, MLP, kernel_init=named(normal, ("embed", "mlp")), rngs=rngs,
                             bias_init=named(zeros, ("mlp",)))  # fmt: skip
        self.down = nnx.Linear(MLP, EMBED, kernel_init=named(normal, ("mlp", "embed")), rngs=rngs,
                               bias_init=named(zeros, ("embed",)))  # fmt: skip
        self.attention = nnx.static(attention)

    def __call__(self, x, info):
        y = self.norm1(x)
        y = self.attention(self.query(y), self.key(y), self.value(y), segment_ids=info.segment_ids)
        x = x + self.out(y)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NormAndLogits(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(EMBED, scale_init=named(ones, ("embed",)), rngs=rngs)
        self.logits = nnx.Linear(EMBED, VOCAB, use_bias=False, kernel_init=named(normal, ("embed", "vocab")), rngs=rngs)

    def __call__(self, x, embed):
        return self.logits(self.norm(x)) + embed.tokens.attend(x)


class GPT:
    """A `jaxpar.Model`: a stack of blocks."""

    num_layers = 4

    def __init__(self, attention: Any = ring_attention):
        self.attention = attention

    def embed(self, rngs):
        return TokenAndPosition(rngs)

    def block(self, rngs):
        return Block(rngs, self.attention)

    def head(self, rngs):
        return NormAndLogits(rngs)


class LinenBlock(nn.Module):
    attention: Any = ring_attention

    @nn.compact
    def __call__(self, x, info):
        y = nn.LayerNorm(scale_init=nn.with_logical_partitioning(ones, ("embed",)), use_bias=False)(x)
        query, key, value = (
            nn.DenseGeneral((heads, HEAD_DIM), use_bias=False, name=name,
                            kernel_init=nn.with_logical_partitioning(normal, ("embed", dim, "head_dim")))(y)
            for name, dim, heads in (("q", "heads", HEADS), ("k", "kv_heads", KV_HEADS), ("v", "kv_heads", KV_HEADS))
        )  # fmt: skip
        y = self.attention(query, key, value, segment_ids=info.segment_ids)
        x = x + nn.DenseGeneral(EMBED, axis=(-2, -1), use_bias=False, name="out",
                                kernel_init=nn.with_logical_partitioning(normal, ("heads", "head_dim", "embed")))(y)  # fmt: skip
        y = nn.Dense(MLP, kernel_init=nn.with_logical_partitioning(normal, ("embed", "mlp")), name="up",
                     bias_init=nn.with_logical_partitioning(zeros, ("mlp",)))(x)  # fmt: skip
        return x + nn.Dense(EMBED, use_bias=False, kernel_init=nn.with_logical_partitioning(normal, ("mlp", "embed")),
                            name="down")(nn.gelu(y))  # fmt: skip


class LinenGPT(GPT):
    """The same stack with Linen blocks, through the bridge."""

    def block(self, rngs):
        tokens = jnp.zeros((1, 8), jnp.int32)
        block = nnx.bridge.ToNNX(LinenBlock(self.attention), rngs=rngs)
        return block.lazy_init(jnp.zeros((1, 8, EMBED)), TokenInfo(tokens, tokens))


class NoStack(nnx.Module):
    """Two different layers. Without a stack of equal blocks, it cannot be divided into stages."""

    def __init__(self, rngs: nnx.Rngs, attention: Any = ring_attention):
        self.embed, self.head = TokenAndPosition(rngs), NormAndLogits(rngs)
        self.block = Block(rngs, attention)
        self.gate = nnx.Linear(EMBED, MLP, use_bias=False, kernel_init=named(normal, ("embed", "mlp")), rngs=rngs)
        self.mix = nnx.Linear(MLP, EMBED, use_bias=False, kernel_init=named(normal, ("mlp", "embed")), rngs=rngs)

    def __call__(self, tokens, info):
        x = self.block(self.embed(tokens, info), info)
        return self.head(x + self.mix(nnx.sigmoid(self.gate(x))), self.embed)
