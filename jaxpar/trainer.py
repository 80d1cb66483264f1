"""The trainer: a model on a mesh, and what one can do with it. The training loop is `jaxpar/loop.py`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jaxtyping import Array, Float, Int

from jaxpar.checkpoint.checkpoints import Checkpoints
from jaxpar.checkpoint.run_state import RunState, warn
from jaxpar.config import Config, ConfigError
from jaxpar.loop import TrainingRun
from jaxpar.measure.check import check_layout
from jaxpar.measure.check_report import CheckReport
from jaxpar.models import UserModel
from jaxpar.models.assembled import assemble
from jaxpar.models.hugging_face import export_params
from jaxpar.models.trainable import Trainable
from jaxpar.models.weights import Source
from jaxpar.objectives import TokenStatistics, UserObjective
from jaxpar.parallel.trained import merge
from jaxpar.program import Program
from jaxpar.run import runtime
from jaxpar.run.agreement import check_alike, given_to_this_process
from jaxpar.run.evaluation import EvalBatches
from jaxpar.run.folder_lock import FolderLock
from jaxpar.run.hooks import Hook, HookError
from jaxpar.run.profile import Steps
from jaxpar.run.replicas import ReplicaError
from jaxpar.run.signals import Interrupted
from jaxpar.run.sources import UserBatches
from jaxpar.run.step_log import NonFiniteError
from jaxpar.run.terminal import steady_output
from jaxpar.run.watchdog import Watchdog
from jaxpar.step.ema import ema_params
from jaxpar.step.train_step import State, scale_of, seed_of

__all__ = ["HookError", "Interrupted", "NonFiniteError", "ReplicaError", "Trainer"]


class Trainer:
    """Trains a model on the mesh that a config describes.

    Args:
      config: from `jaxpar.load_config`.
      model: a `jaxpar.Stack` (or what has the members of `jaxpar.Model`); or, for a model that is not a stack of blocks, a
        `jaxpar.Whole`, a Linen module, an nnx module with its weights, or a function of `nnx.Rngs` that builds one. Default:
        the built-in decoder with the config's architecture.
      params: weights to start from, of any float dtype: a tree like `trainer.state["params"]` of numpy or jax arrays, or a
        function that returns one parameter, of one layer: `params("layers/3/attention/query")`, `params("embed/table")`.
        The function is called once for each parameter and layer that this process's devices hold, when the weights are
        first needed. A checkpoint that `runner.resume_dir` finds wins over them.
      objective: a `jaxpar.Objective`, or a function (`jaxpar.TokenStatistics`, batch) → losses [batch, seq]. Default: what the
        config's section `algorithm` names, next-token cross-entropy if it names nothing.
      trainable: what is trained: patterns of paths, such as "head/*", or a filter of nnx, such as `nnx.LoRAParam`; see
        `jaxpar.models.trainable.trained_mask`. Default: actor.optim.trainable, else everything. The rest is frozen.
      optimizer: any `optax.GradientTransformation`, with its own learning rate. Default: what `actor.optim` names.
      learning_rate: step (from 0) → rate, instead of `actor.lr_sched`'s, for the optimizer that `actor.optim` names.
      replace_stored: take `params` although the folder actor.model.model_path has weights too.

    Attributes:
      program: the jitted functions with mesh, layouts and schedule, see `jaxpar.program.Program`.

    Raises:
      ConfigError: lists every problem of the config for these devices and this model, or of the tree `params`.
    """

    def __init__(
        self,
        config: Config,
        model: UserModel | None = None,
        params: Source | None = None,
        *,
        objective: UserObjective | None = None,
        trainable: Trainable | None = None,
        optimizer: optax.GradientTransformation | None = None,
        learning_rate: optax.Schedule | None = None,
        replace_stored: bool = False,
    ):
        self.config = config
        runtime.start(config)
        with Watchdog(config.runner.stall_timeout) as watchdog:  # a mistake that one process finds here ends all
            watchdog.enter(0, "comparing the processes")
            check_alike(given_to_this_process(config))
            watchdog.enter(0, "building the model")
            self.program = Program(
                config,
                runtime.devices(config),
                model,
                objective=objective,
                trainable=trainable,
                optimizer=optimizer,
                learning_rate=learning_rate,
            )
            check_alike(self.program.blueprint.listed_params)
            params = self.program.blueprint.model.own_params if params is None else params
            self._run_state = RunState(self.program, params, replace_stored=replace_stored)

    @property
    def state(self) -> State:
        """The current `step`, `params`, `opt_state`, `rng`. The next step consumes it.

        On first use, it is that of the checkpoint that `runner.resume_dir` names. If it names none or `auto` finds none,
        it is that of step 0, and a warning says if `auto` has found none and the weights are random.

        Raises:
          ConfigError: the checkpoint does not fit, or `params` do not.
        """
        return self._run_state.get()

    def restore(self, path: str | Path | None = None) -> int:
        """Takes the state of a checkpoint, to be used without training data. A collective call.

        `fit` begins where it would have begun without this call: `runner.resume_dir` says where.

        Args:
          path: a folder global_step_N, or that of an experiment or its checkpoints, of which the newest complete
            checkpoint is taken. Default: what `runner.resume_dir` says, else this experiment.

        Returns:
          Its step.

        Raises:
          ConfigError: there is no complete checkpoint, or its state does not fit this model and optimizer.
          CheckpointError: a file is damaged or cannot be read.
        """
        checkpoints = Checkpoints(self.config)
        found, notes = checkpoints.find_to_use(path)
        warn(notes)
        if found is None:
            raise ConfigError(f"restore: no complete checkpoint in {checkpoints.folder}: give the path of one")
        self._run_state.restore(checkpoints, found, to_train=False)
        return int(self.state["step"])

    @property
    def warnings(self) -> list[str]:
        """What the user should be told once about this run, in addition to `config.notes`."""
        warnings, path = self.program.blueprint.training_warnings, self.config.actor.model.model_path
        blueprint = self.program.blueprint
        if blueprint.architecture and (path or blueprint.lora) and self._run_state.is_random:
            lacks = f"{path} has no weights" if path else "not given, but is_lora freezes the weights"
            warnings.append(f"actor.model.model_path: {lacks}: training starts from random weights")
        return warnings

    def loss_and_grads(self, batch: Mapping[str, Any]) -> tuple[Float[Array, ""], Any]:
        """Loss and gradients of one global batch at the current parameters, on the mesh, without an update. They are those of
        the next step, random numbers included.

        Args:
          batch: the whole run's numpy or jax arrays, each [global_batch_size, seq]: `tokens` and `targets`, int;
            optional `loss_mask`, float, the weight of each target (default 1); `segment_ids`, int, the document of each
            token, whose tokens are consecutive (default: one document); `positions`, int, the token's position in its document (default 0, 1, 2, …).

        Returns:
          (loss, grads): the loss in nats per token, float32, the mean over the whole global batch weighted by the mask;
          grads is a float32 tree like `trainer.state["params"]`, with None at frozen ones.

        Raises:
          ValueError: the batch is wrong, see `jaxpar.parallel.batch.BatchLayout.own_rows`.
        """
        layout, scale = self.program.batch_layout, scale_of(self.state, self.program.blueprint.loss_scale)
        placed = layout.put_on_mesh(layout.own_rows(batch))
        return self.program.loss_and_grads(self.state["params"], placed, scale, seed_of(self.state))

    def check(self, batch: Mapping[str, Any] | None = None) -> CheckReport:
        """Compares this layout with one device: the loss and every gradient, in float32, from initial weights with noise.

        Prints a short table. One device must hold the model, its gradients and the activations of a microbatch. Where it
        cannot, `jaxpar check CONFIG` compares a smaller model on simulated devices. The trainer's own state is not touched.

        Args:
          batch: a global batch, as in `loss_and_grads`, of which the first rows are used: two microbatches of each stage.
            Default: random tokens in packed documents.

        Raises:
          LayoutError: the layout computes something else. The error names the parameters.
          ConfigError: one device has too little memory.
          ValueError: the batch is wrong, as in `loss_and_grads`.
        """
        return check_layout(self.program.blueprint, runtime.devices(self.config), batch)

    def log_probs(
        self, batch: Mapping[str, Any], temperature: float | None = None, *, params: Any = None
    ) -> Float[Array, "global_batch seq"]:
        """log p(target) of each token, float32, in nats; as `statistics`."""
        return self.statistics(batch, temperature, params=params).log_probs

    def statistics(
        self,
        batch: Mapping[str, Any],
        temperature: float | None = None,
        *,
        entropy: bool = False,
        candidates: Int[Any, "global_batch seq k"] | None = None,
        params: Any = None,
    ) -> TokenStatistics:
        """Statistics of each token's logits [global_batch, seq] at the current parameters, without gradients, with the
        entropy if asked. Raises ConfigError if the model's outputs are no logits (`Objective.of_outputs`).

        Args:
          batch: as in `loss_and_grads`; all of it may be masked, and what the objective takes besides may be missing.
          temperature: divides the logits. Default: the objective's.
          candidates: tokens whose log-probabilities are asked for as well, at each position.
          params: other parameters than the trainer's, a tree that lies like them, such as that of `reference_params`.
        """
        return self.program.statistics_of(
            self.state["params"] if params is None else params,
            batch,
            temperature,
            entropy=entropy,
            candidates=candidates,
        )

    def reference_params(self) -> Any:
        """The weights of step 0 in the compute dtype, split like the trainer's, for `log_probs(batch, params=…)`. They are read or
        made anew, so a resumed run has the same. A collective call."""
        return self._run_state.reference(self.program.blueprint.compute_dtype)

    def export_params(self, dtype: str = "bfloat16", bucket_bytes: int = 2**30) -> Iterator[dict[str, Array]]:
        """The built-in decoder's present parameters under Hugging Face's names and in its shapes, for an engine that samples; adapters
        are folded in. A collective call: all processes must take all buckets.

        Args:
          bucket_bytes: size of a bucket, of which each device holds one at a time. A larger tensor has one of its own.

        Yields:
          {name: array of `dtype`, whole on every device}.

        Raises:
          ConfigError: the model is a user's own: see `module`.
        """
        architecture = self.program.blueprint.architecture
        if architecture is None:
            raise ConfigError(
                "export_params: only the built-in decoder has Hugging Face's names: trainer.module() gives your own module"
            )
        params = self.merged_params() if self.program.blueprint.lora else self.state["params"]
        return export_params(params, architecture, dtype, bucket_bytes)

    def train_step(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Takes one optimizer step.

        Args:
          batch: one global batch, as in `loss_and_grads`. With dynamic batches it may have fewer rows, a multiple of dp.

        Returns:
          The metrics of `jaxpar.step.train_step.build_train_step`.
        """
        layout = self.program.batch_layout
        return self._run_state.train_step(layout.put_on_mesh(layout.own_rows(batch)))

    def module(self, *, ema: bool = False) -> Any:
        """The model with the current parameters, or `ema`, their average (`actor.optim.ema_decay`): float32, for evaluation.

        Returns:
          Of a whole model, the user's own module (if it is Linen, bound to its variables). Of a stack, a
          `jaxpar.models.assembled.Assembled`: `module(tokens)` gives logits [batch, seq, vocab].
        """
        params = self.state["params"]
        params = merge(ema_params(self.state["opt_state"]), params) if ema else params
        return assemble(self.program.blueprint.model, params)

    def merged_params(self) -> Any:
        """Copies of the current parameters, float32, like those of the model without LoRA: the adapters (`is_lora`) are folded
        into their matrices. `jaxpar.models.hugging_face.save_params` takes them."""
        return self.program.merged(self.state["params"])

    @steady_output()
    def fit(
        self,
        batches: UserBatches | None = None,
        eval_batches: EvalBatches | None = None,
        hooks: Sequence[Hook] = (),
        profile: Steps | None = None,
        *,
        take_over: bool = False,
    ) -> None:
        """Trains from the start, or from the checkpoint that `runner.resume_dir` names, to `max_steps` or `max_epochs`.

        Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP finishes the current step, saves, and raises `Interrupted`.

        Args:
          batches: global batches as in `loss_and_grads`: an iterable (a Grain dataset or loader, a generator, a list), whose end
            ends the run, or a function from the number of the step (1, 2, …) to its batch, which needs `max_steps`. With
            several processes, each gives the whole batch or its own rows of it, `program.batch_layout.rows`. A checkpoint has
            the position of an iterator with `get_state` and `set_state`; of another, a run that resumes reads and drops the
            batches that are done. Default: those of `data.train_data_paths`.
          eval_batches: an iterable of batches, or a function that returns one; read from the first batch to the last (or
            `limit_val_batches`) every `val_check_interval` steps. Default: those of `data.val_data_paths`.
          hooks: called on every process, in this order, before jaxpar's own; see `jaxpar.Hook`.
          profile: steps to trace for xprof, into the folder `profile` beside the metrics.
          take_over: take the experiment's folder from a run that has it, and that ends.

        Raises:
          ConfigError: a mistake in the config, the data (`jaxpar.data.DataError`) or a checkpoint (`CheckpointError`),
            raised when it is found; another run has the experiment's folder, or takes it, or the folder is gone.
          Interrupted: stopped by a signal; everything is saved.
          HookError: a hook has failed; everything is saved. So it is before an error of `batches`, such as the ValueError
            of a wrong batch, is raised.
          NonFiniteError, ReplicaError: the run has gone wrong and must not continue.
        """
        lock = FolderLock(self.config.output_path, take_over=take_over)
        with Watchdog(self.config.runner.stall_timeout) as watchdog, lock:
            run = TrainingRun(
                self,
                self.program,
                self._run_state,
                watchdog,
                lock,
                batches=batches,
                eval_batches=eval_batches,
                hooks=hooks,
                profile=profile,
            )
            run.train()
        run.finish()  # outside: an error inside would tell the other processes' watchdogs that this process has failed
