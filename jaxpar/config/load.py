"""YAML in RLinf's shape, with Megatron-LM's key names → one typed, validated `Config`. No jax in here.

`load_config` reads the file, resolves its interpolations and validates names and types; `Config.mesh_sizes` and
`Config.check_train` do the arithmetic that needs the number of devices. All raise `ConfigError` with every problem
that they can see; each names the key, shows the arithmetic and says what to change.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import PrivateAttr, ValidationError

from jaxpar.config import checks
from jaxpar.config.architecture import Architecture, read_architecture
from jaxpar.config.keys import (
    FOREIGN_KEYS,
    OPAQUE_SECTIONS,
    Actor,
    Cluster,
    ConfigError,
    Data,
    Runner,
    Section,
    describe_error,
)


@dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of the mesh. One of `tp` and `sp` is the tensor group, the other is 1."""

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
        """Axis name → size, in the mesh's order of names."""
        return asdict(self)


class Config(Section):
    """A whole config file, typed. Get one from `load_config` or `config_from_dict`."""

    cluster: Cluster = Cluster()
    runner: Runner = Runner()
    data: Data = Data()
    actor: Actor = Actor()
    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def output_path(self) -> Path:
        """Folder of this experiment's checkpoints and metrics: `output_dir/experiment_name`."""
        return Path(self.runner.output_dir) / self.runner.experiment_name

    @property
    def notes(self) -> list[str]:
        """What to tell the user once: ignored foreign keys, and everything that was filled in or padded for them."""
        model, sched = self.actor.model, self.actor.lr_sched
        notes = [_ignored_note(self._ignored)] if self._ignored else []
        if sched.lr_decay_style != "constant" and sched.lr_decay_iters is None and self.runner.max_steps > 0:
            notes.append(f"actor.lr_sched.lr_decay_iters is not given: it is runner.max_steps, {self.runner.max_steps}")
        if absent := [name for name in self.runner.logger.logger_backends or () if name != "tensorboard"]:
            notes.append(
                f"runner.logger.logger_backends: {', '.join(absent)} is not there: metrics go to metrics.jsonl, and with "
                f"tensorboard in the list to its files"
            )
        if self.runner.enable_dynamic_batch_size:
            notes.append(
                f"runner.enable_dynamic_batch_size: a microbatch is a row of max_tokens_per_mbs * context_parallel_size = "
                f"{self.row_length} tokens; runner.seq_length and actor.micro_batch_size have no effect"
            )
        try:
            architecture, more = read_architecture(self.actor)
        except ConfigError:  # check_train and architecture() report it
            return notes
        if architecture is None:
            return notes
        notes += more
        vocab, padded = architecture.vocab_size, architecture.padded_vocab_size
        if padded != vocab:
            notes.append(
                f"the vocabulary of {vocab} is padded to {padded}, a multiple of "
                f"actor.model.make_vocab_size_divisible_by: {model.make_vocab_size_divisible_by}"
            )
        tensor, kv_heads = model.tensor_model_parallel_size, architecture.num_key_value_heads
        if tensor > kv_heads and tensor % kv_heads == 0:
            notes.append(
                f"kv heads are repeated: each of {kv_heads} is held by {tensor // kv_heads} of "
                f"{tensor} tensor-parallel devices"
            )
        if 0 < architecture.max_position_embeddings < self.row_length:
            length = "documents up to" if self.runner.enable_dynamic_batch_size else "runner.seq_length"
            notes.append(
                f"{length} {self.row_length} is beyond the model's max_position_embeddings "
                f"{architecture.max_position_embeddings}"
            )
        return notes

    @property
    def zero_stage(self) -> int:
        """Stage of ZeRO, 0 to 3."""
        optim = self.actor.optim
        return int(optim.use_distributed_optimizer) if optim.zero_stage is None else optim.zero_stage

    @property
    def row_length(self) -> int:
        """Tokens in a row of a batch: `seq_length`, or with dynamic batches the budget of all cp ranks together."""
        if not self.runner.enable_dynamic_batch_size:
            return self.runner.seq_length
        return (self.runner.max_tokens_per_mbs or 0) * self.actor.model.context_parallel_size

    @property
    def rows_per_microbatch(self) -> int:
        """Of one dp rank."""
        return 1 if self.runner.enable_dynamic_batch_size else self.actor.micro_batch_size

    def num_configured_devices(self) -> int | None:
        """Devices that the file asks for; None if `cluster.num_gpus_per_node` is null: then ask the runtime."""
        per_node = self.cluster.num_gpus_per_node
        return None if per_node is None else self.cluster.num_nodes * per_node

    def mesh_sizes(self, num_devices: int) -> MeshSizes:
        """The five sizes on `num_devices` devices; `dp` is what the others leave.

        Raises:
          ConfigError: sequence parallelism without a tensor group, or sizes that do not divide the devices.
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
        """Microbatches that each pipeline runs in one optimizer step: global batch / (micro batch * dp). With dynamic
        batches the most that it may run: as many as a dp rank has documents.

        Raises:
          ConfigError: a batch size is missing, or they do not divide.
        """
        problems = list(checks.batch_problems(self.runner, self.actor, sizes.dp))
        if problems:
            raise ConfigError(problems)
        return -(-self.actor.global_batch_size // (self.rows_per_microbatch * sizes.dp))

    def architecture(self) -> Architecture | None:
        """The decoder that the file describes; None if it gives neither `model_path` nor Hugging Face fields.

        Raises:
          ConfigError: no such folder, a family that is not there yet, or a field missing or wrong.
        """
        return read_architecture(self.actor)[0]

    def check_train(self, sizes: MeshSizes, architecture: Architecture | None) -> None:
        """All that training asks beyond what `load_config` and `mesh_sizes` have checked.

        Args:
          sizes: the mesh, from `mesh_sizes`.
          architecture: the built-in decoder's, or None for a user's own model, whose sizes are not known here.
        Raises:
          ConfigError: with every problem found.
        """
        problems = list(checks.train_problems(self.runner, self.actor, sizes.dp, architecture))
        if problems:
            raise ConfigError(problems)

    def prepare_train(self, num_devices: int) -> tuple[MeshSizes, Architecture | None]:
        """`mesh_sizes`, `architecture` and `check_train` in one, so that the problems of all three come at once."""
        problems, architecture = list(checks.mesh_problems(self.actor.model, num_devices)), None
        try:
            architecture = self.architecture()
        except ConfigError as error:
            problems += error.problems
        dp = None if problems else self.mesh_sizes(num_devices).dp
        problems += checks.train_problems(self.runner, self.actor, dp, architecture)
        if problems:
            raise ConfigError(problems)
        return self.mesh_sizes(num_devices), architecture


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file.

    Args:
      path: the file. Interpolation is OmegaConf's, with RLinf's resolvers; Hydra's `defaults` may name files beside it.
      overrides: `key.path=value` each, the value in YAML; they win over the file.
    Raises:
      ConfigError: with every problem of the file and of the overrides.
    """
    problems: list[str] = []
    values = _read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            problems.append(f"override {override!r}: expected key.path=value, such as runner.max_steps=100")
            continue
        try:
            parsed = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)
            assert isinstance(parsed, dict)
            OmegaConf.update(values, key, parsed["value"], merge=True)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problems.append(f"override {override!r}: {_first_line(error)}")
    return _build(values, problems)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The same from nested dicts: what `load_config` gives for a file with these contents.

    Raises:
      ConfigError: with every problem.
    """
    try:
        return _build(OmegaConf.create(dict(values)), [])
    except OmegaConfBaseException as error:
        raise ConfigError([f"{getattr(error, 'full_key', '')}: {_first_line(error)}"]) from None


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """One file, over the files beside it that its Hydra `defaults` name."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                [
                    f"{path}: expected sections (cluster, runner, data, actor) at the top, got a plain "
                    f"{'list' if isinstance(root, yaml.SequenceNode) else 'value'}"
                ]
            )
        values: Any = OmegaConf.create(text)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file: give the path of a YAML file"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: is a directory: give the path of a YAML file in it"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read as text: {error}"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError([f"{path}: not YAML{place}: {what}: correct it there"]) from None
    except OmegaConfBaseException as error:
        raise ConfigError([f"{path}: {getattr(error, 'full_key', '')}: {_first_line(error)}"]) from None
    if path.resolve() in above:
        raise ConfigError([f"{path}: its defaults name itself: remove that entry"])
    merged: Any = OmegaConf.create({})
    for entry in values.get("defaults") or []:
        name, _, package = (entry if isinstance(entry, str) else next(iter(entry), "")).partition("@")
        section, _, key = package.rpartition(".")
        if package and key not in FOREIGN_KEYS.get(section, ()) and package.split(".")[0] not in OPAQUE_SECTIONS:
            raise ConfigError(
                [
                    f"{path}: defaults: {entry} would be composed by Hydra, which is not in here: write the "
                    f"keys of {package} out in the file"
                ]
            )
        if isinstance(entry, str) and not package and name != "_self_":
            merged = OmegaConf.merge(merged, _read_yaml(path.parent / f"{name}.yaml", (*above, path.resolve())))
    merged = OmegaConf.merge(merged, values)
    return merged


