"""Data-parallel training as one writes it in JAX without jaxpar, to compare with: the same layers under `jax.jit`, a scan
over them, and a batch that is split over the devices. XLA does the rest."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpar.blueprint import Blueprint, UserModel
from jaxpar.config import Config, ConfigError, MeshSizes
from jaxpar.models import TokenInfo
from jaxpar.parallel.batch import BatchLayout
from jaxpar.parallel.mesh import build_mesh
from jaxpar.parallel.trained import trained_layouts, vjp
from jaxpar.step import build_train_step, init_state


class BaselineProgram:
    """Parameters and optimizer state are whole on every device, and there are no microbatches. Optimizer, initial weights,
    precision and recompute are those of the config.

    Args:
      config: for one device.
      model: the user's own, as in `jaxpar.blueprint.Blueprint`.

    Attributes: those of `jaxpar.program.Program` that a benchmark needs.

    Raises:
      ConfigError: the global batch does not divide by the devices, or the config describes no model.
    """

    def __init__(self, config: Config, devices: Sequence[jax.Device], model: UserModel | None = None):
        blueprint, rows = Blueprint(config, 1, model), config.actor.global_batch_size
        functions, optimizer, layouts = blueprint.model, blueprint.optimizer, blueprint.param_layouts
        if config.runner.enable_dynamic_batch_size:
            raise ConfigError(
                "runner.enable_dynamic_batch_size: True, but layouts are compared on batches of one shape: set it to False"
            )
        if rows % len(devices):
            raise ConfigError(
                f"actor.global_batch_size: {rows} does not divide by {len(devices)} devices ({rows} / {len(devices)} = "
                f"{rows / len(devices):.2f}), over which the plain step to compare with splits it: choose a multiple"
            )
        why = "XLA splits this program by itself, and no kernel: the comparison favours jaxpar"
        self.attention_choices = {} if devices[0].platform == "cpu" else {"plain JAX: all blocks": why}
        self.mesh = build_mesh(MeshSizes(dp=len(devices), pp=1, tp=1, sp=1, cp=1), devices)
        self.batch_layout = BatchLayout(rows, config.runner.seq_length, self.mesh)
        recompute = jax.checkpoint if config.actor.model.recompute_granularity == "full" else lambda f: f

        def loss(params: Any, batch: Any) -> jax.Array:
            params = jax.tree.map(lambda x: x.astype(blueprint.compute_dtype), params)
            info = TokenInfo(batch["positions"], batch["segment_ids"])
            layer = recompute(lambda x, layer: (functions.block(layer, x, info), None))
            x, _ = lax.scan(
                layer, functions.embed(params, batch["tokens"], info), params["layers"], length=functions.num_layers
            )
            logits = functions.head(params, x).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

        def loss_auxiliary_and_grads(params: Any, batch: Any, *_: Any) -> tuple[jax.Array, dict[str, jax.Array], Any]:
            value, backward = vjp(lambda params: loss(params, batch), params, trained_layouts(layouts))
            return value, {}, backward(jnp.ones_like(value))[0]

        everywhere = NamedSharding(self.mesh, P())
        self.init = jax.jit(
            lambda params: init_state(functions, optimizer, config.actor.seed, params, param_layouts=layouts),
            out_shardings=everywhere,
        )
        self.state_shapes = jax.eval_shape(self.init, None)
        self.state_shardings = jax.tree.map(lambda _: everywhere, self.state_shapes)
        self.train_step = jax.jit(
            build_train_step(loss_auxiliary_and_grads, optimizer, blueprint.learning_rate),
            in_shardings=(everywhere, self.batch_layout.sharding),
            out_shardings=everywhere,
            donate_argnums=0,
        )
