"""Sixteen simulated CPU devices, set up before any test can start jax's backend."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxpar.run.runtime import simulate_devices

jax.config.update("jax_platforms", "cpu")
simulate_devices(16)
jax.devices()  # now, because a Trainer would change their number to its config's


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """For modules that build the same programs again and again."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp() / "compiled"))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
