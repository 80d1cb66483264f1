"""Whether a run that resumes is the run that wrote the checkpoint.

A manifest has every setting, the architecture, a fingerprint of the data and of the code. What may differ without another
meaning is a line for the user; whatever else differs is an error, unless `runner.resume_changes` names it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jaxpar.checkpoint.manifest import named_leaves
from jaxpar.config import Config
from jaxpar.config.architecture import Architecture
from jaxpar.config.keys import ArchitectureFields
from jaxpar.run.agreement import flat, versions

# Patterns of settings that change where, when and how fast, or that people turn between two starts of one run.
HARMLESS = (
    "cluster.*", "code", "versions.*", "data files", "data.num_workers", "data.val_data_paths",
    "runner.max_steps", "runner.max_epochs", "runner.*_interval", "runner.keep_*", "runner.verify_checkpoint",
    "runner.max_skipped_steps", "runner.stall_timeout", "runner.limit_val_batches", "runner.logger.*", "runner.max_tokens_per_mbs",
    "actor.micro_batch_size", "actor.model.*_parallel_size*", "actor.model.cp_comm_type", "actor.model.attention_backend",
    "actor.model.sequence_parallel", "actor.model.tp_comm_overlap", "actor.model.pipeline_schedule", "actor.model.recompute_*",
    "actor.model.offload_activations", "actor.model.make_vocab_size_divisible_by", "actor.model.max_position_embeddings", "actor.model.initializer_range",
    "actor.optim.use_distributed_optimizer", "actor.optim.zero_stage", "actor.optim.overlap_*", "actor.optim.optimizer_cpu_offload",
    "actor.optim.lr", "actor.optim.weight_decay", "actor.optim.clip_grad", "actor.lr_sched.*",
)  # fmt: skip
# Not compared: where the run is, which others say, and what `position_problems` or a fingerprint compares.
_ELSEWHERE = (
    "runner.output_dir", "runner.experiment_name", "runner.resume_dir", "runner.resume_changes", "actor.model.seq_length",
    "actor.global_batch_size", "runner.enable_dynamic_batch_size", "data.train_data_paths", "actor.tokenizer.*",
)  # fmt: skip
# Without effect on given batches.
_OF_DATA = ("data.seed", "data.shuffle", "data.text_key", "data.reset_attention_mask")
_OF_ARCHITECTURE = (
    *ArchitectureFields.model_fields, "model_path", "model_type", "activation", "normalization", "position_embedding_type",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "multi_latent_attention",
)  # fmt: skip

Described = Mapping[str, Any]


def describe(architecture: Architecture | None, data: Mapping[str, Any] | None) -> Described:
    """What the manifest says of a run beside its settings.

    Args:
      architecture: of the built-in decoder, with what its settings and config.json say together.
      data: from `jaxpar.run.datasets.fingerprint`; None if the batches are given.
    """
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    return _plain({"architecture": architecture and dataclasses.asdict(architecture), "data": data, "code": code})


def compare(path: Path, manifest: Mapping[str, Any], config: Config, own: Described) -> tuple[list[str], list[str]]:
    """Compares this run with the one that wrote a checkpoint.

    Returns:
      (notes, problems): lines about what is harmless or allowed, and about what is neither.
    """
    stored = manifest.get("run", {})
    before = _facts(manifest["config"], stored, other=own) | flat(manifest["versions"], "versions")
    after = _facts(_plain(config.model_dump()), own, other=stored) | flat(versions(), "versions")
    # Of settings that the checkpoint's jaxpar did not have.
    defaults = _facts(_plain(Config().model_dump()), {}, other={})
    changed = {
        name: (before.get(name, defaults.get(name)), after[name])
        for name in after
        if before.get(name, defaults.get(name)) != after[name]
    }
    allowed = {name for name in changed for entry in config.runner.resume_changes if f"{name}.".startswith(f"{entry}.")}
    harmless = {name for name in changed if any(fnmatch(name, pattern) for pattern in HARMLESS)}
    lines = [
        f"{name} {_short(old)} → {_short(new)}" for name, (old, new) in changed.items() if name in harmless | allowed
    ]
    notes = [f"changed since {path.name} was written: {', '.join(lines)}"] if lines else []
    if idle := [e for e in config.runner.resume_changes if not any(f"{name}.".startswith(f"{e}.") for name in allowed)]:
        notes.append(f"runner.resume_changes: {', '.join(idle)}: nothing of that name has changed")
    if own and not stored:
        notes.append(f"{path.name} does not say with which data and architecture it was written: they are not compared")
    problems = [
        f"{name}: {_short(new)}, but {path} was written with {_short(old)}: set it back, or, if it is meant, add {name} to "
        f"runner.resume_changes"
        for name, (old, new) in changed.items()
        if name not in harmless | allowed
    ]
    return notes, problems


def position_problems(path: Path, manifest: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Lines about settings with which the checkpoint's position in the data would mean something else."""
    batch, stored_batch = config.actor.global_batch_size, manifest["data"]["global_batch_size"]
    if batch != stored_batch:
        yield (
            f"actor.global_batch_size: {batch}, but {path} was written with {stored_batch}, and its data position "
            f"counts batches of that size: set it to {stored_batch}, or set runner.resume_dir: null for a new run"
        )
    dynamic = config.runner.enable_dynamic_batch_size
    stored = manifest["config"]["runner"].get("enable_dynamic_batch_size", False)
    if dynamic != stored:
        yield (
            f"runner.enable_dynamic_batch_size: {dynamic}, but {path} was written with {stored}, and its data "
            f"position counts {'documents' if stored else 'sequences'}: set it to {stored}, or set "
            f"runner.resume_dir: null for a new run"
        )


