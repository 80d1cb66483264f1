"""`--model MODULE:NAME`: what a name may mean, what is said about mistakes, and the commands and launch scripts that take it."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import user_models
from runs import JAXPAR, QUICKSTART, ROOT, environment, metrics

from jaxpar.config import ConfigError, load_config
from jaxpar.models import FunctionalModel
from jaxpar.run.user_model import NamedModel

CONFIG = load_config(QUICKSTART)
DP_ONLY = [
    "actor.model.pipeline_model_parallel_size=1",
    "actor.model.tensor_model_parallel_size=1",
    "actor.model.sequence_parallel=False",
    "actor.model.context_parallel_size=1",
    "cluster.num_gpus_per_node=2",
]
MINE = """
from user_models import GPT, NoStack, Block

model = GPT()
number = 3
whole = lambda rngs: NoStack(rngs)

def build():
    return GPT()

def build_whole():
    return whole

def from_config(config):
    assert config.runner.seq_length == 128
    return GPT()

def with_default(attention=None):
    assert attention is None
    return GPT()

def returns_nothing(): pass
def returns_class(): return GPT
def returns_block():
    return "a long text " * 20
def raises():
    return 1 / 0
def exits():
    raise SystemExit(3)

class BadBlock(GPT):
    def block(self, rngs):
        return Block(rngs, wrong=1)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize(
    "name", ["model", "build", "from_config", "with_default", "whole", "build_whole", "GPT", "NoStack"]
)
def test_a_name_may_mean_a_model_or_what_builds_one(folder, name):
    (folder / "mine.py").write_text(MINE)
    for module in ("mine", "mine.py", f"{folder}/mine.py"):
        named = NamedModel(f"{module}:{name}")
        model = FunctionalModel(named.build(CONFIG))
        assert model.num_layers == (0 if name in ("whole", "build_whole", "NoStack") else 4)
        assert named.takes_config == (name == "from_config")


