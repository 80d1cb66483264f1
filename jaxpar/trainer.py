"""The training loop: what happens when. No maths."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpar.checkpoint.checkpoints import Checkpoints
from jaxpar.config import Config, ConfigError
from jaxpar.data import (
    BatchLoader,
    BatchOrder,
    DocumentCost,
    DocumentSource,
    PackedSource,
    build_dynamic_loader,
    build_loader,
    load_tokenizer,
    token_cache,
)
from jaxpar.models import Model
from jaxpar.models.hugging_face import has_weights, load_params
from jaxpar.program import Program
from jaxpar.run import runtime
from jaxpar.run.evaluation import Evaluation
from jaxpar.run.metrics import metrics_writers
from jaxpar.run.profile import Profiler, Steps
from jaxpar.run.progress import Reporter, reporter
from jaxpar.run.replicas import ReplicaError, check_replicas
from jaxpar.run.signals import Interrupted, Signals
from jaxpar.run.step_log import NonFiniteError, StepLog
from jaxpar.run.watchdog import Watchdog
from jaxpar.step.train_step import State, scale_of

__all__ = ["Interrupted", "NonFiniteError", "ReplicaError", "Trainer"]


class Trainer:
    """Trains a model on the mesh that a config describes.

    Args:
      config: from `jaxpar.load_config`.
      model: a `jaxpar.Model`, or for a model that is no stack of blocks a function of `nnx.Rngs` that builds it.
        Default: the built-in decoder with the config's architecture.

    Attributes:
      program: the compiled programs with mesh, layouts and schedule, see `jaxpar.program.Program`.

    Raises:
      ConfigError: with every problem of the config, for these devices and this model.
    """

    def __init__(self, config: Config, model: Model | Callable[[nnx.Rngs], nnx.Module] | None = None):
        self.config = config
        runtime.start(config)
        self.program = Program(config, runtime.devices(config), model)
        self._state: State | None = None

    @property
    def state(self) -> State:
        """`step`, `params`, `opt_state`, `rng`: the newest, made on first use. Consumed by the next step."""
        if self._state is None:
            self._state = self.program.init(self._stored_params())
        return self._state

    @property
    def warnings(self) -> list[str]:
        """What to tell the user once about this run, beside `config.notes`."""
        warnings, path = list(self.program.blueprint.warnings), self.config.actor.model.model_path
        if self.program.blueprint.architecture and path and not has_weights(path):
            warnings.append(f"actor.model.model_path: {path} has no weights: training starts from random ones")
        return warnings

    def _stored_params(self) -> Any:
        """The weights beside the config.json of actor.model.model_path; None where there are none."""
        program, path = self.program, self.config.actor.model.model_path
        if program.blueprint.architecture is None or path is None or not has_weights(path):
            return None
        return load_params(
            path, program.blueprint.architecture, program.blueprint.model.shapes, program.state_shardings["params"]
        )

    def loss_and_grads(self, batch: Mapping[str, Any]) -> tuple[Float[Array, ""], Any]:
        """Loss and gradients of one global batch at the present parameters, on the mesh, without an update.

        Args:
          batch: numpy or jax arrays, each [global_batch_size, seq] of the whole run: `tokens` and `targets`, int;
            optional `loss_mask`, float, weight of each target (default 1); `segment_ids`, int, document of each token
            (default: one document); `positions`, int, place in its document (default 0, 1, 2, …).

        Returns:
          (loss, grads): loss in nats a token, float32, the mask's weighted mean over the whole global batch; grads a
          tree like `trainer.state["params"]`, float32.

        Raises:
          ValueError: a key or shape is wrong.
        """
        layout, scale = self.program.batch_layout, scale_of(self.state, self.program.blueprint.loss_scale)
        return self.program.loss_and_grads(self.state["params"], layout.put_on_mesh(layout.own_rows(batch)), scale)

    def log_probs(self, batch: Mapping[str, Any]) -> Float[Array, "global_batch seq"]:
        """log p(target) of each token at the present parameters, float32, in nats, without gradients; a batch as in
        `loss_and_grads`."""
        layout = self.program.batch_layout
        return -self.program.evaluate(self.state["params"], layout.put_on_mesh(layout.own_rows(batch)))["token_losses"]

    def train_step(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """One optimizer step on one global batch (as in `loss_and_grads`); returns the metrics of
        `jaxpar.step.train_step.build_train_step`."""
        return self._advance(self.program.batch_layout.own_rows(batch))

    def fit(self, profile: Steps | None = None) -> None:
        """Trains from the start, or from where `runner.resume_dir` says, to `max_steps` or `max_epochs`.

        Ctrl-C, SIGTERM or SIGUSR1 finishes the step, saves, and raises `Interrupted`.

        Args:
          profile: steps to trace for xprof, into `profile` beside the metrics.

        Raises:
          ConfigError: of the config, the data (`jaxpar.data.DataError`) or a checkpoint (`CheckpointError`), as they
            are found.
          Interrupted: stopped by a signal; everything is saved.
          NonFiniteError, ReplicaError: the run has gone wrong and must not go on.
        """
        with Watchdog(self.config.runner.stall_timeout) as watchdog:
            self._fit(watchdog, profile)

    def _fit(self, watchdog: Watchdog, profile: Steps | None) -> None:
        runner, first_process = self.config.runner, jax.process_index() == 0
        watchdog.enter(0, "opening the data")
        loader, evaluation = self._open_data(), self._open_evaluation()
        checkpoints = Checkpoints(self.config)
        report = reporter(first_process, runner.log_interval)
        watchdog.enter(0, "restoring")
        self._resume(checkpoints, loader, report)
        step = int(self.state["step"])
        last = min(n for n in (runner.max_steps if runner.max_steps > 0 else None, loader.num_batches) if n)
        if profile:
            profile.check(step, last)
        writers = metrics_writers(self.config, step) if first_process else []
        log = StepLog(self.config, self.program, report, writers)
        folder = self.config.output_path / "profile"
        profiler = Profiler(profile, folder, lambda: jax.block_until_ready(self._state), report.say)
        with Signals() as signals:
            report.start(step, last)
            val_loss: float | None = None
            try:
                while step < last:
                    watchdog.enter(step + 1, "asking all for signals")
                    if signals.received:
                        break
                    watchdog.enter(step + 1, "reading the batch")
                    batch = next(loader)
                    watchdog.enter(step + 1, "training")
                    with profiler.step(step + 1):
                        log.enter(step + 1, self._advance(batch), batch, loader.figures)
                    step += 1
                    val_loss = None
                    if evaluation and step % runner.val_check_interval == 0:
                        watchdog.enter(step, "evaluating")
                        val_loss = self._evaluate(evaluation, log)
                    if runner.check_replicas_interval > 0 and step % runner.check_replicas_interval == 0:
                        watchdog.enter(step, "comparing replicas")
                        check_replicas(self.state["params"])
                    checkpoints.check()
                    is_best = val_loss is not None and runner.keep_best_checkpoint and checkpoints.is_best(val_loss)
                    if is_best or (runner.save_interval > 0 and step % runner.save_interval == 0):
                        log.flush()
                        watchdog.enter(step, "saving")
                        checkpoints.save(step, self.state, loader.get_state()["batch"], val_loss)
                log.flush()
                watchdog.enter(step, "saving")
                checkpoints.save(step, self.state, loader.get_state()["batch"], val_loss)
                checkpoints.wait()
            except (NonFiniteError, ReplicaError):
                checkpoints.wait()  # for what was begun before
                raise
            finally:
                profiler.stop()
                report.stop()
                loader.close()
                for writer in writers:
                    writer.close()
        if signals.received and step < last:
            raise Interrupted(step, last, signals.received)
        report.say(f"done: step {step}, checkpoint in {checkpoints.folder}")

    def _resume(self, checkpoints: Checkpoints, loader: BatchLoader, report: Reporter) -> None:
        found, torn = checkpoints.find()
        for note in torn:
            report.say(note)
        if found:
            self._state, position = checkpoints.restore(found, self.program.state_shapes, self.program.state_shardings)
            loader.set_state(position)
            report.say(f"resumed from {found}")

    def _evaluate(self, evaluation: Evaluation, log: StepLog) -> float:
        seconds = log.wait()
        val_loss = evaluation.loss(self.state["params"])
        log.flush(seconds, val_loss=val_loss)
        return val_loss

    def _advance(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        self._state, metrics = self.program.train_step(self.state, self.program.batch_layout.put_on_mesh(batch))
        return metrics

    def _open_data(self) -> BatchLoader:
        config, program = self.config, self.program
        folder = self._token_cache("train_data_paths")
        num_epochs = config.runner.max_epochs if config.runner.max_epochs > 0 else None
        order = BatchOrder(config.actor.global_batch_size, config.data.seed, config.data.shuffle, num_epochs)
        workers = config.data.num_workers
        if config.runner.enable_dynamic_batch_size:
            documents, cost = DocumentSource(folder, config.row_length), DocumentCost(*program.blueprint.document_flops)
            return build_dynamic_loader(
                documents, order, dp=program.mesh.shape["dp"], ranks=program.dp_ranks, cost=cost, num_workers=workers
            )
        samples = PackedSource.read(folder, config.runner.seq_length)
        return build_loader(samples, order, rows=program.batch_layout.rows, num_workers=workers)

    def _token_cache(self, key: str) -> Path:
        config = self.config
        tokenizer = load_tokenizer(config.actor.tokenizer.tokenizer_model)
        architecture = self.program.blueprint.architecture
        if architecture and tokenizer.vocab_size > architecture.vocab_size:
            raise ConfigError(
                f"actor.tokenizer.tokenizer_model: {tokenizer.name} has {tokenizer.vocab_size} tokens, but the model's "
                f"vocab_size is {architecture.vocab_size}: choose the model's own tokenizer, or raise vocab_size"
            )
        return token_cache(
            getattr(config.data, key),
            setting=f"data.{key}",
            tokenizer=tokenizer,
            text_key=config.data.text_key,
            cache_dir=Path(config.runner.output_dir) / "token_cache",
        )

    def _open_evaluation(self) -> Evaluation | None:
        runner, paths = self.config.runner, self.config.data.val_data_paths
        if not paths or runner.val_check_interval <= 0:
            return None
        samples = PackedSource.read(self._token_cache("val_data_paths"), self.config.row_length)
        return Evaluation(self.program, samples, runner.limit_val_batches)
