"""A stack like Gemma 2's (arXiv:2408.00118) in nnx: blocks with a window and blocks without take turns, scores and logits
have a soft cap, and there is a norm before and after each part.

    jaxpar train configs/quickstart.yaml --model jaxpar.examples.gemma:build
    python -m jaxpar.examples.gemma runner.max_steps=50

A block's function takes the layer's index. Five layers: the pattern of two is repeated, and the last repetition is cut short.
"""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpar
from jaxpar.attention import attention

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS, WINDOW = 258, 64, 4, 2, 32, 128, 5, 16
normal = nnx.initializers.normal(0.02)


def weight(rngs: nnx.Rngs, *dims_and_sizes: tuple[str, int]) -> nnx.Param:
    dims, sizes = zip(*dims_and_sizes, strict=True)
    return nnx.Param(normal(rngs.params(), sizes), out_sharding=dims)


def norm(rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(WIDTH, scale_init=nnx.with_partitioning(nnx.initializers.ones, ("embed",)), rngs=rngs)


def rotated(x: jax.Array, positions: jax.Array, freqs: jax.Array) -> jax.Array:
    angle = positions[..., None, None] * freqs
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class Embedding(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.table = weight(rngs, ("vocab", VOCAB), ("embed", WIDTH))

    def __call__(self, tokens: jax.Array, info: jaxpar.TokenInfo) -> jax.Array:
        return self.table[...][tokens] * WIDTH**0.5


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, layer: int):
        embed, head_dim = ("embed", WIDTH), ("head_dim", HEAD_DIM)
        self.window = WINDOW if layer % 2 == 0 else None
        self.query = weight(rngs, embed, ("heads", HEADS), head_dim)
        self.key, self.value = (weight(rngs, embed, ("kv_heads", KV_HEADS), head_dim) for _ in range(2))
        self.out = weight(rngs, ("heads", HEADS), head_dim, embed)
        self.gate, self.up = (weight(rngs, embed, ("mlp", MLP)) for _ in range(2))
        self.down = weight(rngs, ("mlp", MLP), embed)
        self.norms = nnx.List([norm(rngs) for _ in range(4)])
        self.freqs = 10_000.0 ** -(jnp.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))  # a constant

    def __call__(self, x: jax.Array, info: jaxpar.TokenInfo) -> jax.Array:
        before, after, before_mlp, after_mlp = self.norms
        y = before(x)
        query, key = (jnp.einsum("bse,ehd->bshd", y, w[...]) for w in (self.query, self.key))
        query, key = (rotated(a, info.positions, self.freqs) for a in (query, key))
        value = jnp.einsum("bse,ehd->bshd", y, self.value[...])
        y = attention(query, key, value, segment_ids=info.segment_ids, window=self.window, soft_cap=50.0)
        x = x + after(jnp.einsum("bshd,hde->bse", y, self.out[...]))
        y = before_mlp(x)
        return x + after_mlp((nnx.gelu(y @ self.gate[...]) * (y @ self.up[...])) @ self.down[...])


class Head(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = norm(rngs)

    def __call__(self, x: jax.Array, embedding: Embedding) -> jax.Array:
        return 30.0 * jnp.tanh(self.norm(x) @ embedding.table[...].T / 30.0)


def build() -> jaxpar.Stack:
    return jaxpar.Stack(Embedding, Block, Head, LAYERS)


if __name__ == "__main__":
    config = jaxpar.load_config("configs/quickstart.yaml", ["runner.experiment_name=gemma", *sys.argv[1:]])
    jaxpar.Trainer(config, build()).fit()