def test_a_module_in_a_package(folder):
    (folder / "own/models").mkdir(parents=True)
    (folder / "own/models/gpt.py").write_text(MINE)
    assert isinstance(NamedModel("own.models.gpt:build").build(CONFIG), user_models.GPT)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine", "--model mine: is not MODULE:NAME"),
        ("mine:", "is not MODULE:NAME"),
        ("nowhere:build", "there is no module nowhere, neither in the current folder {folder} nor"),
        ("mine.nowhere:build", "there is no module mine.nowhere, neither"),
        ("sub/nowhere.py:build", "there is no file {folder}/sub/nowhere.py"),
        ("needs:build", "importing needs raised ModuleNotFoundError: No module named 'not_installed' ({folder}/needs.py:2)"),
        ("needs.py:build", "importing needs.py raised ModuleNotFoundError: No module named 'not_installed'"),
        ("syntax:build", "importing syntax raised SyntaxError: '(' was never closed ({folder}/syntax.py:1)"),
        ("mine:biuld", "mine has no biuld (did you mean build?)"),
        ("mine:number", "int is no model: give a jaxpar.Stack, an object with the members of jaxpar.Model"),
        ("mine:returns_nothing", "returns_nothing() returned None: NoneType is no model"),
        ("mine:returns_class", "returns_class() returned <class 'user_models.GPT'>: GPT is a class: return an object of it"),
        ("mine:returns_block", "…: str is no model"),
        ("mine:raises", "raises() raised ZeroDivisionError: division by zero ({folder}/mine.py:27)"),
        ("mine:exits", "exits() raised SystemExit: 3 ({folder}/mine.py:29)"),
        ("mine:BadBlock", "building its modules raised TypeError: Block.__init__() got an unexpected keyword argument 'wrong'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder, name, words):
    (folder / "mine.py").write_text(MINE)
    (folder / "needs.py").write_text("\nimport not_installed\n")
    (folder / "syntax.py").write_text("build = (\n")
    with pytest.raises(ConfigError) as caught:
        NamedModel(name).build(CONFIG)
    (problem,) = caught.value.problems
    assert problem.startswith(f"--model {name}: ")
    assert words.format(folder=folder) in problem


# --- the commands -----------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    """In the folder of `user_models.py`, so that it can be imported."""
    return subprocess.run(
        [JAXPAR, *arguments], cwd=ROOT / "tests", env=environment(), capture_output=True, text=True, timeout=240
    )


def test_mesh_shows_the_parameters():
    result = run("mesh", QUICKSTART, "--model", "user_models:GPT")
    assert result.returncode == 0, result.stderr
    assert "layers/query/kernel" in result.stdout and "137,280 numbers" in result.stdout
    assert "the vocabulary" not in result.stdout  # of the decoder that the file describes


@pytest.mark.parametrize("command", ["train", "mesh", "compile", "bench", "check"])
def test_every_command_says_what_is_wrong_with_the_name(command):
    result = run(command, QUICKSTART, "--model", "user_models:GTP")
    assert result.returncode == 2
    assert "error: --model user_models:GTP: user_models has no GTP (did you mean GPT?)" in result.stderr
    assert "Traceback" not in result.stderr


TINY = """
import jax.numpy as jnp
from flax import nnx

class Tiny(nnx.Module):  # no random weights: they take long to compile
    def __init__(self, rngs):
        self.table = nnx.Param(jnp.eye(258, 16), out_sharding=("vocab", "embed"))

    def __call__(self, tokens, info):
        return self.table[...][tokens] @ self.table[...].T

table = jnp.zeros(3)  # asks jax for devices before the trainer does
"""


def test_train(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    settings = [*DP_ONLY, "runner.seq_length=32", "runner.max_steps=2", f"runner.output_dir={tmp_path}"]
    result = run("train", QUICKSTART, "--model", f"{tmp_path}/tiny.py:Tiny", *settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    assert "dp 2" in result.stdout and "model: 4,128 parameters" in result.stdout


@pytest.mark.slow
def test_bench():
    layouts = ["cluster.num_gpus_per_node=4", "runner.seq_length=32", "--steps", "1"]
    result = run("bench", QUICKSTART, "pp2,dp2", "cp2,dp2", *layouts, "--model", "user_models:GPT")
    assert result.returncode == 0, result.stderr
    assert "plain JAX, dp 4" in result.stdout and "pp2,dp2" in result.stdout
    result = run("bench", QUICKSTART, *layouts, *DP_ONLY, "--model", "user_models:NoStack")
    assert result.returncode == 0, result.stderr
    assert "MFU unknown (the useful FLOPs of your own model are not known)" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs pip install -e '.[compile]'")
def test_compile_for_absent_gpus():
    bf16 = "actor.model.precision=bf16"
    result = run("compile", QUICKSTART, "--model", "user_models:GPT", bf16, "--nodes", "2", "--gpus-per-node", "8")
    assert result.returncode == 0, result.stderr
    assert "executed; how many are useful is not known for your own model" in result.stdout
    assert "least time:" in result.stdout and "MFU" not in result.stdout


# --- the launch scripts -----------------------------------------------------------------------------------------------

STAND_INS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": "echo StdOut=log",
    # Runs the last part of its arguments: `bash -c RANK - jaxpar train …`, as rank 0.
    "mpirun": 'while [[ $1 != bash ]]; do shift; done; OMPI_COMM_WORLD_RANK=0 exec "$@"',
    "own_ssh": 'shift; exec bash -c "$*"',
    "gcloud": 'for last; do :; done; exec bash -c "${last#--command=}"',
    "jaxpar": 'printf "%s\\n" "$@" >arguments.txt',
}


@pytest.mark.parametrize("script", ["slurm.sbatch", "mpi.sh", "ssh.sh", "tpu_pod.sh"])
def test_a_launch_script_passes_the_model_on(tmp_path, script):
    (tmp_path / "bin").mkdir()
    (tmp_path / "jaxpar").mkdir()  # JAXPAR_FOLDER of tpu_pod.sh
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    variables = environment(
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}", JAXPAR_ENV=str(tmp_path), JAXPAR_HOSTS="node0", JAXPAR_SSH="own_ssh",
        SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="node0", JAXPAR_NODES="1",
    )  # fmt: skip
    command = [
        "bash",
        ROOT / "tpu_gpu_scripts" / script,
        "my.yaml",
        "--model",
        "my models.py:build",
        "runner.max_steps=3",
    ]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    (written,) = wait_for(tmp_path, "arguments.txt")
    assert written.read_text().splitlines() == [
        *["train", "my.yaml", "cluster.num_nodes=1", "runner.resume_dir=auto"],
        *["--model", "my models.py:build", "runner.max_steps=3"],
    ]


def wait_for(folder: Path, name: str) -> list[Path]:
    """A file that a process in the background writes (`tpu_pod.sh`)."""
    deadline = time.monotonic() + 10
    while not (found := [path for path in folder.rglob(name) if path.read_text().count("\n") == 7]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found
