"""Small training runs of the quickstart: in this process, and as processes of their own."""

import functools
import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import jaxpar

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/quickstart.yaml"
JAXPAR = Path(sys.executable).parent / "jaxpar"
# A smaller decoder than the quickstart's, for runs that test everything around the model.
SMALL = [
    "runner.seq_length=32",
    "actor.model.hidden_size=32",
    "actor.model.intermediate_size=48",
    "actor.lr_sched.lr_decay_iters=20",
    "actor.micro_batch_size=1",
]
# Tensor group size, stages, sequence parallelism, cp, devices; more settings.
LAYOUTS: dict[str, tuple] = {
    "one": (1, 1, False, 1, 1),
    "dp4": (1, 1, False, 1, 4),
    "zero3": (1, 1, False, 1, 4, "actor.optim.zero_stage=3"),
    "all": (2, 2, True, 2, 16),
    "pp4-tp2": (2, 4, False, 1, 8),
    "interleaved": (
        1, 2, False, 1, 4, "actor.model.pipeline_schedule=interleaved_1f1b",
        "actor.model.virtual_pipeline_model_parallel_size=2",
    ),
    "cp4": (1, 1, False, 4, 8),
    "sp4": (4, 1, True, 1, 8),
    "two": (2, 2, True, 1, 8),
}  # fmt: skip


def layout(name: str) -> list[str]:
    tensor, pipeline, sequence, context, devices, *more = LAYOUTS[name]
    return [
        f"actor.model.tensor_model_parallel_size={tensor}",
        f"actor.model.pipeline_model_parallel_size={pipeline}",
        f"actor.model.sequence_parallel={sequence}",
        f"actor.model.context_parallel_size={context}",
        f"cluster.num_gpus_per_node={devices}",
        *more,
    ]


def fit(folder: Path, *overrides: str) -> jaxpar.Trainer:
    trainer = jaxpar.Trainer(jaxpar.load_config(QUICKSTART, [f"runner.output_dir={folder}", *overrides]))
    trainer.fit()
    return trainer


def metrics(folder: Path, experiment: str = "quickstart") -> list[dict]:
    return [json.loads(line) for line in (folder / experiment / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, experiment: str = "quickstart") -> list[float]:
    return [row["loss"] for row in metrics(folder, experiment)]


def assert_same_state(a: jaxpar.Trainer, b: jaxpar.Trainer) -> None:
    pairs = zip(jax.tree_util.tree_leaves_with_path(a.state), jax.tree.leaves(b.state), strict=True)
    for (path, left), right in pairs:
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=jax.tree_util.keystr(path))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", **more}


def start(folder: Path, *overrides: str, **variables: str) -> subprocess.Popen:
    """Starts `jaxpar train` in a process of its own. Its `stdout` is text and includes the errors."""
    return start_command(train_command(folder, *overrides), **variables)


def start_two(folder: Path, *overrides: str, **variables: str) -> list[subprocess.Popen]:
    """Starts one run as two processes, with ranks 0 and 1."""
    return start_ranks([train_command(folder, *overrides)] * 2, **variables)


def start_ranks(
    commands: Sequence[list],
    folders: Sequence[Path | None] = (),
    own: Sequence[dict[str, str]] = (),
    **variables: str,
) -> list[subprocess.Popen]:
    """Starts one run as several processes, each with a command of its own, and if given a working folder and variables."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(commands)), **variables}
    ranks = itertools.zip_longest(commands, folders, own)
    return [
        start_command(command, folder, **place, JAX_PROCESS_ID=str(rank), **(more or {}))
        for rank, (command, folder, more) in enumerate(ranks)
    ]


def train_command(folder: Path, *overrides: str) -> list:
    return [JAXPAR, "train", QUICKSTART, f"runner.output_dir={folder}", *overrides]


def start_command(command: list, folder: Path | None = None, **variables: str) -> subprocess.Popen:
    env = environment(**variables)
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@functools.cache
def run_jaxpar(command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a command line from a README that begins with `jaxpar`; it must succeed."""
    arguments = shlex.split(command)[1:]
    result = subprocess.run(
        [JAXPAR, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, (command, result.stdout[-2000:], result.stderr[-2000:])
    return result
