"""The training loop: what happens when. No maths."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxpar import runtime
from jaxpar.batch import GlobalBatch
from jaxpar.checkpoint import Checkpoints
from jaxpar.config import Config, ConfigError
from jaxpar.data import BatchLoader, build_loader, load_tokenizer, open_dataset
from jaxpar.loss_and_grads import build_loss_and_grads
from jaxpar.mesh import build_mesh, cross_host_warning
from jaxpar.metrics import MetricsFile, model_flops_per_token, peak_flops
from jaxpar.models import Decoder, FunctionalModel, Model
from jaxpar.models.hugging_face import has_weights, load_params
from jaxpar.optimizer import build_optimizer, learning_rate_schedule
from jaxpar.pipeline.schedule import ScheduleError, build_schedule
from jaxpar.progress import Reporter, reporter
from jaxpar.recompute import Recompute
from jaxpar.sharding import layout_tree
from jaxpar.signals import Interrupted, Signals
from jaxpar.train_step import State, build_train_step, init_state, state_shardings

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}


class Trainer:
    """Trains a model on the mesh that a config describes.

    Args:
      config: from `jaxpar.load_config`.
      model: a `jaxpar.Model`, or for a model that is no stack of blocks a function of `nnx.Rngs` that builds it.
        Default: the built-in decoder with the config's architecture.

    Attributes:
      mesh: `jax.sharding.Mesh` with axes dp, pp, tp, sp, cp.
      layouts: `jaxpar.sharding.ParamLayout` of each parameter.
      schedule: the pipeline's table.
      num_params: how many numbers are trained, padding of the vocabulary included.

    Raises:
      ConfigError: with every problem of the config, for these devices and this model.
    """

    def __init__(self, config: Config, model: Model | Callable[[nnx.Rngs], nnx.Module] | None = None):
        self.config = config
        runtime.start(config)
        devices = runtime.devices(config)
        sizes, architecture = config.prepare_train(len(devices))
        # A user's own model has the sizes that it has, whatever architecture stands in the file.
        self.architecture = architecture if model is None else None
        if model is None:
            if architecture is None:
                raise ConfigError(
                    "actor.model: describes no model: give model_path (a Hugging Face folder) or hidden_size, "
                    "intermediate_size, num_hidden_layers, num_attention_heads, …, or Trainer(config, model=…)"
                )
            model = Decoder(architecture)
        self.mesh = build_mesh(sizes, devices)
        self.model = FunctionalModel(model)
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
        path = config.actor.model.model_path
        if self.architecture and path and not has_weights(path):
            self.warnings.append(f"actor.model.model_path: {path} has no weights: training starts from random ones")
        self._optimizer = build_optimizer(config, self.layouts)
        self._shapes, self._shardings = state_shardings(self.model, self._optimizer, self.layouts, self.mesh)
        self._batch = GlobalBatch(config.actor.global_batch_size, config.runner.seq_length, self.mesh)
        loss_and_grads = build_loss_and_grads(
            self.model,
            self.mesh,
            self.layouts,
            self.schedule,
            compute_dtype=DTYPES[config.actor.model.precision],
            recompute=_recompute(config),
            loss_scale=config.actor.optim.loss_scale or 1.0 if config.actor.model.precision == "fp16" else 1.0,
        )
        self._loss_and_grads = jax.jit(loss_and_grads)
        self._train_step = jax.jit(
            build_train_step(loss_and_grads, self._optimizer, learning_rate_schedule(config)),
            in_shardings=(self._shardings, self._batch.sharding),
            out_shardings=(self._shardings, NamedSharding(self.mesh, P())),
            donate_argnums=0,
        )
        self._state: State | None = None

    @property
    def state(self) -> State:
        """`step`, `params`, `opt_state`, `rng`: the newest, made on first use. Consumed by the next step."""
        if self._state is None:

            def make(params: Any) -> State:
                return init_state(self.model, self._optimizer, self.config.actor.seed, params)

            self._state = jax.jit(make, out_shardings=self._shardings, donate_argnums=0)(self._stored_params())
        return self._state

    def _stored_params(self) -> Any:
        """The weights beside the config.json of actor.model.model_path; None where there are none."""
        path = self.config.actor.model.model_path
        if self.architecture is None or path is None or not has_weights(path):
            return None
        return load_params(path, self.architecture, self.model.shapes, self._shardings["params"])

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
        return self._loss_and_grads(self.state["params"], self._batch.place(self._batch.complete(batch)))

    def train_step(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """One optimizer step on one global batch (as in `loss_and_grads`); returns the metrics of
        `jaxpar.train_step.build_train_step`."""
        return self._advance(self._batch.complete(batch))

    def fit(self) -> None:
        """Trains from the start, or from where `runner.resume_dir` says, to `max_steps` or `max_epochs`.

        Ctrl-C or SIGTERM finishes the step, saves, and raises `Interrupted`.

        Raises:
          ConfigError, jaxpar.data.DataError: as they are found.
          Interrupted: stopped by a signal; everything is saved.
        """
        config, first_process = self.config, jax.process_index() == 0
        loader = self._open_data()
        checkpoints = Checkpoints(config)
        report = reporter(first_process, config.runner.log_interval)
        if found := checkpoints.find():
            self._state, position = checkpoints.restore(found, self._shapes, self._shardings)
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
                    log.enter(step + 1, self._advance(next(loader)))
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
        self._state, metrics = self._train_step(self.state, self._batch.place(batch))
        return metrics

    def _open_data(self) -> BatchLoader:
        config = self.config
        tokenizer = load_tokenizer(config.actor.tokenizer.tokenizer_model)
        if self.architecture and tokenizer.vocab_size > self.architecture.vocab_size:
            raise ConfigError(
                f"actor.tokenizer.tokenizer_model: {tokenizer.name} has {tokenizer.vocab_size} tokens, but the model's "
                f"vocab_size is {self.architecture.vocab_size}: choose the model's own tokenizer, or raise vocab_size"
            )
        source = open_dataset(
            config.data.train_data_paths,
            tokenizer=tokenizer,
            text_key=config.data.text_key,
            seq_length=config.runner.seq_length,
            cache_dir=Path(config.runner.output_dir) / "token_cache",
        )
        return build_loader(
            source,
            global_batch_size=config.actor.global_batch_size,
            rows=self._batch.rows,
            seed=config.data.seed,
            shuffle=config.data.shuffle,
            num_epochs=config.runner.max_epochs if config.runner.max_epochs > 0 else None,
            num_workers=config.data.num_workers,
        )


class _StepLog:
    """Reports each step one step late, so that the devices never wait for the host to read a number."""

    def __init__(self, trainer: Trainer, report: Reporter, metrics: MetricsFile | None):
        self._report, self._metrics = report, metrics
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._before = time.perf_counter()
        devices = trainer.mesh.devices.flatten()
        peak = peak_flops(devices[0])
        self._mfu_per_rate = None
        if trainer.architecture and peak:
            flops = model_flops_per_token(trainer.architecture, trainer.num_params, trainer.config.runner.seq_length)
            self._mfu_per_rate = flops / (peak * len(devices))
        self._tokens = trainer.config.actor.global_batch_size * trainer.config.runner.seq_length

    def enter(self, step: int, values: dict[str, jax.Array]) -> None:
        self.flush()
        self._pending = (step, values)

    def flush(self) -> None:
        if self._pending is None:
            return
        step, values = self._pending
        self._pending = None
        numbers = {key: float(value) for key, value in values.items()}  # waits for the step to end
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        rate = self._tokens / seconds
        row = {
            "step": step,
            "loss": numbers["loss"],
            "grad_norm": numbers["grad_norm"],
            "learning_rate": numbers["learning_rate"],
            "tokens": int(numbers["tokens"]),
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": None if self._mfu_per_rate is None else rate * self._mfu_per_rate,
        }
        self._report.step(row)
        if self._metrics:
            self._metrics.write(row)


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


def _recompute(config: Config) -> Recompute:
    model = config.actor.model
    if model.recompute_granularity == "full":
        assert model.recompute_method and model.recompute_num_layers  # config.prepare_train saw to it
        return Recompute(model.recompute_method, model.recompute_num_layers)
    # "selective" asks for what attention does anyway: scores are never kept (Korthikanti et al., 2022, section 5).
    return Recompute()
