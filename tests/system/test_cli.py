"""The command line as a new user sees it."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support import slow

CONFIGS = Path(__file__).parents[2] / "configs"
JAXPAR = Path(sys.executable).parent / "jaxpar"


def jaxpar(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([JAXPAR, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["train", CONFIGS / "quickstart.yaml", "actor.model.tensor_paralel=2"], "did you mean"),
        (
            ["train", CONFIGS / "quickstart.yaml", "runner.output_dir={tmp}", "data.train_data_paths=/no/x"],
            "/no/x",
        ),
        (["train", CONFIGS / "quickstart.yaml", "--profile", "10"], "'10' is not STEP:COUNT"),
        *slow(
            (["train", CONFIGS / "quickstart.yaml", "actor.model.tensor_model_parallel_size=3"], "4 / 3 = 1.33"),
            (
                ["train", CONFIGS / "quickstart.yaml", "actor.model.pipeline_schedule=zigzag"],
                "choose one of gpipe, 1f1b",
            ),
            (["train", CONFIGS / "quickstart.yaml", "--profile", "0:3"], "'0:3' is not STEP:COUNT"),
        ),
        (["mesh", CONFIGS / "quickstart.yaml", "actor.model.context_parallel_size=3"], "does not divide 16 devices"),
        (["bench", CONFIGS / "bench_small.yaml", "pp4,dp4"], "dp 4 * pp 4 = 16 devices, but there are 8"),
        (["bench", CONFIGS / "bench_small.yaml", "actor.micro_batch_size=3"], "16 is not a multiple of"),
        (["compile", CONFIGS / "quickstart.yaml", "--tpu", "v9z:2x2"], "'v9z:2x2' is not KIND:CHIPS"),
        (["compile", CONFIGS / "quickstart.yaml", "dp1", "dp2", "--hlo", "x"], "but 2 layouts are given"),
        (["compile", CONFIGS / "quickstart.yaml", "dp1", "dp2", "--where", "3"], "but 2 layouts are given"),
        (["compile", CONFIGS / "quickstart.yaml", "--tpu", "v5e:4x4", "--where", "3"], "leave out --where or --tpu"),
        (["schedule", "zigzag"], "choose one of gpipe, 1f1b"),
        (["schedule", "1f1b", "--stages", "0"], "at least one stage"),
        (["schedule", "1f1b", "--stages", "1", "--chunks", "2"], "2 chunks need at least two stages"),
        (["schedule", "1f1b", "--layers", "3"], "3 layers are too few for 4 stages x 1 chunks = 4 parts"),
        (["schedule", "1f1b", "--forward-cost=-1"], "--forward-cost -1, --backward-cost 1"),
        (["schedule", "1f1b", "--svg", "/no/such/folder.svg"], "--svg /no/such/folder.svg: cannot be written"),
    ],
)
def test_a_mistake_is_one_clear_error(tmp_path, arguments, words):
    result = jaxpar(*[str(argument).replace("{tmp}", str(tmp_path)) for argument in arguments])
    assert result.returncode == 2
    # If XLA's CUDA plugin is installed, it reports on standard error that it found no driver.
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert words in "\n".join(errors)
    assert "Traceback" not in result.stderr


def test_mesh_of_a_cluster_that_is_not_there():
    result = jaxpar("mesh", CONFIGS / "quickstart.yaml", "cluster.num_nodes=16", "cluster.num_gpus_per_node=8")
    assert result.returncode == 0
    assert "dp 16  pp 2  tp 1  sp 2  cp 2  = 128 devices" in result.stdout
    assert len(re.findall(r"│ +0 1 0 1 0 +(?=│)", result.stdout)) == 1  # each coordinate once
    # In a step, mlp 256 is split over a tensor group of 2. At rest, 4 layers are over pp 2, and 128 over dp 16 x cp 2.
    assert "layers/mlp/down" in result.stdout
    row = next(line for line in result.stdout.splitlines() if "layers/mlp/down" in line)
    assert "4 x 256 x 128" in row
    assert f"{4 * 256 * 128 * 4 // (2 * 2 * 32):,}" in row


def test_mesh_says_that_a_tensor_group_crosses_hosts():
    sizes = ["actor.model.tensor_model_parallel_size=4", "cluster.num_nodes=4", "cluster.num_gpus_per_node=4"]
    assert "crosses hosts" not in jaxpar("mesh", CONFIGS / "quickstart.yaml", *sizes).stdout
    sizes = ["actor.model.tensor_model_parallel_size=4", "cluster.num_nodes=8", "cluster.num_gpus_per_node=2"]
    assert "crosses hosts [0, 1]" in jaxpar("mesh", CONFIGS / "quickstart.yaml", *sizes).stdout


def test_mesh_says_what_uneven_stages_cost():
    quickstart = CONFIGS / "quickstart.yaml"
    assert "are padding" not in jaxpar("mesh", quickstart).stdout
    result = jaxpar("mesh", quickstart, "actor.model.num_hidden_layers=5")
    assert "layers: 5 on 2 stages: 3, 2; all parts compute as many" in result.stdout
    assert "1 of 6 computed layers are padding: 20.0% more time in layers" in result.stdout


def test_schedule_is_drawn_in_plain_lines():
    result = jaxpar("schedule", "1f1b", "--stages", "4", "--microbatches", "8")
    lines = result.stdout.splitlines()
    assert lines[:2] == [
        "stage 0 F0 F1 F2 F3 .. F4 .. F5 .. F6 B0 F7 B1 .. B2 .. B3 .. B4 B5 B6 B7",
        "stage 1 .. F0 F1 F2 .. F3 .. F4 B0 F5 B1 F6 B2 F7 B3 .. B4 .. B5 B6 B7 ..",
    ]
    assert "bubble: 27.3%" in result.stdout
    assert "in flight: 7, 5, 3, 1 microbatches" in result.stdout
    assert "\x1b" not in result.stdout


def test_schedule_with_costs_chunks_layers_and_a_picture(tmp_path):
    options = ["--stages", "2", "--microbatches", "4", "--chunks", "2", "--weight-cost", "0.5", "--layers", "6"]
    result = jaxpar("schedule", "zb1p", *options, "--svg", tmp_path / "picture.svg")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("stage 0 F0a F1a F0b F1b ")
    # ((M V + P - 1)(F + B) + M V W) / V = (9 x 2 + 8 x 0.5) / 2
    assert "time: 11, with F 1, B 1, W 0.5 for a microbatch on a stage; work 10, bubble 1" in result.stdout
    assert "layers: 6 on 2 stages x 2 chunks: 2+1, 2+1;" in result.stdout
    picture = ElementTree.parse(tmp_path / "picture.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("command", ["train", "mesh", "compile", "bench", "check", "schedule"])
def test_help_has_an_example(command):
    result = jaxpar(command, "--help")
    assert result.returncode == 0
    assert f"Example: jaxpar {command}" in result.stdout