def _register_resolvers() -> None:
    resolvers: dict[str, Callable[..., Any]] = {
        "multiply": lambda x, y: x * y,
        "int_div": lambda x, y: x // y,
        "subtract": lambda x, y: x - y,
        "not": lambda x: not x,
        "torch.dtype": lambda name: name,  # RLinf makes a torch.dtype of it; the name is all that we need
        "now": lambda pattern="%Y-%m-%d": time.strftime(pattern),  # Hydra's
    }
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)  # its name from OmegaConf 2.4
    for name, resolver in resolvers.items():
        register(name, resolver, replace=True)


def _build(values: DictConfig, problems: list[str]) -> Config:
    """Resolves and validates, and collects everything that is wrong before it raises."""
    _register_resolvers()
    ignored: list[str] = []
    suspects: set[str] = set()  # keys whose value is not what the user meant
    plain = _resolve(values, "", ignored, problems, suspects)
    try:
        config = Config.model_validate(plain)
    except ValidationError as error:
        for e in error.errors():
            problems.append(describe_error(e, suspects))
            _drop(plain, e["loc"])
        config = Config.model_validate(plain)
    if config.actor.model.seq_length and not config.runner.seq_length:  # as in RLinf's supervised files
        config = config.model_copy(
            update={"runner": config.runner.model_copy(update={"seq_length": config.actor.model.seq_length})}
        )
    config._ignored = tuple(ignored)
    if problems and (config.actor.micro_batch_size or config.actor.global_batch_size):  # not reinforcement learning
        # The arithmetic too, so that nobody mends a file in two rounds; not where a suspect key has a part in it.
        try:
            config.prepare_train(
                config.num_configured_devices()
                or config.actor.model.tensor_model_parallel_size
                * config.actor.model.pipeline_model_parallel_size
                * config.actor.model.context_parallel_size
            )
        except ConfigError as error:
            problems += [p for p in error.problems if not suspects & set(re.findall(r"\w+", p))]
    if problems:
        raise ConfigError(problems)
    return config


