"""From a config and devices to compiled-to-be programs: everything that a run, a benchmark or a compile without devices
needs, and nothing that runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpar.attention import AttentionSettings
from jaxpar.backward.recompute import Recompute
from jaxpar.config import Architecture, Config, ConfigError, checks
from jaxpar.models import Decoder, FunctionalModel, Model
from jaxpar.models.flops import flops_coefficients
from jaxpar.parallel.batch import GlobalBatch
from jaxpar.parallel.mesh import build_mesh, cross_host_warning
from jaxpar.parallel.sharding import layout_tree
from jaxpar.pipeline.schedule import ScheduleError, build_schedule
from jaxpar.step.loss_and_grads import StepSetup, build_evaluate, build_loss_and_grads
from jaxpar.step.loss_scale import DynamicLossScale
from jaxpar.step.optimizer import build_optimizer, learning_rate_schedule
from jaxpar.step.train_step import LossScale, State, build_train_step, init_state, state_shardings

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
        a global batch. With dynamic batches the last two are the largest; the programs take any number of rows.
      state_shapes, state_shardings: of the whole training state.
      train_step: jitted (state, batch) → (state, metrics), see `jaxpar.step.train_step`; the state is donated.
      loss_and_grads: jitted (params, batch, loss_scale=None) → (loss, grads).
      loss_scale: a number, how it changes, or None.
      evaluate: jitted (params, batch) → losses without gradients, see `jaxpar.step.loss_and_grads.build_evaluate`.
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
        if problems := list(checks.schedule_problems(config.actor.model, self.model.num_layers)):
            raise ConfigError(problems)
        chunks = config.actor.model.virtual_pipeline_model_parallel_size or 1
        self.layouts = layout_tree(
            self.model.shapes,
            self.model.dims,
            self.mesh,
            explicit=self.model.explicit,
            zero_stage=config.zero_stage,
            num_chunks=chunks,
        )
        self.num_params = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.model.shapes))
        name = config.actor.model.pipeline_schedule
        self._schedule = lambda num_microbatches: build_schedule(name, sizes.pp, num_microbatches, chunks)
        try:
            self.schedule = self._schedule(config.num_microbatches(sizes))
        except ScheduleError as error:
            raise ConfigError([str(error)]) from None
        self._rows = sizes.dp * config.rows_per_microbatch  # of a microbatch on all dp ranks
        self.warnings = [w for w in [cross_host_warning(sizes, len(devices) // config.cluster.num_nodes)] if w]
        self.batch = GlobalBatch(self._rows * self.schedule.num_microbatches, config.row_length, self.mesh)
        optimizer = build_optimizer(config, self.layouts)
        self.loss_scale = loss_scale = _loss_scale(config)
        offload = config.actor.optim.optimizer_cpu_offload
        self.state_shapes, self.state_shardings = state_shardings(
            self.model, optimizer, self.layouts, self.mesh, loss_scale, offload=offload
        )
        self._setup = StepSetup(
            self.model,
            self.mesh,
            self.layouts,
            self.schedule,
            compute_dtype=DTYPES[config.actor.model.precision],
            recompute=_recompute(config),
            zero_stage=config.zero_stage,
            reduce_dtype=DTYPES[config.actor.optim.grad_reduce_dtype],
            overlap_param_gather=config.actor.optim.overlap_param_gather,
            overlap_grad_reduce=config.actor.optim.overlap_grad_reduce,
        )
        loss_and_grads = self._for_its_microbatches(build_loss_and_grads)
        self.evaluate = jax.jit(self._for_its_microbatches(build_evaluate))
        self.loss_and_grads = jax.jit(loss_and_grads)
        self.train_step = jax.jit(
            build_train_step(loss_and_grads, optimizer, learning_rate_schedule(config), loss_scale, offload=offload),
            in_shardings=(self.state_shardings, self.batch.sharding),
            out_shardings=(self.state_shardings, NamedSharding(self.mesh, P())),
            donate_argnums=0,
        )

        def init(params: Any) -> State:
            return init_state(self.model, optimizer, config.actor.seed, params, loss_scale)

        self.init = jax.jit(init, out_shardings=self.state_shardings, donate_argnums=0)

    @property
    def dp_ranks(self) -> list[int]:
        """Those that this process's devices have a part in."""
        rows = self.batch.shape[0] // self.mesh.shape["dp"]
        return sorted({row // rows for row in self.batch.rows})

    @property
    def document_flops(self) -> tuple[float, float, int | None]:
        """FLOPs that training on a document needs: for each token, for each token and one that it may see in it, and how
        many it may see (None: all). Of a user's own model an estimate: attention as wide as its "embed"."""
        if self.architecture:
            return *flops_coefficients(self.architecture, self.num_params), self.architecture.sliding_window
        layers = jax.tree.leaves(self.layouts["layers"])
        width = next((x.shape[x.dims.index("embed")] for x in layers if "embed" in x.dims), 0)
        return 6 * self.num_params, 6 * self.model.num_layers * width, None

    def _for_its_microbatches(self, build: Callable[[StepSetup], Callable]) -> Callable:
        """What `build` makes, for as many microbatches as the batch given to it has: dynamic batches differ in that, and
        jax compiles once for each number."""

        def function(params: Any, batch: Mapping[str, jax.Array], *args: Any) -> Any:
            schedule = self._schedule(batch["tokens"].shape[0] // self._rows)
            return build(replace(self._setup, schedule=schedule))(params, batch, *args)

        return function


def _attention_settings(config: Config, platform: str) -> AttentionSettings:
    model = config.actor.model
    if model.attention_backend == "pallas" and platform not in ("gpu", "cuda"):
        raise ConfigError(
            f"actor.model.attention_backend: pallas is a kernel for GPUs, and the devices are of {platform}: set auto or xla"
        )
    a2a_size, _ = model.hierarchical_context_parallel_sizes or (1, 1)
    # auto is plain JAX until the kernel has run on a GPU: it has been compiled for H100s, and run in Pallas' interpreter.
    return AttentionSettings(model.cp_comm_type, a2a_size, "pallas" if model.attention_backend == "pallas" else "xla")


def _loss_scale(config: Config) -> LossScale:
    optim = config.actor.optim
    if config.actor.model.precision != "fp16":
        return None
    return optim.loss_scale or DynamicLossScale(
        optim.initial_loss_scale, optim.min_loss_scale, optim.loss_scale_window, optim.hysteresis
    )


def _recompute(config: Config) -> Recompute:
    model = config.actor.model
    method: Any = model.recompute_granularity or "none"
    if method == "full":
        method = model.recompute_method
    return Recompute(method, model.recompute_num_layers or 0, offload=model.offload_activations)
