"""What the README shows, run."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import readme_example

import jaxpar
from jaxpar.measure.layouts import layout_overrides, split_arguments

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def example() -> str:
    return readme_example("class MyModel")


def test_the_example_model_is_short():
    assert len(example().splitlines()) < 40


@pytest.mark.slow
def test_the_example_trains(tmp_path):
    (tmp_path / "mine.py").write_text(example())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    result = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
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


def test_the_schedule_is_what_the_command_draws():
    ((command, shown),) = re.findall(r"```bash\n(jaxpar schedule [^\n]*)\n```\n\n```\n(.*?)```", README, re.DOTALL)
    script = Path(sys.executable).parent / "jaxpar"
    result = subprocess.run([script, *command.split()[1:]], capture_output=True, text=True, timeout=120)
    assert result.stdout == shown


def test_the_layouts_of_the_readme_fit_their_configs():
    found = 0
    for path, rest in re.findall(r"^jaxpar (?:compile|bench) (\S+\.yaml)(.*)$", README, re.MULTILINE):
        nodes = re.search(r"--nodes (\d+)", rest)
        config = jaxpar.load_config(ROOT / path, [f"cluster.num_nodes={nodes[1]}"] if nodes else [])
        for layout in split_arguments(re.sub(r"--\w+ \S+", "", rest).split())[1]:
            jaxpar.load_config(ROOT / path, layout_overrides(layout, config, config.num_configured_devices()))
            found += 1
    assert found >= 10


def test_the_readme_commands_parse():
    """Every `jaxpar …` command of the README, with `train` turned into `mesh` so that it ends at once."""
    commands = re.findall(r"^(?:pip install -e \. && )?(jaxpar (?:train|mesh|schedule) .*)$", README, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        arguments = command.replace("jaxpar train", "jaxpar mesh").split()[1:]
        script = Path(sys.executable).parent / "jaxpar"
        result = subprocess.run([script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, (command, result.stderr)
