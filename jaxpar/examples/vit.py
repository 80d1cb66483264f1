"""A vision transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) in nnx: one whole module, and no language model.

    python -m jaxpar.examples.vit 30

A "token" is a patch of an image; the first one is the class token, and the only one with a loss. The patches come in the batch,
as an additional array. A whole module is split over dp, tp, sp and cp, but not over pp. The images are made here: a bright spot
in one of four corners, which is the class.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxpar
from jaxpar.attention import attention

CLASSES, PATCHES, PATCH, WIDTH, HEADS, HEAD_DIM, MLP, LAYERS = 4, 16, 12, 64, 4, 16, 128, 2
normal = nnx.initializers.normal(0.05)


def weight(rngs: nnx.Rngs, *dims_and_sizes: tuple[str | None, int]) -> nnx.Param:
    dims, sizes = zip(*dims_and_sizes, strict=True)
    return nnx.Param(normal(rngs.params(), sizes), out_sharding=dims)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.qkv = weight(rngs, (None, 3), ("embed", WIDTH), ("heads", HEADS), ("head_dim", HEAD_DIM))
        self.out = weight(rngs, ("heads", HEADS), ("head_dim", HEAD_DIM), ("embed", WIDTH))
        self.up, self.down = weight(rngs, ("embed", WIDTH), ("mlp", MLP)), weight(rngs, ("mlp", MLP), ("embed", WIDTH))
        scale = nnx.with_partitioning(nnx.initializers.ones, ("embed",))
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, scale_init=scale, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = jnp.einsum("bse,iehd->ibshd", self.norms[0](x), self.qkv[...])
        x = x + jnp.einsum("bshd,hde->bse", attention(query, key, value, causal=False), self.out[...])
        return x + nnx.gelu(self.norms[1](x) @ self.up[...]) @ self.down[...]


class ViT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.patches = weight(rngs, (None, PATCH), ("embed", WIDTH))
        self.positions = weight(rngs, (None, PATCHES), ("embed", WIDTH))
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.classes = weight(rngs, ("embed", WIDTH), ("vocab", CLASSES))

    def __call__(self, tokens: jax.Array, info: jaxpar.TokenInfo) -> jax.Array:
        x = info.inputs["patches"] @ self.patches[...] + self.positions[...][info.positions]
        for layer in self.layers:
            x = layer(x)
        return x @ self.classes[...]  # [batch, seq, CLASSES]


def build() -> jaxpar.Whole:
    return jaxpar.Whole(ViT, inputs={"patches": jax.ShapeDtypeStruct((PATCH,), jnp.float32)})


def images(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
    """A batch: class token first, then 15 patches."""
    labels, patches = rng.integers(0, CLASSES, number), rng.normal(size=(number, PATCHES, PATCH)).astype(np.float32)
    patches[:, 0] = 0
    patches[np.arange(number), 1 + labels * 4] += 6
    tokens = np.zeros((number, PATCHES), np.int32)
    is_class_token = np.arange(PATCHES) == 0
    targets, mask = np.where(is_class_token, labels[:, None], 0), np.broadcast_to(is_class_token, tokens.shape)
    return {"tokens": tokens, "targets": targets, "loss_mask": mask, "patches": patches}


def config(**sizes: Any) -> jaxpar.Config:
    return jaxpar.config_from_dict({
        "cluster": {"num_gpus_per_node": 8},
        "runner": {"seq_length": PATCHES, "max_steps": 1000},
        "data": {"reset_attention_mask": False},  # an image is a row
        "actor": {"micro_batch_size": 4, "global_batch_size": 32, "optim": {"lr": 3e-3},
                  "model": {"precision": "fp32", **sizes}},
    })  # fmt: skip


if __name__ == "__main__":
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    trainer, rng = jaxpar.Trainer(config(**sizes), build()), np.random.default_rng(0)
    for step in range(int(sys.argv[1])):
        print(step, float(trainer.train_step(images(rng, 32))["loss"]))
