"""What a config means on N devices: sizes, model, how parameters lie, schedule, batch. No device is asked for anything,
and nothing is compiled.

`jaxpar mesh`, `compile`, `bench` and `train` all start from a `Blueprint`. `jaxpar.program` puts one on real devices.
"""

import math
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh

from jaxpar.attention import AttentionSettings, Backend
from jaxpar.backward.recompute import Recompute
from jaxpar.config import Architecture, Config, ConfigError, MeshSizes, checks
from jaxpar.config.keys import RECOMPUTE_MODULES
from jaxpar.config.lora import Lora
from jaxpar.models import Decoder, FunctionalModel, UserModel
from jaxpar.models.flops import flops_coefficients, model_flops_per_token
from jaxpar.models.functional import METRICS
from jaxpar.models.split_check import check_split_sequence
from jaxpar.models.trainable import Trainable, trained_mask
from jaxpar.objectives import Objective, UserObjective, as_objective, check_objective
from jaxpar.objectives.from_config import objective_of
from jaxpar.parallel.mesh import cross_host_warning
from jaxpar.parallel.placement import LayerPlacement
from jaxpar.parallel.sharding import layout_tree
from jaxpar.parallel.trained import partition, trained_layouts
from jaxpar.pipeline.loss import Loss
from jaxpar.pipeline.schedule import Schedule, ScheduleError, build_schedule
from jaxpar.step.ema import with_ema
from jaxpar.step.loss_scale import DynamicLossScale
from jaxpar.step.muon import left_to_adam
from jaxpar.step.opt_state import bytes_everywhere
from jaxpar.step.optimizer import build_optimizer, check_update, learning_rate_schedule, unused_settings
from jaxpar.step.train_step import LossScale

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}


