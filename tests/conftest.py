"""Sixteen simulated CPU devices, set up before any test can start jax's backend."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiled programs are kept for the next run, and for the processes that tests start. A program's key is its text with
# the names of its operations but without source lines, so an edit that changes what is computed or how it is named misses.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache/jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY": "true",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}
for name, value in CACHE.items():
    os.environ.setdefault(name, value)

import jax

from jaxpar.run.runtime import simulate_devices

jax.config.update("jax_platforms", "cpu")
simulate_devices(16)
jax.devices()  # now, because a Trainer would change their number to its config's


