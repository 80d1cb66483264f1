"""XLA's settings: that the installed jaxlib knows them, and who wins over whom."""

import os

import pytest

from jaxpar import xla
from jaxpar.config import ConfigError


@pytest.fixture
def apply(monkeypatch):
    """xla.apply with an environment of its own; gives its lines and the flags that jax would see, name → value."""

    def call(overrides=None, flags=""):
        monkeypatch.setenv("XLA_FLAGS", flags)
        for name in xla.ENVIRONMENT:
            monkeypatch.setenv(name, "")  # so that it is put back
            monkeypatch.delenv(name)
        lines = xla.apply(overrides or {})
        return lines, dict(flag.removeprefix("--").split("=") for flag in os.environ["XLA_FLAGS"].split())

    return call


def test_jaxlib_knows_every_flag_of_the_table(apply):
    lines, flags = apply()
    assert flags == {flag: value for flag, (value, _) in xla.XLA_FLAGS.items()}
    assert len(lines) == len(xla.XLA_FLAGS) + len(xla.ENVIRONMENT)
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"


def test_the_config_wins_over_the_table_and_the_environment_over_both(apply):
    changes = {"xla_gpu_enable_pipelined_all_gather": True, "--xla_gpu_autotune_level": 0}
    lines, flags = apply(changes, "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=2")
    assert flags["xla_gpu_enable_pipelined_all_gather"] == "true"
    assert flags["xla_gpu_enable_command_buffer"] == ""
    assert flags["xla_gpu_autotune_level"] == "2"
    assert "xla_gpu_enable_pipelined_all_gather=true  cluster.xla_flags" in lines
    assert "xla_gpu_autotune_level=2  XLA_FLAGS of the environment" in lines
    assert sum(line.startswith("xla_gpu_autotune_level") for line in lines) == 1


def test_an_unknown_flag_is_named_with_its_place(apply):
    with pytest.raises(ConfigError) as caught:
        apply({"xla_gpu_no_such_thing": 1}, "--xla_gpu_nor_this=1")
    assert caught.value.problems == [
        "cluster.xla_flags: the installed jaxlib knows no flag xla_gpu_no_such_thing: remove it",
        "XLA_FLAGS: the installed jaxlib knows no flag xla_gpu_nor_this: remove it",
    ]