def _resolve(
    node: DictConfig, path: str, ignored: list[str], problems: list[str], suspects: set[str]
) -> dict[str, Any]:
    """Plain dicts without foreign keys, interpolations resolved. Foreign ones may point nowhere: never looked at."""
    plain: dict[str, Any] = {}
    for name in node:
        key = str(name)
        where = f"{path}.{key}".lstrip(".")
        if key in (FOREIGN_KEYS.get(path, ()) if path else OPAQUE_SECTIONS):
            ignored.append(where)
            continue
        try:
            value = node[name]
            if isinstance(value, ListConfig):
                value = OmegaConf.to_container(value, resolve=True)
        except MissingMandatoryValue:
            problems.append(f"{where}: is ???, which stands for a value still to be given: give one")
            suspects.add(key)
            continue
        except OmegaConfBaseException as error:
            raw: Any = OmegaConf.to_container(node, resolve=False)
            problems.append(
                f"{where}: {raw[name]} cannot be resolved: {_first_line(error)}: correct it, or give a value"
            )
            suspects.add(key)
            continue
        if isinstance(value, DictConfig):
            value = _resolve(value, where, ignored, problems, suspects)
        plain[key] = value
    return plain


def _drop(plain: dict[str, Any], loc: Sequence[Any]) -> None:
    """Removes what is at `loc`, or the first thing on the way to it that is no section (a list with a bad element)."""
    for part in loc[:-1]:
        if not isinstance(plain[part], dict) or part == "rope_scaling":
            loc = (part,)
            break
        plain = plain[part]
    plain.pop(loc[-1], None)


def _ignored_note(ignored: Sequence[str]) -> str:
    groups: dict[str, list[str]] = {}
    for key in ignored:
        path, _, name = key.rpartition(".")
        groups.setdefault(path, []).append(name)
    listed = "; ".join(f"{path}: {', '.join(names)}" if path else ", ".join(names) for path, names in groups.items())
    return f"{len(ignored)} RLinf or Megatron keys mean nothing here and are ignored: {listed}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
