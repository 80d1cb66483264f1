"""The state of a training run and the one XLA program that advances it by a step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpar.models.protocol import FunctionalModel

State = dict[str, Any]  # "step" int32, "params" and "opt_state" float32, "rng" uint32 key data
Metrics = dict[str, jax.Array]


def state_shardings(
    model: FunctionalModel, optimizer: optax.GradientTransformation, layouts: Any, mesh: Mesh
) -> tuple[State, State]:
    """Shapes and shardings of the whole state: moments lie like their parameters, scalars on every device."""
    everywhere = NamedSharding(mesh, P())
    params = jax.tree.map(lambda layout: NamedSharding(mesh, layout.rest_spec), layouts)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes["opt_state"],
        params,
        transform_non_params=lambda _: everywhere,
    )
    return shapes, {"step": everywhere, "params": params, "opt_state": opt_state, "rng": everywhere}


def init_state(model: FunctionalModel, optimizer: optax.GradientTransformation, seed: int, params: Any = None) -> State:
    """State before the first step. New parameters (`params` None) depend on the seed alone, not on the mesh."""
    params = model.init(seed) if params is None else params
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(params),
        "rng": jax.random.key_data(jax.random.key(seed)),
    }


def build_train_step(
    loss_and_grads: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, Any]],
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
) -> Callable[[State, Mapping[str, jax.Array]], tuple[State, Metrics]]:
    """Returns (state, batch) → (state, metrics), for `jax.jit`.

    Metrics, all float32 scalars: `loss` (nats a token), `grad_norm` (global, before clipping; each parameter counts
    once), `learning_rate`, `tokens` (valid ones in the global batch).
    """

    def train_step(state: State, batch: Mapping[str, jax.Array]) -> tuple[State, Metrics]:
        loss, grads = loss_and_grads(state["params"], batch)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(learning_rate(state["step"]), jnp.float32),
            "tokens": batch["loss_mask"].sum(),
        }
        params = optax.apply_updates(state["params"], updates)
        return {**state, "step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return train_step
