"""Layouts on the command line: the settings they stand for, and the errors for wrong ones."""

from pathlib import Path

import pytest

from jaxpar.config import ConfigError, MeshSizes, load_config
from jaxpar.measure.layouts import layout_overrides, one_device, split_arguments

FILE = Path(__file__).parents[2] / "configs/bench_small.yaml"
CONFIG = load_config(FILE)


def sizes_of(text: str) -> tuple[MeshSizes, int, int]:
    """Mesh, micro batch size and microbatches of a layout on 8 devices."""
    config = load_config(FILE, layout_overrides(text, CONFIG, 8))
    sizes = config.mesh_sizes(8)
    return sizes, config.actor.micro_batch_size, config.num_microbatches(sizes)


@pytest.mark.parametrize(
    ("text", "sizes", "micro_batch", "microbatches"),
    [
        ("dp8", MeshSizes(8, 1, 1, 1, 1), 2, 1),
        ("tp2,dp4", MeshSizes(4, 1, 2, 1, 1), 2, 2),
        ("sp2", MeshSizes(4, 1, 1, 2, 1), 2, 2),
        ("cp2,dp4,microbatches=1", MeshSizes(4, 1, 1, 1, 2), 4, 1),
        ("pp4,dp2,schedule=gpipe,microbatches=8", MeshSizes(2, 4, 1, 1, 1), 1, 8),
        ("microbatches=4,cp2,sp2,pp2", MeshSizes(1, 2, 1, 2, 2), 4, 4),
    ],
)
def test_a_layout_is_a_mesh_and_its_microbatches(text, sizes, micro_batch, microbatches):
    assert sizes_of(text) == (sizes, micro_batch, microbatches)


def test_schedule_and_chunks():
    settings = layout_overrides("pp4,dp2,schedule=interleaved_1f1b,chunks=2", CONFIG, 8)
    assert "actor.model.pipeline_schedule=interleaved_1f1b" in settings
    assert "actor.model.virtual_pipeline_model_parallel_size=2" in settings
    assert not [line for line in layout_overrides("dp8", CONFIG, 8) if "pipeline_schedule" in line]


def test_one_device():
    config = load_config(FILE, ["actor.model.pipeline_model_parallel_size=4", *one_device(CONFIG)])
    assert config.num_configured_devices() == 1 and config.mesh_sizes(1) == MeshSizes(1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dp8,zz2", "layout 'dp8,zz2': 'zz2' is not a part of a layout"),
        ("runner.max_steps", "'runner.max_steps' is not"),
        ("dp0", "'dp0' is not"),
        ("dp2,dp4", "dp is given twice"),
        ("tp2,sp2,dp2", "tp and sp are one tensor group"),
        ("pp4,dp4", "dp 4 * pp 4 = 16 devices, but there are 8"),
        ("pp3", "dp 2 * pp 3 = 6 devices, but there are 8"),
        ("pp4,dp2,microbatches=3", "16 is not a multiple of dp 2 * 3 microbatches = 6 (16 / 6 = 2.67): choose a number of microbatches that divides 8"),
    ],
)  # fmt: skip
def test_a_wrong_layout_is_one_clear_error(text, words):
    with pytest.raises(ConfigError) as caught:
        layout_overrides(text, CONFIG, 8)
    (problem,) = caught.value.problems
    assert words in problem


def test_settings_and_layouts_are_told_apart():
    arguments = ["dp8", "actor.optim.lr=1e-3", "pp4,schedule=1f1b", "data.train_data_paths=[a=b,c]"]
    assert split_arguments(arguments) == ([arguments[1], arguments[3]], [arguments[0], arguments[2]])
