"""All processes of a run must have been given the same run. Otherwise they would train on together, each on its own.

What is compared goes through jax's coordinator, not through the devices, so that a difference is found before any of them is
asked for anything.
"""

import glob
import itertools
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # jax has no public access to its coordinator's key-value store

from jaxpar.config import Config, ConfigError

SECONDS = 60  # that a process is waited for; all have just met
PACKAGES = ("jaxpar", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# A process's own: who and where it is, and where it may write.
OWN_VARIABLES = (
    "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS", "JAX_LOCAL_DEVICE_IDS",
    "JAX_COMPILATION_CACHE_DIR", "JAX_CUDA_VISIBLE_DEVICES", "JAX_ROCM_VISIBLE_DEVICES", "JAX_DUMP_IR_TO",
)  # fmt: skip
MOST_LINES = 12
_rounds = itertools.count()


def check_alike(own: Mapping[str, Any]) -> None:
    """Compares what the processes were given. A collective call.

    Args:
      own: name → value, which JSON can hold; as in the other processes.

    Raises:
      ConfigError: in all processes, with each name that differs, its values, and the processes that have them.
    """
    state = distributed.global_state
    if state.client is None or state.num_processes == 1:
        return
    client: Any = state.client
    prefix, milliseconds = f"jaxpar/alike/{next(_rounds)}/", 1000 * SECONDS
    client.key_value_set(f"{prefix}{state.process_id}", json.dumps(own))
    if state.process_id == 0:
        given, silent = {0: dict(own)}, list[int]()
        for rank in range(1, state.num_processes):
            try:
                text = client.blocking_key_value_get(f"{prefix}{rank}", milliseconds if not silent else 1)
                given[rank] = json.loads(text)
            except jax.errors.JaxRuntimeError:
                silent.append(rank)
        problems = _differences(given)
        if silent:
            problems.append(f"process {_listed(silent)} did not say in {SECONDS} s what it was given: see its output")
        client.key_value_set(f"{prefix}verdict", json.dumps(problems))
    try:
        problems = json.loads(client.blocking_key_value_get(f"{prefix}verdict", 2 * milliseconds))
    except jax.errors.JaxRuntimeError:
        problems = [f"process 0 did not compare the processes in {2 * SECONDS} s: see its output"]
    if problems:
        raise ConfigError(problems)


def given_to_this_process(config: Config) -> dict[str, Any]:
    """Config, versions, environment and the sizes of the files that the config names; for `check_alike`."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_dump")]
    found = {name: value for name, value in variables.items() if name not in OWN_VARIABLES}
    found |= {"XLA_FLAGS": " ".join(sorted(flags))}
    found |= {f"version of {name}": version for name, version in versions().items()}
    for path in (*config.data.train_data_paths, *config.data.val_data_paths, *_other_files(config)):
        for file in sorted(glob.glob(path)) or [path]:
            found[f"file {file}"] = _size(Path(file).expanduser())
    return {**found, **flat(config.model_dump(mode="json"))}


def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts → {path with dots: leaf}. An empty dict is a leaf."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, below in value.items():
        found |= flat(below, f"{prefix}.{key}" if prefix else key)
    return found


def _other_files(config: Config) -> list[str]:
    model, tokenizer = config.actor.model, config.actor.tokenizer.tokenizer_model
    return [path for path in (model.model_path, model.lora_path, tokenizer) if path and path != "byte"]


def _size(path: Path) -> str:
    """Of a file, or of the files in a folder."""
    try:
        if not path.is_dir():
            return f"{path.stat().st_size} bytes"
        sizes = [file.stat().st_size for file in path.iterdir() if file.is_file()]
        return f"{len(sizes)} files of {sum(sizes)} bytes"
    except OSError as error:
        return os.strerror(error.errno or 0)


def _differences(given: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """A line for each name that has several values."""
    lines = []
    for name in dict.fromkeys(itertools.chain.from_iterable(given.values())):
        ranks: dict[str, list[int]] = {}
        for rank, values in given.items():
            ranks.setdefault(json.dumps(values[name]) if name in values else "not given", []).append(rank)
        if len(ranks) > 1:
            listed = ", ".join(f"{text[:80]} on process {_listed(who)}" for text, who in ranks.items())
            lines.append(f"{name} differs between the processes: {listed}: give all of them the same")
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], f"{more} more differ"] if more > 0 else lines


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
