"""The training loop: what happens when. No maths."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpar import runtime
from jaxpar.checkpoint import Checkpoints
from jaxpar.config import Config, ConfigError
from jaxpar.data import (
    BatchLoader,
    DocumentCost,
    DocumentSource,
    PackedSource,
    build_dynamic_loader,
    build_loader,
    load_tokenizer,
    token_cache,
)
from jaxpar.metrics import MetricsFile, model_flops_per_token, peak_flops
from jaxpar.models import Model
from jaxpar.models.hugging_face import has_weights, load_params
from jaxpar.program import Program
from jaxpar.progress import Reporter, reporter
from jaxpar.signals import Interrupted, Signals
from jaxpar.train_step import State


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
        warnings, path = list(self.program.warnings), self.config.actor.model.model_path
        if self.program.architecture and path and not has_weights(path):
            warnings.append(f"actor.model.model_path: {path} has no weights: training starts from random ones")
        return warnings

    def _stored_params(self) -> Any:
        """The weights beside the config.json of actor.model.model_path; None where there are none."""
        program, path = self.program, self.config.actor.model.model_path
        if program.architecture is None or path is None or not has_weights(path):
            return None
        return load_params(path, program.architecture, program.model.shapes, program.state_shardings["params"])

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
        place = self.program.batch
        return self.program.loss_and_grads(self.state["params"], place.place(place.complete(batch)))

    def train_step(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """One optimizer step on one global batch (as in `loss_and_grads`); returns the metrics of
        `jaxpar.train_step.build_train_step`."""
        return self._advance(self.program.batch.complete(batch))

    def fit(self) -> None:
        """Trains from the start, or from where `runner.resume_dir` says, to `max_steps` or `max_epochs`.

        Ctrl-C, SIGTERM or SIGUSR1 finishes the step, saves, and raises `Interrupted`.

        Raises:
          ConfigError: of the config, the data (`jaxpar.data.DataError`) or the checkpoint, as they are found.
          Interrupted: stopped by a signal; everything is saved.
        """
        config, first_process = self.config, jax.process_index() == 0
        loader = self._open_data()
        checkpoints = Checkpoints(config)
        report = reporter(first_process, config.runner.log_interval)
        if found := checkpoints.find():
            self._state, position = checkpoints.restore(found, self.program.state_shapes, self.program.state_shardings)
            loader.set_state(position)
            report.say(f"resumed from {found}")
        step = int(self.state["step"])
        limits = [
            n for n in (config.runner.max_steps if config.runner.max_steps > 0 else None, loader.num_batches) if n
        ]
        metrics = MetricsFile(config.output_path, step) if first_process else None
        log = _StepLog(self, report, metrics)
        with Signals() as signals:
            report.start(step, last := min(limits))
            try:
                while step < last and not signals.received:
                    log.enter(step + 1, self._advance(next(loader)), loader.figures)
                    step += 1
                    if config.runner.save_interval > 0 and step % config.runner.save_interval == 0:
                        log.flush()
                        checkpoints.save(step, self.state, loader.get_state())
                log.flush()
                checkpoints.save(step, self.state, loader.get_state())
                checkpoints.wait()
            finally:
                report.stop()
                loader.close()
                if metrics:
                    metrics.close()
        if signals.received and step < last:
            raise Interrupted(step, last, signals.received)
        report.say(f"done: step {step}, checkpoint in {checkpoints.folder}")

    def _advance(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        self._state, metrics = self.program.train_step(self.state, self.program.batch.place(batch))
        return metrics

    def _open_data(self) -> BatchLoader:
        config, program = self.config, self.program
        folder = self._token_cache("train_data_paths")
        order: dict[str, Any] = {
            "global_batch_size": config.actor.global_batch_size,
            "seed": config.data.seed,
            "shuffle": config.data.shuffle,
            "num_epochs": config.runner.max_epochs if config.runner.max_epochs > 0 else None,
            "num_workers": config.data.num_workers,
        }
        if config.runner.enable_dynamic_batch_size:
            documents, cost = DocumentSource(folder, config.row_length), DocumentCost(*program.document_flops)
            return build_dynamic_loader(
                documents, dp=program.mesh.shape["dp"], ranks=program.dp_ranks, cost=cost, **order
            )
        return build_loader(PackedSource.read(folder, config.runner.seq_length), rows=program.batch.rows, **order)

    def _token_cache(self, key: str) -> Path:
        config = self.config
        tokenizer = load_tokenizer(config.actor.tokenizer.tokenizer_model)
        architecture = self.program.architecture
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


class _StepLog:
    """Reports each step one step late, so that the devices never wait for the host to read a number."""

    def __init__(self, trainer: Trainer, report: Reporter, metrics: MetricsFile | None):
        self._report, self._metrics = report, metrics
        self._pending: tuple[int, dict[str, jax.Array], Mapping[str, float]] | None = None
        self._before = time.perf_counter()
        program = trainer.program
        devices = program.mesh.devices.flatten()
        peak = peak_flops(devices[0])
        self._mfu_per_flops = None
        if program.architecture and peak:
            self._flops_per_token = model_flops_per_token(
                program.architecture, program.num_params, trainer.config.row_length
            )
            self._mfu_per_flops = 1 / (peak * len(devices))
        self._tokens = math.prod(program.batch.shape)

    def enter(self, step: int, values: dict[str, jax.Array], figures: Mapping[str, float]) -> None:
        """`figures`: of the batch, see `jaxpar.data.BatchLoader`."""
        self.flush()
        self._pending = (step, values, figures)

    def flush(self) -> None:
        if self._pending is None:
            return
        step, values, figures = self._pending
        self._pending = None
        numbers = {key: float(value) for key, value in values.items()}  # waits for the step to end
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        rate = (numbers["tokens"] if figures else self._tokens) / seconds  # of dynamic batches without padding
        mfu = None
        if self._mfu_per_flops is not None:
            mfu = rate * figures.get("flops_per_token", self._flops_per_token) * self._mfu_per_flops
        row = {
            "step": step,
            "loss": numbers["loss"],
            "grad_norm": numbers["grad_norm"],
            "learning_rate": numbers["learning_rate"],
            "tokens": int(numbers["tokens"]),
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": mfu,
            **figures,
        }
        self._report.step(row)
        if self._metrics:
            self._metrics.write(row)
