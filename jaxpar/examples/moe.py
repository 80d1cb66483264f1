"""A small mixture of experts in nnx, with dense dispatch and two auxiliary losses.

    jaxpar train configs/quickstart.yaml --model jaxpar.examples.moe:build
    python -m jaxpar.examples.moe runner.max_steps=50

Each token uses the two experts that its router likes best. All experts compute all tokens here, which is simple and costs
NUM / 2 times the work. The losses keep the experts busy alike (Switch Transformer, arXiv:2101.03961, equation 4, for each row)
and the router's logits small (ST-MoE, arXiv:2202.08906, equation 5). A block returns them beside its activations.
"""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpar
from jaxpar.attention import attention

VOCAB, WIDTH, HEADS, HEAD_DIM, MLP, LAYERS, NUM, USED = 258, 64, 4, 16, 64, 4, 4, 2
normal = nnx.initializers.normal(0.02)


def weight(rngs: nnx.Rngs, *dims_and_sizes: tuple[str | None, int]) -> nnx.Param:
    dims, sizes = zip(*dims_and_sizes, strict=True)
    return nnx.Param(normal(rngs.params(), sizes), out_sharding=dims)


class Embedding(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.table = weight(rngs, ("vocab", VOCAB), ("embed", WIDTH))
        self.positions = weight(rngs, (None, 1024), ("embed", WIDTH))

    def __call__(self, tokens: jax.Array, info: jaxpar.TokenInfo) -> jax.Array:
        return self.table[...][tokens] + self.positions[...][info.positions]


class Experts(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.router = weight(rngs, ("embed", WIDTH), (None, NUM))
        self.up = weight(rngs, (None, NUM), ("embed", WIDTH), ("mlp", MLP))
        self.down = weight(rngs, (None, NUM), ("mlp", MLP), ("embed", WIDTH))

    def __call__(self, x: jax.Array, info: jaxpar.TokenInfo) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = (x @ self.router[...]).astype(jnp.float32)
        probs = jax.nn.softmax(logits)  # [batch, seq, NUM]
        lowest = jax.lax.top_k(probs, USED)[0][..., -1:]
        is_used = probs >= lowest
        weights = jnp.where(is_used, probs, 0)
        weights = (weights / weights.sum(-1, keepdims=True)).astype(x.dtype)
        hidden = nnx.gelu(jnp.einsum("bse,nem->bsnm", x, self.up[...])) * weights[..., None]
        output = jnp.einsum("bsnm,nme->bse", hidden, self.down[...])
        # Means over a row need the tokens of all cp ranks.
        share = info.mean_over_sequence(is_used.astype(jnp.float32)) / USED
        balance = NUM * (share * info.mean_over_sequence(probs)).sum(-1)  # [batch]
        return output, {"balance": balance, "router_z": jnp.square(jax.nn.logsumexp(logits, -1))}


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.qkv = weight(rngs, (None, 3), ("embed", WIDTH), ("heads", HEADS), ("head_dim", HEAD_DIM))
        self.out = weight(rngs, ("heads", HEADS), ("head_dim", HEAD_DIM), ("embed", WIDTH))
        scale = nnx.with_partitioning(nnx.initializers.ones, ("embed",))
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, scale_init=scale, rngs=rngs) for _ in range(2)])
        self.experts = Experts(rngs)

    def __call__(self, x: jax.Array, info: jaxpar.TokenInfo) -> tuple[jax.Array, dict[str, jax.Array]]:
        query, key, value = jnp.einsum("bse,iehd->ibshd", self.norms[0](x), self.qkv[...])
        y = attention(query, key, value, segment_ids=info.segment_ids)
        x = x + jnp.einsum("bshd,hde->bse", y, self.out[...])
        y, auxiliary = self.experts(self.norms[1](x), info)
        return x + y, auxiliary


class Head(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.weight = weight(rngs, ("embed", WIDTH), ("vocab", VOCAB))

    def __call__(self, x: jax.Array, embedding: Embedding) -> jax.Array:
        return x @ self.weight[...]


def build() -> jaxpar.Stack:
    return jaxpar.Stack(Embedding, Block, Head, LAYERS, auxiliary={"balance": 0.01, "router_z": 0.001})


if __name__ == "__main__":
    config = jaxpar.load_config("configs/quickstart.yaml", ["runner.experiment_name=moe", *sys.argv[1:]])
    jaxpar.Trainer(config, build()).fit()
