"""The built-in decoder: Llama 3, Mistral, Qwen2.5 and Qwen3 (dense), chosen by the config.

Its tensor collectives are explicit: a gather of the sequence before the column-parallel products and a reduction after
the row-parallel ones, two of each in a layer. On one device they do nothing.

The name scopes are those of `RECOMPUTE_MODULES` in config/keys.py.

Einsum letters: b batch, s sequence, e embed, h heads (or kv heads), d head_dim, m mlp, v vocab.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpar.attention import attention
from jaxpar.config import Architecture, RopeScaling
from jaxpar.config.lora import Lora
from jaxpar.models.lora import add_adapters, column_parallel, row_parallel
from jaxpar.models.protocol import TokenInfo
from jaxpar.parallel.collectives import (
    WHOLE,
    VocabularyPart,
    gather_sequence,
    mask_padded_vocabulary,
    vocab_parallel_embedding,
)


class Decoder:
    """The built-in decoder as a `jaxpar.Model`.

    Args:
      architecture: sizes and switches, from `config.architecture()`.
      lora: adapters beside the matrices. None: none.
      tp_comm_overlap: with sequence parallelism, tensor collectives travel in pieces while other pieces are multiplied.
    """

    explicit_tensor_collectives = True

    def __init__(self, architecture: Architecture, lora: Lora | None = None, *, tp_comm_overlap: bool = False):
        self.architecture, self.lora, self.tp_comm_overlap = architecture, lora, tp_comm_overlap
        self.num_layers = architecture.num_hidden_layers

    def embed(self, rngs: nnx.Rngs) -> nnx.Module:
        return Embedding(self.architecture, rngs)

    def block(self, rngs: nnx.Rngs) -> nnx.Module:
        block = Block(self.architecture, rngs, overlap=self.tp_comm_overlap)
        if self.lora:  # last, so that the other weights are those of a model without adapters
            add_adapters([block.attention, block.mlp], self.lora, rngs)
        return block

    def head(self, rngs: nnx.Rngs) -> nnx.Module:
        return Head(self.architecture, rngs)


class Embedding(nnx.Module):
    """Token embedding; the vocabulary is split over the stages and the tensor group."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        self.table = _weight(arch, rngs, ("vocab", "embed"), (arch.padded_vocab_size, arch.hidden_size))

    def __call__(
        self, tokens: Int[Array, "b s"], info: TokenInfo, part: VocabularyPart = WHOLE
    ) -> Float[Array, "b s e"]:
        return vocab_parallel_embedding(self.table[...], tokens, part)


