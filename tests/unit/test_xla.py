"""The settings of XLA and NCCL that are put into the environment."""

import os
from pathlib import Path

import jax

from jaxpar.run import xla


def test_deterministic_kernels_are_asked_for_and_no_others_lose(monkeypatch):
    for name in ("XLA_FLAGS", *xla.ENVIRONMENT, "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it afterwards
        monkeypatch.delenv(name)
    plain = xla.apply({})
    assert "deterministic" not in os.environ["XLA_FLAGS"] and "NCCL_ALGO" not in os.environ
    monkeypatch.delenv("XLA_FLAGS")
    lines = xla.apply({}, deterministic=True)
    assert "--xla_gpu_deterministic_ops=true" in os.environ["XLA_FLAGS"].split()
    assert os.environ["NCCL_ALGO"] == "Ring"
    assert set(plain) < set(lines)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")  # the user's own setting wins
    xla.apply({}, deterministic=True)
    assert os.environ["XLA_FLAGS"].count("deterministic_ops") == 1


def test_simulated_devices_have_more_threads_than_can_wait():
    """With only one thread per device, XLA's collectives sometimes wait for each other forever."""
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert threads.count("tf_XLAEigen") >= 4 * len(jax.devices())
