"""GPT-2 (Radford et al., 2019) in Flax Linen, with dropout and tied embeddings.

    jaxpar train configs/quickstart.yaml --model jaxpar.examples.gpt2:build
    python -m jaxpar.examples.gpt2 runner.max_steps=50

Nothing in the modules is jaxpar's but the call of `attention` and what `info` tells. The names of dimensions are given by path.
"""

import sys
from typing import Any

import flax.linen as nn
import jax

import jaxpar
from jaxpar.attention import attention

VOCAB, WIDTH, HEADS, LAYERS, CONTEXT, DROPOUT = 258, 64, 4, 4, 1024, 0.1
normal = nn.initializers.normal(0.02)


class Embedding(nn.Module):
    def setup(self) -> None:
        self.wte = nn.Embed(VOCAB, WIDTH, embedding_init=normal)
        self.wpe = nn.Embed(CONTEXT, WIDTH, embedding_init=normal)
        self.dropout = nn.Dropout(DROPOUT)

    def __call__(self, tokens: jax.Array, info: jaxpar.TokenInfo) -> jax.Array:
        return self.dropout(self.wte(tokens) + self.wpe(info.positions), deterministic=not info.train)

    def attend(self, x: jax.Array) -> jax.Array:
        return self.wte.attend(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, info: jaxpar.TokenInfo) -> jax.Array:
        dropout = nn.Dropout(DROPOUT, deterministic=not info.train)
        y = nn.LayerNorm(name="ln_1")(x)
        query, key, value = (  # a bias of the keys would change nothing: it adds the same to all scores of a query
            nn.DenseGeneral((HEADS, WIDTH // HEADS), kernel_init=normal, use_bias=name != "k", name=name)(y)
            for name in ("q", "k", "v")
        )
        y = attention(query, key, value, segment_ids=info.segment_ids)
        x = x + dropout(nn.DenseGeneral(WIDTH, axis=(-2, -1), kernel_init=normal, name="out")(y))
        y = nn.Dense(4 * WIDTH, kernel_init=normal, name="fc")(nn.LayerNorm(name="ln_2")(x))
        return x + dropout(nn.Dense(WIDTH, kernel_init=normal, name="proj")(nn.gelu(y)))


class Head(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, embedding: Any) -> jax.Array:
        return embedding.attend(nn.LayerNorm(name="ln_f")(x))


DIMS = {
    "*/wte/embedding": ("vocab", "embed"), "*/wpe/embedding": (None, "embed"), "*/ln_?/*": ("embed",),
    "*/[qkv]/kernel": ("embed", "heads", "head_dim"), "*/[qkv]/bias": ("heads", "head_dim"),
    "*/out/kernel": ("heads", "head_dim", "embed"), "*/out/bias": ("embed",),
    "*/fc/kernel": ("embed", "mlp"), "*/fc/bias": ("mlp",), "*/proj/kernel": ("mlp", "embed"), "*/proj/bias": ("embed",),
}  # fmt: skip


def build() -> jaxpar.Stack:
    return jaxpar.Stack(Embedding(), Block(), Head(), LAYERS, dims=DIMS)


if __name__ == "__main__":
    config = jaxpar.load_config("configs/quickstart.yaml", ["runner.experiment_name=gpt2", *sys.argv[1:]])
    jaxpar.Trainer(config, build()).fit()
