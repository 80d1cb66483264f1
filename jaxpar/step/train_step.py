"""The state of a training run, and the step that advances it: one XLA program."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpar.models import FunctionalModel
from jaxpar.parallel.collectives import DEVICE, put_in
from jaxpar.parallel.trained import merge, partition, trained_layouts
from jaxpar.step.loss_scale import DynamicLossScale
from jaxpar.step.opt_state import num_updates, opt_state_specs

# "step" int32, "params" and "opt_state" float32, "rng" uint32 key data, and "loss_scale" if it is dynamic. Frozen "params"
# have the dtype of their layout, and "opt_state" has None for them.
State = dict[str, Any]
LossScale = float | DynamicLossScale | None
Metrics = dict[str, jax.Array]


def state_shardings(
    model: FunctionalModel,
    optimizer: optax.GradientTransformation,
    param_layouts: Any,
    mesh: Mesh,
    loss_scale: LossScale = None,
    *,
    offload: bool = False,
) -> tuple[State, State]:
    """Shapes and shardings of the whole state. Moments lie like their parameters, and scalars on every device
    (`jaxpar.step.opt_state`).

    Args:
      offload: keep the moments in the host's pinned memory.
    """
    everywhere = NamedSharding(mesh, P())
    params = jax.tree.map(lambda layout: NamedSharding(mesh, layout.rest_spec), param_layouts)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, 0, loss_scale=loss_scale, param_layouts=param_layouts))
    opt_state = jax.tree.map(
        lambda leaf, spec: (
            _in_host_memory(NamedSharding(mesh, spec)) if offload and leaf.ndim else NamedSharding(mesh, spec)
        ),
        shapes["opt_state"],
        opt_state_specs(shapes["opt_state"], trained_layouts(param_layouts)),
    )
    shardings = jax.tree.map(lambda _: everywhere, shapes)
    return shapes, {**shardings, "params": params, "opt_state": opt_state}


def _in_host_memory(sharding: NamedSharding) -> NamedSharding:
    found = sharding.with_memory_kind("pinned_host")
    # Compile-only devices have no memories, and jax drops the kind. For an abstract mesh it keeps it.
    abstract = sharding.mesh.abstract_mesh
    return found if found.memory_kind else NamedSharding(abstract, sharding.spec, memory_kind="pinned_host")


def init_state(
    model: FunctionalModel,
    optimizer: optax.GradientTransformation,
    seed: int,
    params: Any = None,
    loss_scale: LossScale = None,
    *,
    param_layouts: Any = None,
) -> State:
    """The state before the first step.

    Args:
      params: parameters to start from. None, or a tree with None in some places: the others are new ones, which depend on the
        seed alone and not on the mesh.
      param_layouts: tree of `ParamLayout`, which says what is frozen. None: nothing.
    """
    new = model.init(seed)
    params = new if params is None else merge(params, new)
    trained = params
    if param_layouts is not None:
        params = jax.tree.map(lambda x, layout: x.astype(layout.dtype), params, param_layouts)
        trained = partition(params, trained_layouts(param_layouts))[0]
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(trained),
        "rng": jax.random.key_data(jax.random.key(seed)),
    }
    return {**state, "loss_scale": loss_scale.init()} if isinstance(loss_scale, DynamicLossScale) else state


def build_train_step(
    loss_metrics_and_grads: Callable[..., tuple[jax.Array, dict[str, jax.Array], Any]],
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule | None,
    loss_scale: LossScale = None,
    *,
    offload: bool = False,
) -> Callable[[State, Mapping[str, jax.Array]], tuple[State, Metrics]]:
    """Returns (state, batch) → (state, metrics), for `jax.jit`.

    Args:
      optimizer: if it takes extra arguments, it gets the loss as `value`.
      learning_rate: what the metrics show; None: the optimizer alone knows it.
      offload: the optimizer's state rests in the host's memory, and the step fetches it.

    If the loss or any gradient is not finite, the step is counted, and changes nothing else except a dynamic loss scale.

    Metrics, all float32 scalars: `loss` (nats a token), `grad_norm` (global, before clipping; each parameter counts
    once), `learning_rate` (unless it is unknown), `tokens` (valid tokens in the global batch), `skipped` (1 if the update was not applied, else
    0), `loss_scale` (the one that the step used) if it is dynamic, and by their names the objective's metrics and the
    model's auxiliary outputs.
    """
    dynamic = loss_scale if isinstance(loss_scale, DynamicLossScale) else None
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(state: State, batch: Mapping[str, jax.Array]) -> tuple[State, Metrics]:
        scale = scale_of(state, loss_scale)
        loss, more, grads = loss_metrics_and_grads(state["params"], batch, scale, seed_of(state))
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if offload:
            # Fetched once there are gradients. XLA would begin before the forward pass, when activations need the memory.
            opt_state, grads = lax.optimization_barrier((state["opt_state"], grads))
            state = {**state, "opt_state": jax.tree.map(partial(put_in, DEVICE), opt_state)}
        params, frozen = partition(state["params"], grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], params, value=loss)
        updated = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
        rate = {}
        if learning_rate:  # a skipped step does not advance the schedule
            count = num_updates(state["opt_state"], state["step"])
            rate["learning_rate"] = jnp.asarray(learning_rate(count), jnp.float32)
        metrics = {
            **more,
            "loss": loss,
            "grad_norm": grad_norm,
            **rate,
            "tokens": batch["loss_mask"].sum(),
            "skipped": 1 - finite.astype(jnp.float32),
        }
        before = {"params": params, "opt_state": state["opt_state"]}
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, before)
        state = {**state, **kept, "params": merge(kept["params"], frozen), "step": state["step"] + 1}
        if dynamic:
            metrics["loss_scale"] = scale
            state["loss_scale"] = dynamic.update(state["loss_scale"], finite)
        return state, metrics

    return train_step


def seed_of(state: State) -> jax.Array:
    """The seed of the next step's random numbers, uint32 [2]."""
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"]))


def scale_of(state: State, loss_scale: LossScale) -> jax.Array | None:
    """The present loss scale, dynamic or static; None if there is none."""
    if isinstance(loss_scale, DynamicLossScale):
        return state["loss_scale"]["scale"]
    return None if loss_scale is None else jnp.float32(loss_scale)
