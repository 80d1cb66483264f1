"""Data-parallel training as one writes it in JAX without jaxpar, to compare with: the same layers under `jax.jit`, a scan
over them, and a batch split over the devices. XLA does the rest."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpar.config import Config, ConfigError, MeshSizes
from jaxpar.models import Decoder, FunctionalModel, TokenInfo
from jaxpar.parallel.batch import GlobalBatch
from jaxpar.parallel.mesh import build_mesh
from jaxpar.parallel.sharding import layout_tree
from jaxpar.program import DTYPES
from jaxpar.step.optimizer import build_optimizer, learning_rate_schedule
from jaxpar.step.train_step import State, build_train_step, init_state


class PlainProgram:
    """Parameters and optimizer state whole on every device, no microbatches; optimizer, initial weights, precision and
    recompute as the config has them.

    Attributes: those of `jaxpar.program.Program` that a benchmark needs.

    Raises:
      ConfigError: the global batch does not divide by the devices, or the config describes no model.
    """

    def __init__(self, config: Config, devices: Sequence[jax.Device]):
        architecture, rows = config.architecture(), config.actor.global_batch_size
        dtype = DTYPES[config.actor.model.precision]
        if architecture is None:
            raise ConfigError("actor.model: describes no model: give model_path, or hidden_size, num_hidden_layers, …")
        if config.runner.enable_dynamic_batch_size:
            raise ConfigError(
                "runner.enable_dynamic_batch_size: True, but layouts are compared on batches of one shape: set it to False"
            )
        if rows % len(devices):
            raise ConfigError(
                f"actor.global_batch_size: {rows} does not divide by {len(devices)} devices ({rows} / {len(devices)} = "
                f"{rows / len(devices):.2f}), over which the plain step to compare with splits it: choose a multiple"
            )
        self.mesh = build_mesh(MeshSizes(dp=len(devices), pp=1, tp=1, sp=1, cp=1), devices)
        self.batch = GlobalBatch(rows, config.runner.seq_length, self.mesh)
        model = FunctionalModel(Decoder(architecture))
        layouts = layout_tree(model.shapes, model.dims, self.mesh, explicit=True, zero_stage=0)
        optimizer = build_optimizer(config, layouts)
        recompute = jax.checkpoint if config.actor.model.recompute_granularity == "full" else lambda f: f

        def loss(params: Any, batch: Any) -> jax.Array:
            params = jax.tree.map(lambda x: x.astype(dtype), params)
            info = TokenInfo(batch["positions"], batch["segment_ids"])
            layer = recompute(lambda x, layer: (model.block(layer, x, info), None))
            x, _ = lax.scan(layer, model.embed(params, batch["tokens"], info), params["layers"])
            logits = model.head(params, x).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

        def init(params: Any) -> State:
            return init_state(model, optimizer, config.actor.seed, params)

        self.state_shapes = jax.eval_shape(lambda: init(None))
        everywhere = NamedSharding(self.mesh, P())
        self.state_shardings = jax.tree.map(lambda _: everywhere, self.state_shapes)
        self.init = jax.jit(init, out_shardings=everywhere)
        self.train_step = jax.jit(
            build_train_step(
                lambda params, batch, _: jax.value_and_grad(loss)(params, batch),
                optimizer,
                learning_rate_schedule(config),
            ),
            in_shardings=(everywhere, self.batch.sharding),
            out_shardings=everywhere,
            donate_argnums=0,
        )
