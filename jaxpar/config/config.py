"""`Config`: a whole config file, typed, with the arithmetic that needs the number of devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import PrivateAttr

from jaxpar.config import checks
from jaxpar.config.architecture import Architecture, read_architecture
from jaxpar.config.batch_checks import batch_problems, data_problems
from jaxpar.config.errors import ConfigError, on_a_screen
from jaxpar.config.keys import Actor, Algorithm, Cluster, Data, Runner, Section
from jaxpar.config.lora import Lora, read_lora
from jaxpar.config.notes import without_effect


@dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of the mesh. One of `tp` and `sp` is the size of the tensor group, the other is 1."""

    dp: int
    pp: int
    tp: int
    sp: int
    cp: int

    @property
    def num_devices(self) -> int:
        return math.prod(self.as_dict().values())

    @property
    def tensor(self) -> int:
        """Size of the tensor group: devices that share one copy of a layer's weights."""
        return self.tp * self.sp

    def as_dict(self) -> dict[str, int]:
        """Axis name → size, in the mesh's order of axes."""
        return asdict(self)


class Config(Section):
    """A whole config file, typed. Get one from `load_config` or `config_from_dict`."""

    cluster: Cluster = Cluster()
    runner: Runner = Runner()
    data: Data = Data()
    algorithm: Algorithm = Algorithm()
    actor: Actor = Actor()
    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def output_path(self) -> Path:
        """Folder of this experiment's checkpoints and metrics: `output_dir/experiment_name`."""
        return Path(self.runner.output_dir).expanduser() / self.runner.experiment_name

    @property
    def notes(self) -> list[str]:
        """What to tell the user once: ignored foreign keys, and every value that was filled in or padded."""
        notes = list(self.setting_notes())
        try:
            architecture, more = read_architecture(self.actor)
        except ConfigError:  # check_train and architecture() report it
            architecture, more = None, []
        notes += [] if architecture is None else [*more, *self._architecture_notes(architecture)]
        return [on_a_screen(note, 2000) for note in notes]  # that of ignored keys may name a hundred

    def setting_notes(self) -> Iterator[str]:
        """Those of `notes` that are not about the built-in decoder."""
        sched = self.actor.lr_sched
        if self._ignored:
            yield _ignored_note(self._ignored)
        if sched.lr_decay_style != "constant" and sched.lr_decay_iters is None and self.runner.max_steps > 0:
            yield f"actor.lr_sched.lr_decay_iters is not given: using runner.max_steps, {self.runner.max_steps}"
        yield from without_effect(self.runner, self.data, self.algorithm, self.actor.model, self.actor.optim)
        if "swanlab" in (self.runner.logger.logger_backends or ()):
            yield (
                "runner.logger.logger_backends: swanlab ignored, because only tensorboard and wandb are supported: metrics go "
                "to metrics.jsonl, and also to those that are in the list"
            )
        if self.runner.enable_dynamic_batch_size:
            yield (
                f"runner.enable_dynamic_batch_size: a microbatch is a row of max_tokens_per_mbs * context_parallel_size = "
                f"{self.row_length} tokens; runner.seq_length and actor.micro_batch_size have no effect"
            )

    def _architecture_notes(self, architecture: Architecture) -> Iterator[str]:
        model = self.actor.model
        vocab, padded = architecture.vocab_size, architecture.padded_vocab_size
        if padded != vocab:
            yield (
                f"the vocabulary of {vocab} is padded to {padded}, a multiple of "
                f"actor.model.make_vocab_size_divisible_by: {model.make_vocab_size_divisible_by}"
            )
        tensor, kv_heads = model.tensor_model_parallel_size, architecture.num_key_value_heads
        if tensor > kv_heads and tensor % kv_heads == 0:
            yield (
                f"kv heads are repeated: each of the {kv_heads} is held by {tensor // kv_heads} of the {tensor} "
                "tensor-parallel devices"
            )
        if 0 < architecture.max_position_embeddings < self.row_length:
            length = "max_tokens_per_mbs * context_parallel_size"
            yield (
                f"runner.{length if self.runner.enable_dynamic_batch_size else 'seq_length'}: {self.row_length} exceeds "
                f"the model's max_position_embeddings {architecture.max_position_embeddings}"
            )

    @property
    def zero_stage(self) -> int:
        """Stage of ZeRO, 0 to 3."""
        optim = self.actor.optim
        return int(optim.use_distributed_optimizer) if optim.zero_stage is None else optim.zero_stage

    @property
    def row_length(self) -> int:
        """Tokens in a row of a batch: `seq_length`, or with dynamic batches the token budget of all cp ranks together."""
        if not self.runner.enable_dynamic_batch_size:
            return self.runner.seq_length
        return (self.runner.max_tokens_per_mbs or 0) * self.actor.model.context_parallel_size

    @property
    def rows_per_microbatch(self) -> int:
        """Rows in a microbatch of one dp rank."""
        return 1 if self.runner.enable_dynamic_batch_size else self.actor.micro_batch_size

    def num_configured_devices(self) -> int | None:
        """Devices that the file asks for, or None if `cluster.num_gpus_per_node` is null: then ask the runtime."""
        per_node = self.cluster.num_gpus_per_node
        return None if per_node is None else self.cluster.num_nodes * per_node

    def mesh_sizes(self, num_devices: int) -> MeshSizes:
        """The five sizes on `num_devices` devices. `dp` is the number of devices divided by the other sizes.

        Raises:
          ConfigError: sequence parallelism without a tensor group, or sizes whose product does not divide the devices.
        """
        problems = list(checks.mesh_problems(self.actor.model, num_devices))
        if problems:
            raise ConfigError(problems)
        model = self.actor.model
        tensor, pp, cp = (
            model.tensor_model_parallel_size,
            model.pipeline_model_parallel_size,
            model.context_parallel_size,
        )
        tp, sp = (1, tensor) if model.sequence_parallel else (tensor, 1)
        return MeshSizes(dp=num_devices // (tensor * pp * cp), pp=pp, tp=tp, sp=sp, cp=cp)

    def num_microbatches(self, sizes: MeshSizes) -> int:
        """Microbatches that each pipeline runs in one optimizer step: global batch / (micro batch * dp).

        With dynamic batches this is an upper limit: the number of documents of a dp rank.

        Raises:
          ConfigError: a batch size is missing, or the global batch is not a multiple of micro batch * dp.
        """
        problems = list(batch_problems(self.runner, self.actor, sizes.dp))
        if problems:
            raise ConfigError(problems)
        return -(-self.actor.global_batch_size // (self.rows_per_microbatch * sizes.dp))

    def architecture(self) -> Architecture | None:
        """The decoder that the file describes, or None if it gives neither `model_path` nor Hugging Face's keys.

        Raises:
          ConfigError: the folder does not exist, the family is not supported, or a field is missing or wrong.
        """
        return read_architecture(self.actor)[0]

    def lora(self) -> Lora | None:
        """The adapters of the decoder; None without is_lora.

        Raises:
          ConfigError: the folder lora_path cannot be read, or a setting is wrong.
        """
        return read_lora(self.actor.model)

    def check_train(self, sizes: MeshSizes, architecture: Architecture | None, *, own_rate: bool = False) -> None:
        """Checks everything that training needs and that `load_config` and `mesh_sizes` have not checked.

        Args:
          sizes: the mesh, from `mesh_sizes`.
          architecture: the built-in decoder's, or None for a user's own model, whose sizes are unknown here.
          own_rate: the learning rate is the caller's, and not from the file.

        Raises:
          ConfigError: with every problem found.
        """
        problems = list(checks.train_problems(self.runner, self.actor, sizes.dp, architecture, own_rate=own_rate))
        problems += [] if architecture is None else _problems_of(self.lora)
        problems += checks.algorithm_problems(self.algorithm)
        problems += data_problems(self.runner, self.data)
        problems += checks.user_model_problems(self.actor.model) if architecture is None else []
        if problems:
            raise ConfigError(problems)

    def prepare_train(self, num_devices: int, *, own_rate: bool = False) -> tuple[MeshSizes, Architecture | None]:
        """`mesh_sizes`, `architecture` and `check_train` in one call, so that their problems are reported together.

        Raises:
          ConfigError: with every problem found.
        """
        problems, architecture = list(checks.mesh_problems(self.actor.model, num_devices)), None
        try:
            architecture = self.architecture()
        except ConfigError as error:
            problems += error.problems
        dp = None if problems else self.mesh_sizes(num_devices).dp
        problems += checks.train_problems(self.runner, self.actor, dp, architecture, own_rate=own_rate)
        problems += _problems_of(self.lora)
        problems += checks.algorithm_problems(self.algorithm)
        problems += data_problems(self.runner, self.data)
        if problems:
            raise ConfigError(problems)
        return self.mesh_sizes(num_devices), architecture


def _problems_of(read: Callable[[], object]) -> list[str]:
    try:
        read()
    except ConfigError as error:
        return error.problems
    return []


def _ignored_note(ignored: Sequence[str]) -> str:
    groups: dict[str, list[str]] = {}
    for key in ignored:
        path, _, name = key.rpartition(".")
        groups.setdefault(path, []).append(name)
    listed = "; ".join(f"{path}: {', '.join(names)}" if path else ", ".join(names) for path, names in groups.items())
    return f"{len(ignored)} RLinf or Megatron-LM keys have no meaning in jaxpar and are ignored: {listed}"
