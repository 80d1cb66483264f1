"""One's own training loop, without jaxpar's engine: only its attention, in a `shard_map` that splits the sequence.

    python -m jaxpar.examples.own_loop 30

The mesh has two axes of one's own. "data" splits the rows, and "context" the sequence, whose tokens are put in zigzag order so
that every rank has the same work. The model learns to repeat the token that came eight tokens ago.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jaxpar.attention import attention, zigzag_order

VOCAB, WIDTH, HEADS, HEAD_DIM, SEQ, DISTANCE = 32, 64, 4, 16, 64, 8
Params = dict[str, jax.Array]


def init(key: jax.Array) -> Params:
    shapes: dict[str, Any] = {
        "embed": (VOCAB, WIDTH), "positions": (SEQ, WIDTH), "qkv": (3, WIDTH, HEADS, HEAD_DIM),
        "out": (HEADS, HEAD_DIM, WIDTH), "head": (WIDTH, VOCAB),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shape) * 0.1 for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def loss_sum(params: Params, tokens: jax.Array, targets: jax.Array, positions: jax.Array) -> jax.Array:
    """Sum of the losses of this device's tokens, [rows, part of the sequence]."""
    x = params["embed"][tokens] + params["positions"][positions]
    query, key, value = jnp.einsum("bse,iehd->ibshd", x, params["qkv"])
    attended = attention(query, key, value, axis="context", order="zigzag")
    x = x + jnp.einsum("bshd,hde->bse", attended, params["out"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], targets).sum()


def build_mesh(data: int, context: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: data * context]).reshape(data, context)
    return jax.sharding.Mesh(devices, ("data", "context"))


def build_step(mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation) -> Any:
    split = P("data", "context")

    def mean_loss(params: Params, *batch: jax.Array) -> jax.Array:
        total = jax.lax.psum(loss_sum(params, *batch), ("data", "context"))
        return total / (batch[0].size * mesh.size)

    on_mesh = jax.shard_map(mean_loss, mesh=mesh, in_specs=(P(), split, split, split), out_specs=P())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, opt_state: Any, *batch: jax.Array) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(on_mesh)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def batch(rng: np.random.Generator, rows: int, ranks: int) -> list[np.ndarray]:
    """Tokens, targets and positions, [rows, SEQ] each, in zigzag order."""
    tokens = rng.integers(0, VOCAB, (rows, SEQ))
    targets = np.roll(tokens, DISTANCE, 1)
    targets[:, :DISTANCE] = tokens[:, :DISTANCE]
    positions = np.broadcast_to(np.arange(SEQ), tokens.shape)
    return [x[:, zigzag_order(SEQ, ranks)] for x in (tokens, targets, positions)]


def train(steps: int, mesh: jax.sharding.Mesh) -> list[float]:
    rng, optimizer = np.random.default_rng(0), optax.adam(1e-2)
    params, losses = init(jax.random.key(0)), []
    opt_state, step = optimizer.init(params), build_step(mesh, optimizer)
    for _ in range(steps):
        params, opt_state, loss = step(params, opt_state, *batch(rng, 8, mesh.shape["context"]))
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # simulated devices, where there is no GPU
    print(*train(int(sys.argv[1]), build_mesh(2, jax.device_count() // 2)), sep="\n")