def tree_problems(path: Path, manifest: Mapping[str, Any], target: Any) -> list[str]:
    """A line for each of the first arrays that have another shape or dtype in the checkpoint.

    Args:
      target: tree of what has `shape` and `dtype`.
    """
    stored_tree = manifest["tree"]
    own_tree = {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in named_leaves(target)}
    different = sorted(
        name for name in stored_tree.keys() | own_tree.keys() if stored_tree.get(name) != own_tree.get(name)
    )
    count = f"{len(different)} differences in all"
    parts = sorted({name.partition("/")[0] for name in different})
    if "params" in parts:
        where, advice = "the model of this config", "resume with the config that it was written with"
    else:
        where, count = "this run", f"{count}, all in {' and '.join(parts)}: the parameters are the same"
        advice = "resume with the settings of actor.optim and actor.model.precision that it was written with"
    return [
        f"runner.resume_dir: {name} is {stored_tree.get(name, 'missing')} in {path} and {own_tree.get(name, 'missing')} in "
        f"{where} ({count}): {advice}, or set runner.resume_dir: null for a new run"
        for name in different[:3]
    ]


def _facts(settings: Mapping[str, Any], own: Described, other: Described) -> dict[str, Any]:
    """Name → value of all that is compared; what only one of the two runs can tell is left out."""
    facts, left_out = flat(settings), list(_ELSEWHERE)
    if (architecture := own.get("architecture")) and other.get("architecture"):
        left_out += [f"actor.model.{name}*" for name in _OF_ARCHITECTURE]
    facts = {name: value for name, value in facts.items() if not any(fnmatch(name, pattern) for pattern in left_out)}
    if architecture and other.get("architecture"):
        facts |= flat(architecture, "actor.model")
    if (data := own.get("data")) and other.get("data"):
        facts |= {"data": data.get("tokens"), "data files": data.get("files")}
        facts["actor.tokenizer.tokenizer_model"] = data.get("tokenizer")
    else:
        facts = {name: value for name, value in facts.items() if name not in _OF_DATA}
    return facts | ({"code": own.get("code")} if own and other else {})


def _plain(value: Any) -> Any:
    """As it will be when it has been written to JSON and read."""
    return json.loads(json.dumps(value, default=str))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:60]} … {text[-30:]}"
