"""A blueprint on given devices: the jitted functions of a run, a benchmark, or a compile for devices that are not here."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpar.blueprint import DTYPES, Blueprint, UserModel
from jaxpar.config import Config, ConfigError
from jaxpar.models.lora import merged, without_adapters
from jaxpar.models.protocol import Params
from jaxpar.models.trainable import Trainable
from jaxpar.objectives import Asked, TokenStatistics, UserObjective, check_independence
from jaxpar.parallel.batch import BatchLayout
from jaxpar.parallel.mesh import build_mesh
from jaxpar.step import (
    StepSetup,
    build_evaluate,
    build_loss_and_grads,
    build_loss_metrics_and_grads,
    build_statistics,
    build_train_step,
    init_state,
    state_shardings,
)


class Program:
    """A training run's programs on given devices, which may be real, simulated, or only for compiling.

    Args:
      config: from `jaxpar.load_config`.
      devices: all devices of the run, in the order of their hosts.
      model, objective, trainable, optimizer, learning_rate: as in `jaxpar.blueprint.Blueprint`.

    Attributes:
      blueprint: what the config means on so many devices.
      mesh, batch_layout: the mesh, and how a global batch lies on it. With dynamic batches, the layout of the largest; the
        programs take any number of rows.
      state_shapes, state_shardings: of the whole training state.
      train_step: jitted (state, batch) → (state, metrics), see `jaxpar.step.train_step`. The state is donated.
      loss_and_grads: jitted (params, batch, loss_scale=None, seed=None) → (loss, grads), see
        `jaxpar.step.loss_and_grads.build_loss_metrics_and_grads`.
      evaluate: jitted (params, batch) → the loss without gradients, see `jaxpar.step.forward.build_evaluate`.
      statistics: jitted (params, batch, asked) → the statistics of tokens, see `build_statistics` there.
      init: jitted (params or None, or with None for some) → the state before the first step, see `init_state`.
      attention_choices: once a program is traced, what computes the blocks of attention → why.

    Raises:
      ConfigError: with every problem of the config, for these devices and this model.
    """

    def __init__(
        self,
        config: Config,
        devices: Sequence[jax.Device],
        model: UserModel | None = None,
        *,
        objective: UserObjective | None = None,
        trainable: Trainable | None = None,
        optimizer: optax.GradientTransformation | None = None,
        learning_rate: optax.Schedule | None = None,
    ):
        self.blueprint = blueprint = Blueprint(
            config,
            len(devices),
            model,
            objective=objective,
            trainable=trainable,
            optimizer=optimizer,
            learning_rate=learning_rate,
        )
        blueprint.check()
        _check_backend(config, devices[0].platform)
        if objective is not None:  # the shipped ones are tested
            check_independence(blueprint.objective, blueprint.model.outputs)
        self.mesh = build_mesh(blueprint.sizes, devices)
        within_documents = config.data.reset_attention_mask
        self.batch_layout = BatchLayout(
            *blueprint.batch_shape,
            self.mesh,
            within_documents=within_documents,
            inputs=blueprint.inputs,
            problem=blueprint.objective.problem,
            dynamic=config.runner.enable_dynamic_batch_size,
        )
        optimizer, loss_scale = blueprint.optimizer, blueprint.loss_scale
        offload = config.actor.optim.optimizer_cpu_offload
        self.state_shapes, self.state_shardings = state_shardings(
            blueprint.model, optimizer, blueprint.param_layouts, self.mesh, loss_scale, offload=offload
        )
        setup = _step_setup(blueprint, self.mesh)
        self.attention_choices = setup.attention.backend.choices

        self.evaluate = jax.jit(build_evaluate(setup))
        self.statistics = jax.jit(
            lambda params, batch, asked: build_statistics(setup, asked)(params, batch), static_argnums=2
        )
        self.loss_and_grads = jax.jit(build_loss_and_grads(setup))
        self.train_step = jax.jit(
            build_train_step(
                build_loss_metrics_and_grads(setup), optimizer, blueprint.learning_rate, loss_scale, offload=offload
            ),
            in_shardings=(self.state_shardings, self.batch_layout.sharding),
            out_shardings=(self.state_shardings, NamedSharding(self.mesh, P())),
            donate_argnums=0,
        )
        self.init = jax.jit(
            lambda params: init_state(
                blueprint.model, optimizer, config.actor.seed, params, loss_scale, param_layouts=blueprint.param_layouts
            ),
            out_shardings=self.state_shardings,
            donate_argnums=0,
        )

    def statistics_of(
        self,
        params: Params,
        batch: Mapping[str, Any],
        temperature: float | None = None,
        *,
        entropy: bool = False,
        candidates: Any = None,
    ) -> TokenStatistics:
        """As `jaxpar.Trainer.statistics`, of these parameters."""
        layout, objective = self.batch_layout, self.blueprint.objective
        optional = objective.inputs.keys() - self.blueprint.model.inputs.keys()
        temperature, name = objective.temperature if temperature is None else temperature, None
        if candidates is not None:
            name = "statistics' candidates"
            layout = layout.with_inputs({name: jax.ShapeDtypeStruct(candidates.shape[2:], np.int32)})
            batch = {**batch, name: candidates}
        asked = Asked(entropy, candidates=name, temperature=temperature)
        rows = layout.put_on_mesh(layout.own_rows(batch, trained=False, optional=optional))
        return self.statistics(params, {key: x for key, x in rows.items() if key not in optional}, asked)

    def merged(self, params: Params) -> Params:
        """Copies of the parameters, float32, with adapters folded into their matrices, see `jaxpar.models.lora.merged`."""
        lora, shardings = self.blueprint.lora, self.state_shardings["params"]
        fold = jax.jit(
            lambda params: merged(params, lora.scale if lora else 1),
            out_shardings=without_adapters(shardings) if lora else shardings,
        )
        return fold(params)

    @property
    def dp_ranks(self) -> list[int]:
        """The dp ranks that this process's devices belong to."""
        rows = self.batch_layout.shape[0] // self.mesh.shape["dp"]
        return sorted({row // rows for row in self.batch_layout.rows})


def _step_setup(blueprint: Blueprint, mesh: jax.sharding.Mesh) -> StepSetup:
    optim, attention = blueprint.config.actor.optim, blueprint.attention
    return StepSetup(
        blueprint.model,
        mesh,
        blueprint.param_layouts,
        blueprint.schedule_of,
        compute_dtype=blueprint.compute_dtype,
        attention=replace(attention, backend=replace(attention.backend, device=mesh.devices.flat[0], choices={})),
        recompute=blueprint.recompute,
        zero_stage=blueprint.config.zero_stage,
        reduce_dtype=DTYPES[optim.grad_reduce_dtype],
        overlap_param_gather=optim.overlap_param_gather,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        within_documents=blueprint.config.data.reset_attention_mask,
        loss=blueprint.loss,
    )


def _check_backend(config: Config, platform: str) -> None:
    name = config.actor.model.attention_backend
    if name in ("cudnn", "tokamax") and platform not in ("gpu", "cuda"):
        raise ConfigError(
            f"actor.model.attention_backend: {name} is for GPUs, but the devices are of {platform}: set auto or xla"
        )
