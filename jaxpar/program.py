"""From a config and devices to compiled-to-be programs: everything that a run, a benchmark or a compile without devices
needs, and nothing that runs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpar.attention import AttentionSettings
from jaxpar.batch import GlobalBatch
from jaxpar.config import Architecture, Config, ConfigError
from jaxpar.loss_and_grads import build_loss_and_grads
from jaxpar.mesh import build_mesh, cross_host_warning
from jaxpar.models import Decoder, FunctionalModel, Model
from jaxpar.optimizer import build_optimizer, learning_rate_schedule
from jaxpar.pipeline.schedule import ScheduleError, build_schedule
from jaxpar.recompute import Recompute
from jaxpar.sharding import layout_tree
from jaxpar.train_step import State, build_train_step, init_state, state_shardings

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}


class Program:
    """A training run's programs on given devices, which may be real, simulated, or there for compiling only.

    Args:
      config: from `jaxpar.load_config`.
      devices: all of the run's, in order of hosts.
      model: a `jaxpar.Model`, or for a model that is no stack of blocks a function of `nnx.Rngs` that builds it.
        Default: the built-in decoder with the config's architecture.

    Attributes:
      architecture: the built-in decoder's; None for a user's own model.
      mesh, layouts, schedule, batch: the mesh, the `ParamLayout` of each parameter, the pipeline's table, the place of
        a global batch.
      state_shapes, state_shardings: of the whole training state.
      train_step: jitted (state, batch) → (state, metrics), see `jaxpar.train_step`; the state is donated.
      loss_and_grads: jitted (params, batch) → (loss, grads).
      init: jitted (params or None) → state before the first step.
      num_params: how many numbers are trained, padding of the vocabulary included.

    Raises:
      ConfigError: with every problem of the config, for these devices and this model.
    """

    def __init__(
        self,
        config: Config,
        devices: Sequence[jax.Device],
        model: Model | Callable[[nnx.Rngs], nnx.Module] | None = None,
    ):
        self.architecture: Architecture | None = None
        if model is None:
            sizes, self.architecture = config.prepare_train(len(devices))
            if self.architecture is None:
                raise ConfigError(
                    "actor.model: describes no model: give model_path (a Hugging Face folder) or hidden_size, "
                    "intermediate_size, num_hidden_layers, num_attention_heads, …, or Trainer(config, model=…)"
                )
            model = Decoder(self.architecture)
        else:  # it has the sizes that it has, whatever architecture stands in the file
            sizes = config.mesh_sizes(len(devices))
            config.check_train(sizes, None)
        self.mesh = build_mesh(sizes, devices)
        self.model = FunctionalModel(model, _attention_settings(config, devices[0].platform))
        _check_stack(self.model, sizes.pp)
        self.layouts = layout_tree(
            self.model.shapes,
            self.model.dims,
            self.mesh,
            explicit=self.model.explicit,
            zero=config.actor.optim.use_distributed_optimizer,
        )
        self.num_params = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.model.shapes))
        try:
            self.schedule = build_schedule(
                config.actor.model.pipeline_schedule, sizes.pp, config.num_microbatches(sizes)
            )
        except ScheduleError as error:
            raise ConfigError(str(error)) from None
        self.warnings = [w for w in [cross_host_warning(sizes, len(devices) // config.cluster.num_nodes)] if w]
        self.batch = GlobalBatch(config.actor.global_batch_size, config.runner.seq_length, self.mesh)
        optimizer = build_optimizer(config, self.layouts)
        self.state_shapes, self.state_shardings = state_shardings(self.model, optimizer, self.layouts, self.mesh)
        loss_and_grads = build_loss_and_grads(
            self.model,
            self.mesh,
            self.layouts,
            self.schedule,
            compute_dtype=DTYPES[config.actor.model.precision],
            recompute=_recompute(config),
            loss_scale=config.actor.optim.loss_scale or 1.0 if config.actor.model.precision == "fp16" else 1.0,
        )
        self.loss_and_grads = jax.jit(loss_and_grads)
        self.train_step = jax.jit(
            build_train_step(loss_and_grads, optimizer, learning_rate_schedule(config)),
            in_shardings=(self.state_shardings, self.batch.sharding),
            out_shardings=(self.state_shardings, NamedSharding(self.mesh, P())),
            donate_argnums=0,
        )

        def init(params: Any) -> State:
            return init_state(self.model, optimizer, config.actor.seed, params)

        self.init = jax.jit(init, out_shardings=self.state_shardings, donate_argnums=0)


def _check_stack(model: FunctionalModel, num_stages: int) -> None:
    if num_stages == 1 or (model.num_layers and model.num_layers % num_stages == 0):
        return
    key = f"actor.model.pipeline_model_parallel_size: {num_stages}"
    if model.num_layers == 0:
        raise ConfigError(
            f"{key}, but the model is no stack of like blocks, which is what stages are cut from: set it to 1, or give "
            f"a jaxpar.Model with embed, block and head"
        )
    raise ConfigError(
        f"{key} does not divide the model's num_layers {model.num_layers} "
        f"({model.num_layers} / {num_stages} = {model.num_layers / num_stages:.2f}): choose a size that does"
    )


def _attention_settings(config: Config, platform: str) -> AttentionSettings:
    model = config.actor.model
    if model.attention_backend == "pallas" and platform not in ("gpu", "cuda"):
        raise ConfigError(
            f"actor.model.attention_backend: pallas is a kernel for GPUs, and the devices are of {platform}: set auto or xla"
        )
    a2a_size, _ = model.hierarchical_context_parallel_sizes or (1, 1)
    # auto is plain JAX until the kernel has run on a GPU: it has been compiled for H100s, and run in Pallas' interpreter.
    return AttentionSettings(model.cp_comm_type, a2a_size, "pallas" if model.attention_backend == "pallas" else "xla")


def _recompute(config: Config) -> Recompute:
    model = config.actor.model
    if model.recompute_granularity == "full":
        assert model.recompute_method and model.recompute_num_layers  # config.prepare_train saw to it
        return Recompute(model.recompute_method, model.recompute_num_layers)
    # "selective" asks for what attention does anyway: scores are never kept (Korthikanti et al., 2022, section 5).
    return Recompute()
