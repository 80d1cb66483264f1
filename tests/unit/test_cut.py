"""A config cut down for `jaxpar check`: it fits on 16 devices, and what is special about it stays."""

import math
from pathlib import Path

import pytest

from jaxpar.config import load_config
from jaxpar.measure.cut import MOST_DEVICES, cut_down, fewer_devices

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE = CONFIGS / "llama3_70b_16nodes_8k.yaml"  # dp 4, pp 4, sp 8


def cut(path: Path, *overrides: str):
    config = load_config(path, overrides)
    small, notes = cut_down(config, config.num_configured_devices())
    return config, small, "\n".join(notes)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_axis_and_every_choice_of_a_shipped_config_stays(path):
    config, small, notes = cut(path)
    count = small.num_configured_devices()
    assert count <= MOST_DEVICES
    before, (after, architecture) = config.mesh_sizes(config.num_configured_devices()), small.prepare_train(count)
    for axis, size in before.as_dict().items():
        assert (size > 1) == (getattr(after, axis) > 1) and getattr(after, axis) <= size
        assert f"{axis} {size} → {getattr(after, axis)}" in notes or size == getattr(after, axis)
    assert "NOT CHECKED" not in notes
    for key in ("pipeline_schedule", "cp_comm_type", "recompute_granularity", "tp_comm_overlap", "model_type"):
        assert getattr(small.actor.model, key) == getattr(config.actor.model, key)
    assert (small.zero_stage, small.actor.model.precision) == (config.zero_stage, "fp32")
    shared = [a.num_attention_heads > a.num_key_value_heads for a in (config.architecture(), architecture)]
    assert shared[0] == shared[1]
    assert small.runner.seq_length <= 256 and architecture.hidden_size <= 64


@pytest.mark.parametrize(
    ("sizes", "fewer"),
    [
        ((2, 2, 2, 2), (2, 2, 2, 2)),
        ((64, 4, 4, 1), (2, 4, 2, 1)),
        ((8, 1, 1, 8), (2, 1, 1, 8)),
        ((1, 1, 8, 8), (1, 1, 4, 4)),
        ((3, 6, 3, 1), (1, 3, 3, 1)),
        ((5, 5, 5, 1), (1, 5, 1, 1)),
    ],
)
def test_fewer_devices(sizes, fewer):
    names = ("dp", "pp", "tensor", "cp")
    result = fewer_devices(dict(zip(names, sizes, strict=True)))
    assert math.prod(result.values()) <= MOST_DEVICES
    assert tuple(result.values()) == fewer


def test_an_axis_that_cannot_stay_is_named():
    sizes = ["cluster.num_nodes=5", "cluster.num_gpus_per_node=25", "actor.model.pipeline_model_parallel_size=5"]
    more = [
        "actor.model.tensor_model_parallel_size=5",
        "actor.model.sequence_parallel=False",
        "actor.global_batch_size=40",
    ]
    _, _, notes = cut(LARGE, *sizes, *more, "actor.model.num_attention_heads=40", "actor.model.num_key_value_heads=40",
                      "actor.model.hidden_size=5120", "actor.model.intermediate_size=5120",
                      "actor.model.make_vocab_size_divisible_by=25")  # fmt: skip
    assert "NOT CHECKED: dp" in notes


def test_uneven_layers_and_chunks_stay():
    chunks = "actor.model.virtual_pipeline_model_parallel_size=2"
    _, small, notes = cut(LARGE, "actor.model.num_hidden_layers=81", chunks, "actor.model.pipeline_schedule=zb1p")
    assert small.actor.model.virtual_pipeline_model_parallel_size == 2
    assert small.actor.model.num_hidden_layers == 2 * 4 * 2 + 1
    assert "num_hidden_layers 81 → 17" in notes


def test_repeated_kv_heads_and_a_window_stay():
    overrides = [
        "actor.model.num_key_value_heads=2",
        "actor.model.model_type=mistral",
        "actor.model.sliding_window=4096",
    ]
    _, small, _ = cut(LARGE, *overrides)
    architecture, tensor = small.architecture(), small.actor.model.tensor_model_parallel_size
    assert architecture.num_key_value_heads < tensor
    assert architecture.sliding_window < small.runner.seq_length


def test_a_part_of_the_layers_is_recomputed_as_before():
    block = "actor.model.recompute_method=block"
    for number, fewer in ((5, 1), (20, 2)):  # of 20 in a stage
        _, small, _ = cut(LARGE, block, f"actor.model.recompute_num_layers={number}")
        assert small.actor.model.recompute_num_layers == fewer


def test_dynamic_batches_become_rows():
    dynamic = ["runner.enable_dynamic_batch_size=True", "runner.max_tokens_per_mbs=8192"]
    _, small, notes = cut(LARGE, *dynamic)
    assert not small.runner.enable_dynamic_batch_size and small.runner.seq_length == 64
    assert "enable_dynamic_batch_size → one row" in notes