class Head(nnx.Module):
    """Final norm and LM head. With tied embeddings, the head's weight is the embedding's table."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        self.vocab_size = arch.vocab_size
        self.norm = RMSNorm(arch.hidden_size, "embed", arch.rms_norm_eps)
        self.tied = arch.tie_word_embeddings
        if not self.tied:
            self.weight = _weight(arch, rngs, ("embed", "vocab"), (arch.hidden_size, arch.padded_vocab_size))

    def __call__(
        self, x: Float[Array, "b s e"], embed: Embedding, part: VocabularyPart = WHOLE
    ) -> Float[Array, "b s v"]:
        x = gather_sequence(self.norm(x))
        weight = embed.table[...].T if self.tied else self.weight[...]
        return mask_padded_vocabulary(jnp.einsum("bse,ev->bsv", x, weight), self.vocab_size, part)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs, *, overlap: bool):
        self.attention_norm = RMSNorm(arch.hidden_size, "embed", arch.rms_norm_eps)
        self.attention = Attention(arch, rngs, overlap=overlap)
        self.mlp_norm = RMSNorm(arch.hidden_size, "embed", arch.rms_norm_eps)
        self.mlp = MLP(arch, rngs, overlap=overlap)

    def __call__(self, x: Float[Array, "b s e"], info: TokenInfo) -> Float[Array, "b s e"]:
        x = x + self.attention(self.attention_norm(x), info)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings, and qkv biases and query/key norms if the architecture has them."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs, *, overlap: bool):
        heads, kv_heads, head_dim = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
        self.arch, self.overlap = nnx.static(arch), overlap
        self.query = _weight(arch, rngs, ("embed", "heads", "head_dim"), (arch.hidden_size, heads, head_dim))
        self.key = _weight(arch, rngs, ("embed", "kv_heads", "head_dim"), (arch.hidden_size, kv_heads, head_dim))
        self.value = _weight(arch, rngs, ("embed", "kv_heads", "head_dim"), (arch.hidden_size, kv_heads, head_dim))
        self.output = _weight(
            arch, rngs, ("heads", "head_dim", "embed"), (heads, head_dim, arch.hidden_size), residual=True
        )
        if arch.attention_bias:
            self.query_bias = nnx.Param(jnp.zeros((heads, head_dim)), out_sharding=("heads", "head_dim"))
            self.key_bias = nnx.Param(jnp.zeros((kv_heads, head_dim)), out_sharding=("kv_heads", "head_dim"))
            self.value_bias = nnx.Param(jnp.zeros((kv_heads, head_dim)), out_sharding=("kv_heads", "head_dim"))
        if arch.qk_norm:
            self.query_norm = RMSNorm(head_dim, "head_dim", arch.rms_norm_eps)
            self.key_norm = RMSNorm(head_dim, "head_dim", arch.rms_norm_eps)

    def __call__(self, x: Float[Array, "b s e"], info: TokenInfo) -> Float[Array, "b s e"]:
        names = ["query", "key", "value"]
        with jax.named_scope("linear_qkv"):
            query, key, value = column_parallel(self, names, "bse,ehd->bshd", x, overlap=self.overlap)
        if self.arch.attention_bias:
            query, key, value = query + self.query_bias[...], key + self.key_bias[...], value + self.value_bias[...]
        if self.arch.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        angles = rope_angles(info.positions, self.arch.head_dim, self.arch.rope_theta, self.arch.rope_scaling)
        out = attention(
            rotate(query, angles), rotate(key, angles), value,
            segment_ids=info.segment_ids, window=self.arch.sliding_window,
        )  # fmt: skip
        with jax.named_scope("linear_proj"):
            return row_parallel(self, "output", "bshd,hde->bse", lambda x: x, out, overlap=self.overlap)


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202): down(silu(gate x) * up x)."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs, *, overlap: bool):
        wide, self.overlap = (arch.hidden_size, arch.intermediate_size), overlap
        self.gate = _weight(arch, rngs, ("embed", "mlp"), wide)
        self.up = _weight(arch, rngs, ("embed", "mlp"), wide)
        self.down = _weight(arch, rngs, ("mlp", "embed"), wide[::-1], residual=True)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "b s e"]) -> Float[Array, "b s e"]:
        gate, up = column_parallel(self, ["gate", "up"], "bse,em->bsm", x, overlap=self.overlap)
        return row_parallel(self, "down", "bsm,me->bse", swiglu, gate, up, overlap=self.overlap)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dimension, in float32 (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, dim: str, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)), out_sharding=(dim,))
        self.eps = eps

    @jax.named_scope("layernorm")
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...]


def rope_angles(
    positions: Int[Array, "b s"], head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[Array, "b s half_head_dim"]:
    """Rotary angles in radians, float32 (Su et al., 2021, arXiv:2104.09864).

    `scaling` is Llama 3.1's (arXiv:2407.21783): wavelengths beyond the original context are stretched by `factor`, short
    ones are kept, and those between are interpolated.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    return positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)


def rotate(x: Float[Array, "b s h d"], angles: Float[Array, "b s half_d"]) -> Float[Array, "b s h d"]:
    """Rotates the pairs (i, i + d/2) of each head, as Hugging Face's checkpoints need. In float32; returns x's dtype."""
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _weight(
    arch: Architecture, rngs: nnx.Rngs, dims: tuple[str, ...], shape: tuple[int, ...], residual: bool = False
) -> nnx.Param:
    """A weight with bell-shaped initial values of standard deviation initializer_range. Products that add to the residual
    stream are scaled down by sqrt(2 num_layers), as in GPT-2 and Megatron-LM.

    The values are sums of four uniforms (Irwin-Hall), at most 3.5 standard deviations. Additions give the same last bits
    however XLA splits and vectorizes them; the polynomial of `jax.random.normal` does not (seen on the CPU, jax 0.12).
    """
    uniforms = [jax.random.uniform(key, shape) for key in jax.random.split(rngs.params(), 4)]
    scale = arch.initializer_range / (math.sqrt(2 * arch.num_hidden_layers) if residual else 1)
    return nnx.Param((sum(uniforms[1:], uniforms[0]) - 2) * (scale * math.sqrt(3)), out_sharding=dims)