class Blueprint:
    """A config on `num_devices` devices. Each part is worked out when it is first asked for, and raises ConfigError with
    its own problems; `check` raises all problems at once.

    Args:
      config: from `jaxpar.load_config`.
      model: a `jaxpar.Model`, or for a model that is not a stack of blocks a function of `nnx.Rngs` that builds it.
        Default: the built-in decoder with the config's architecture.
      objective: a `jaxpar.Objective`, or a function (`jaxpar.TokenStatistics`, batch) → losses. Default: what the config's
        section `algorithm` names.
      trainable: what is trained, see `jaxpar.models.trainable`. Default: what the config says, else everything.
      optimizer: any transformation of optax, with its learning rate. Default: what `actor.optim` names.
      learning_rate: step, from 0 → rate, for the optimizer that `actor.optim` names. Default: that of `actor.lr_sched`.
    """

    def __init__(
        self,
        config: Config,
        num_devices: int,
        model: UserModel | None = None,
        *,
        objective: UserObjective | None = None,
        trainable: Trainable | None = None,
        optimizer: optax.GradientTransformation | None = None,
        learning_rate: optax.Schedule | None = None,
    ):
        self.config, self.num_devices = config, num_devices
        self._user_model, self.user_objective, self.user_trainable = model, objective, trainable
        self._user_optimizer, self._user_rate = optimizer, learning_rate

    def check(self) -> None:
        """Raises ConfigError with every problem that stands in the way of training."""
        own_rate = self._user_optimizer is not None or self._user_rate is not None
        if self._user_model is not None:  # it has its own sizes, whatever architecture the file describes
            self.config.check_train(self.sizes, None, own_rate=own_rate)
        else:
            self.config.prepare_train(self.num_devices, own_rate=own_rate)
        if problems := list(
            checks.schedule_problems(self.config.actor.model, self.model.num_layers, self.model.pattern)
        ):
            raise ConfigError(problems)
        _ = self.param_layouts, self.schedule, self.loss
        check_update(self.optimizer, self._trained_shapes)
        if self.sizes.cp > 1:
            check_split_sequence(self.model, self.sizes.cp, self.config.row_length)

    @cached_property
    def sizes(self) -> MeshSizes:
        """The five sizes of the mesh."""
        return self.config.mesh_sizes(self.num_devices)

    @cached_property
    def mesh_shape(self) -> AbstractMesh:
        """The mesh without devices."""
        sizes = self.sizes.as_dict()
        return AbstractMesh(tuple(sizes.values()), tuple(sizes))

    @cached_property
    def architecture(self) -> Architecture | None:
        """The built-in decoder's; None for a user's own model, or if the config describes no model."""
        return self.config.architecture() if self._user_model is None else None

    @cached_property
    def model(self) -> FunctionalModel:
        if self._user_model is not None:
            return FunctionalModel(self._user_model, self.config.row_length)
        if self.architecture is None:
            raise ConfigError(
                "actor.model: describes no model: give model_path (a Hugging Face folder) or hidden_size, "
                "intermediate_size, num_hidden_layers, num_attention_heads, …, or Trainer(config, model=…)"
            )
        decoder = Decoder(self.architecture, self.lora, tp_comm_overlap=self.config.actor.model.tp_comm_overlap)
        return FunctionalModel(decoder)

    @cached_property
    def lora(self) -> Lora | None:
        """The adapters of the built-in decoder, if it has any."""
        return self.config.lora() if self._user_model is None else None

    @property
    def user_model(self) -> UserModel | None:
        """The user's own model, as it was given; None for the built-in decoder."""
        return self._user_model

    @cached_property
    def objective(self) -> Objective:
        """What a step minimizes."""
        if self.user_objective is not None:
            return as_objective(self.user_objective)
        return objective_of(self.config.algorithm)

    @cached_property
    def loss(self) -> Loss:
        """The objective, checked."""
        if self.objective.of_outputs and self.model.explicit:
            raise ConfigError(
                "objective: of_outputs: the built-in decoder's logits are split over devices and never whole: use their "
                "statistics (jaxpar.TokenStatistics), or give a model of your own"
            )
        reserved = METRICS | self.model.auxiliary.keys()
        return Loss(self.objective, check_objective(self.objective, reserved, self.model.outputs))

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """{name: ShapeDtypeStruct of one token's} of the arrays that the model and the objective take besides tokens."""
        model, objective = self.model.inputs, self.objective.inputs
        for name in sorted(model.keys() & objective.keys()):
            if (a := model[name]) != (b := objective[name]):
                raise ConfigError(
                    f"objective: inputs: {name!r} is {b.dtype}{list(b.shape)} for each token, but the model takes "
                    f"{a.dtype}{list(a.shape)} by that name: choose another name"
                )
        return {**model, **objective}

    @cached_property
    def num_params(self) -> int:
        """How many numbers the parameters have, the padding of the vocabulary and frozen ones included."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.model.shapes))

    @property
    def num_trained(self) -> int:
        """How many of them are trained."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self._trained_layouts))

    @property
    def listed_params(self) -> dict[str, str]:
        """Name of each parameter → its shape, how it is split, and whether it is trained."""
        layouts = jax.tree.leaves(self.param_layouts)
        return {x.name: f"{list(x.shape)} {x.rest_spec}{'' if x.trained else ' frozen'}" for x in layouts}

    @property
    def _trained_layouts(self) -> Any:
        """`param_layouts`, with None at the frozen parameters."""
        return trained_layouts(self.param_layouts)

    @property
    def _trained_shapes(self) -> Any:
        return partition(self.model.shapes, self._trained_layouts)[0]

    @cached_property
    def trained(self) -> Any:
        """A tree like the parameters, with True at the trained ones."""
        if self.user_trainable is not None:
            return trained_mask(self.model, self.user_trainable, "trainable")
        if (patterns := self.config.actor.optim.trainable) is not None:
            return trained_mask(self.model, patterns, "actor.optim.trainable")
        return trained_mask(self.model, nnx.LoRAParam if self.lora else "*", "actor.model.is_lora")

    @cached_property
    def vocab_size(self) -> int:
        """How many tokens the model knows: the built-in decoder's without padding; of a user's own model, its logits."""
        return self.architecture.vocab_size if self.architecture else self.model.vocab_size

    @property
    def num_chunks(self) -> int:
        """Chunks of layers (virtual stages) of each pipeline stage."""
        return self.config.actor.model.virtual_pipeline_model_parallel_size or 1

    @property
    def placement(self) -> LayerPlacement:
        return LayerPlacement(self.model.num_layers, self.sizes.pp, self.num_chunks)

    @cached_property
    def param_layouts(self) -> Any:
        """Tree of `jaxpar.parallel.sharding.ParamLayout`."""
        return layout_tree(
            self.model.shapes,
            self.model.dims,
            self.mesh_shape,
            explicit=self.model.explicit,
            zero_stage=self.config.zero_stage,
            num_chunks=self.num_chunks,
            num_layers=self.model.num_layers,
            trained=self.trained,
            frozen_dtype=self.compute_dtype,
        )

    def schedule_of(self, rows: int) -> Schedule:
        """The pipeline's table for a batch of which each dp rank has so many rows."""
        name, num_microbatches = self.config.actor.model.pipeline_schedule, rows // self.config.rows_per_microbatch
        return build_schedule(name, self.sizes.pp, num_microbatches, self.num_chunks)

    @cached_property
    def schedule(self) -> Schedule:
        """The pipeline's table; with dynamic batches, the largest that may be needed."""
        try:
            return self.schedule_of(self.config.num_microbatches(self.sizes) * self.config.rows_per_microbatch)
        except ScheduleError as error:
            raise ConfigError([str(error)]) from None

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Rows and tokens of a global batch; with dynamic batches, the most rows that there may be."""
        rows_per_microbatch = self.sizes.dp * self.config.rows_per_microbatch
        return rows_per_microbatch * self.schedule.num_microbatches, self.config.row_length

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The caller's, or the config's; with the average of the weights that the config asks for."""
        if self._user_optimizer is not None and self._user_rate is not None:
            raise ConfigError("learning_rate: an optimizer that is given has its own: give one of the two")
        optimizer, decay = self._user_optimizer, self.config.actor.optim.ema_decay
        if optimizer is None:
            optimizer = build_optimizer(self.config, self._trained_layouts, self.learning_rate, self.mesh_shape)
        return with_ema(optimizer, decay) if decay else optimizer

    @property
    def learning_rate(self) -> optax.Schedule | None:
        """None: the caller's optimizer has its own."""
        if self._user_optimizer is not None:
            return None
        return self._user_rate or learning_rate_schedule(self.config)

    @property
    def loss_scale(self) -> LossScale:
        """A number, how it changes, or None."""
        optim = self.config.actor.optim
        if self.config.actor.model.precision != "fp16":
            return None
        return optim.loss_scale or DynamicLossScale(
            optim.initial_loss_scale, optim.min_loss_scale, optim.loss_scale_window, optim.hysteresis
        )

    @property
    def recompute(self) -> Recompute:
        model = self.config.actor.model
        return Recompute(
            model.recompute_granularity,
            model.recompute_method,
            model.recompute_num_layers or 0,
            offload=model.offload_activations,
            modules=tuple(model.recompute_modules or RECOMPUTE_MODULES[:1]),
        )

    @property
    def attention(self) -> AttentionSettings:
        """Without the device, which decides what `auto` means."""
        model = self.config.actor.model
        a2a_size, _ = model.hierarchical_context_parallel_sizes or (1, 1)
        return AttentionSettings(model.cp_comm_type, a2a_size, Backend(model.attention_backend))

    @property
    def compute_dtype(self) -> Any:
        return DTYPES[self.config.actor.model.precision]

    @property
    def document_flops(self) -> tuple[float, float, int | None]:
        """FLOPs that training on a document needs: for each token; for each pair of a token and one that it may attend to;
        and how many tokens it may attend to (None: all before it). For a user's own model an estimate, with attention as
        wide as its "embed" dimension."""
        if self.architecture:
            coefficients = flops_coefficients(self.architecture, self.num_params, num_frozen=self._num_frozen)
            return *coefficients, self.architecture.sliding_window
        layers = jax.tree.leaves(self.param_layouts["layers"])
        width = next((x.shape[x.dims.index("embed")] for x in layers if "embed" in x.dims), 0)
        return 6 * self.num_params - 2 * self._num_frozen, 6 * self.model.num_layers * width, None

    @property
    def flops_per_token(self) -> float | None:
        """Useful FLOPs of a step for each token (`jaxpar.models.flops`); None for a user's own model."""
        if self.architecture is None:
            return None
        length = self.config.row_length
        return model_flops_per_token(self.architecture, self.num_params, length, num_frozen=self._num_frozen)

    @property
    def _num_frozen(self) -> int:
        """How many numbers of matrix products are frozen. A token embedding that is only looked up is none."""
        lookups = {"embed/table"} if self.architecture and not self.architecture.tie_word_embeddings else set()
        frozen = [x for x in jax.tree.leaves(self.param_layouts) if not x.trained and x.name not in lookups]
        return sum(math.prod(x.shape) for x in frozen)

    @property
    def warnings(self) -> list[str]:
        """What to tell the user about the mesh and the model."""
        warning = cross_host_warning(self.sizes, self.num_devices // self.config.cluster.num_nodes)
        warnings = [warning] if warning else []
        if self.config.data.reset_attention_mask and not self.model.knows_documents:
            warnings.append(
                "the model does not use info.segment_ids, so tokens attend across the documents of a packed row: pass "
                "segment_ids=info.segment_ids to jaxpar.attention.attention, or say that it is meant with "
                "data.reset_attention_mask: False"
            )
        return warnings

    @property
    def training_warnings(self) -> list[str]:
        """What to tell the user before training: `warnings`, and what is to be said of the optimizer."""
        warnings = self.warnings
        own_optimizer, own_rate = self._user_optimizer is not None, self._user_rate is not None
        warnings += unused_settings(self.config, own_optimizer=own_optimizer, own_rate=own_optimizer or own_rate)
        if (
            not own_optimizer
            and self.config.actor.optim.optimizer == "muon"
            and (names := left_to_adam(self._trained_layouts))
        ):
            warnings.append(
                f"actor.optim.optimizer: muon leaves {', '.join(names)} to Adam: the names of their dimensions do not tell what is "
                "summed over"
            )
        opt_state = jax.eval_shape(self.optimizer.init, self._trained_shapes)
        if self.num_devices > 1 and (whole := bytes_everywhere(opt_state, self._trained_layouts)) >= 2**20:
            warnings.append(
                f"optimizer: {whole / 2**20:,.0f} MiB of its state lie whole on every device: the shapes are not those of parameters"
            )
        return warnings
