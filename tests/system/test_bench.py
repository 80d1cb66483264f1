"""`jaxpar bench`, on a model small enough for a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JAXPAR = Path(sys.executable).parent / "jaxpar"
SMALL = [
    "runner.seq_length=64",
    "cluster.num_gpus_per_node=4",
    "actor.global_batch_size=8",
    "actor.model.hidden_size=32",
    "actor.model.intermediate_size=64",
    "actor.model.num_hidden_layers=4",
    "actor.model.num_attention_heads=4",
    "actor.model.num_key_value_heads=2",
    "actor.model.vocab_size=256",
]


def bench(tmp_path: Path, *arguments: str) -> tuple[str, object]:
    command = [JAXPAR, "bench", ROOT / "configs/bench_small.yaml", *SMALL, *arguments, "--json", tmp_path / "out.json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((tmp_path / "out.json").read_text())


def test_a_config_is_measured(tmp_path):
    text, figures = bench(tmp_path, "actor.model.tensor_model_parallel_size=2", "--steps", "5")
    assert "MFU unknown" in text and "tokens/s" in text
    seconds = figures["step_seconds"]
    assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
    assert figures["tokens_per_second"] == pytest.approx(8 * 64 / seconds["median"])
    assert figures["tokens_per_second_per_device"] == pytest.approx(figures["tokens_per_second"] / 4)
    assert figures["mfu"] is None and figures["measured_peak"] is None  # unknown for a CPU
    assert figures["mesh"] == {"dp": 2, "pp": 1, "tp": 2, "sp": 1, "cp": 1}
    memory = figures["memory"]
    assert memory["peak"] >= memory["temporaries"] > 0
    assert 0.3 < figures["model_flops"] / figures["flops"] < 1
    assert 0 < figures["loss"] < 5.6  # ln 256 is 5.55, and the model has seen the same tokens seven times


@pytest.mark.slow
@pytest.mark.alone
def test_layouts_are_compared_and_train_alike(tmp_path):
    text, rows = bench(tmp_path, "dp4", "sp2,dp2", "pp2,dp2,microbatches=4", "--steps", "2")
    assert [row["name"] for row in rows] == [
        "one device",
        "plain JAX, dp 4",
        "dp4",
        "sp2,dp2",
        "pp2,dp2,microbatches=4",
    ]
    assert [row["microbatches"] for row in rows] == [4, None, 1, 2, 4]
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx([losses[1]] * 5, rel=1e-5)
    assert all(row["cpu_seconds"] > 0 and row["wall_seconds"] > 0 and row["temporaries"] > 0 for row in rows)
    one, plain, dp, sp, pp = (row["flops"] for row in rows)
    assert [one, dp, sp] == pytest.approx([plain] * 3, rel=0.01)  # the same products, each executed once
    assert 0.99 < pp / plain < 1.1 * (4 + 2 - 1) / 4  # the bubble is the only extra work
    assert "sp2,dp2" in text
