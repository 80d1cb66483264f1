"""Runs what the READMEs show: every command of every README, and the Python examples."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import JAXPAR, environment, run_jaxpar
from support import ROOT, readme_example, readmes

import jaxpar

COMMANDS = {
    (str(file.relative_to(ROOT)), line): None
    for file in readmes()
    for block in re.findall(r"```bash\n(.*?)```", file.read_text(), re.DOTALL)
    for line in block.strip().splitlines()
}


def kind(command: str) -> str:
    """The first word or two of a command, which decide how it is tested."""
    words = [word for word in shlex.split(command.rpartition("&& ")[2]) if not re.match(r"[A-Z_]+=", word)]
    return " ".join(words[:2]) if words[0] == "jaxpar" else words[0]


def cases(*kinds: str) -> list:
    """All commands of these kinds, without repetitions."""
    found = dict.fromkeys(line for _, line in COMMANDS if kind(line) in kinds)
    assert found, kinds
    return [pytest.param(line, id=line.replace("jaxpar ", "")[:60]) for line in found]


def compiling_cases() -> list:
    """Those of the first README are slow. The others give the tables of folders' READMEs: exhaustive."""
    first = {line for file, line in COMMANDS if file == "README.md"}
    return [
        pytest.param(
            *case.values, id=case.id, marks=pytest.mark.slow if case.values[0] in first else pytest.mark.exhaustive
        )
        for case in cases("jaxpar compile", "jaxpar bench")
    ]


HERE = {
    "jaxpar train", "jaxpar mesh", "jaxpar schedule", "jaxpar checkpoint", "jaxpar compile", "jaxpar bench", "jaxpar check",
    "pytest", "pip", "python", "pre-commit", "git",
    "sbatch", "tpu_gpu_scripts/mpi.sh", "tpu_gpu_scripts/ssh.sh", "tpu_gpu_scripts/tpu_pod.sh",
}  # fmt: skip


def test_every_command_is_of_a_kind_that_is_tested_here():
    assert {kind(line) for _, line in COMMANDS} <= HERE
    folders = {Path(file).parent.name for file, _ in COMMANDS}
    assert {"pipeline", "measure", "parallel", "backward", "step", "checkpoint", "run"} <= folders


def test_every_folder_has_a_readme_and_the_first_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    folders = [folder for folder in (ROOT / "jaxpar").iterdir() if (folder / "__init__.py").exists()]
    assert len(folders) > 10
    for folder in folders:
        text = (folder / "README.md").read_text()
        for file in re.findall(r"^\| `(\w+\.py)`", text, re.MULTILINE):
            assert (folder / file).exists(), (folder, file)
        named = set(re.findall(r"`(?:hlo/)?(\w+\.py)`", text))
        missing = {file.name for file in folder.glob("*.py") if file.name != "__init__.py"} - named
        assert not missing, f"{folder.name}/README.md does not name {missing}"


@pytest.mark.parametrize("command", cases("jaxpar mesh", "jaxpar schedule"))
def test_commands_that_end_at_once(command):
    run_jaxpar(command)


@pytest.mark.timeout(1200)  # several layouts in one command
@pytest.mark.parametrize("command", compiling_cases())
def test_commands_that_compile(command):
    """As written, except that `jaxpar bench` measures a single step on short sequences."""
    result = run_jaxpar(command + (" runner.seq_length=64 --steps 1" if "bench" in command else ""))
    assert "not counted" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", cases("jaxpar check"))
def test_commands_that_check(tmp_path, command):
    use_example(tmp_path)
    assert "verdict    the same" in run_jaxpar(command, cwd=tmp_path).stdout


@pytest.mark.slow
def test_commands_that_train(tmp_path):
    """One after the other in one folder, because some read what others wrote. Long ones train for two steps."""
    use_example(tmp_path)
    commands = dict.fromkeys(line for _, line in COMMANDS if kind(line) in ("jaxpar train", "jaxpar checkpoint"))
    for command in commands:
        command = command.rpartition("&& ")[2]
        if "jaxpar train" in command and "max_steps" not in command:
            command += " runner.max_steps=2"
        run_jaxpar(command, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", cases("pytest"))
def test_commands_that_test_find_their_tests(command):
    arguments = shlex.split(command.rpartition("&& ")[2])[1:]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    # With -q twice, pytest lists each file with the number of its tests.
    assert result.returncode == 0 and re.search(r"\.py: [1-9]", result.stdout), result.stdout + result.stderr


@pytest.mark.parametrize("command", cases("pip"))
def test_commands_that_install_name_an_extra_that_exists(command):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\.\[(\w+)\]", command):
        assert extra in extras


def test_scripts_exist():
    """`test_cluster.py` runs them under a real Slurm, Open MPI and sshd."""
    for _, line in COMMANDS:
        for script in re.findall(r"\b(?:tpu_gpu_scripts|tests)/\S+", line):
            assert (ROOT / script).exists(), line


def test_the_schedule_is_what_the_command_draws():
    text = (ROOT / "jaxpar/pipeline/README.md").read_text()
    ((command, shown),) = re.findall(r"```bash\n(jaxpar schedule [^\n]*)\n```\n\n```\n(.*?)```", text, re.DOTALL)
    assert run_jaxpar(command).stdout == shown


def test_the_error_is_what_the_command_says():
    ((command, shown),) = re.findall(
        r"```\n\$ (jaxpar [^\n]*)\n(error: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    result = subprocess.run([JAXPAR, *command.split()[1:]], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.endswith(shown)


def example() -> str:
    return readme_example("class MyModel")


def use_example(folder: Path) -> None:
    """Puts the example into `mine.py` of a folder with the configs."""
    (folder / "mine.py").write_text(example())
    (folder / "configs").symlink_to(ROOT / "configs")


def test_the_example_model_is_short():
    assert len(example().splitlines()) < 40


@pytest.mark.slow
def test_the_example_trains(tmp_path):
    use_example(tmp_path)
    result = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "step 20/20" in result.stdout
    assert (tmp_path / "results/mine/checkpoints/global_step_20").is_dir()


def test_the_example_has_the_same_gradients_on_pp2_tp2_cp2():
    names: dict = {"__name__": "readme"}
    exec(example(), names)
    results = []
    for tensor, pipeline, context in ((1, 1, 1), (2, 2, 2)):
        config = jaxpar.load_config(
            ROOT / "configs/quickstart.yaml",
            [
                f"actor.model.tensor_model_parallel_size={tensor}",
                f"actor.model.pipeline_model_parallel_size={pipeline}",
                f"actor.model.context_parallel_size={context}",
                "actor.model.sequence_parallel=False",
                "runner.resume_dir=null",
                f"cluster.num_gpus_per_node={tensor * pipeline * context}",
            ],
        )
        trainer = jaxpar.Trainer(config, model=names["MyModel"]())
        tokens = np.random.default_rng(0).integers(0, 512, (16, 129))
        mask = np.random.default_rng(1).random((16, 128)) < np.linspace(0, 1, 128)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}
        results.append(jax.tree.map(np.asarray, trainer.loss_and_grads(batch)))
    for one, many in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.linalg.norm(one - many) <= 1e-5 * np.linalg.norm(one)
