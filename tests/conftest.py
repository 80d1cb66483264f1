"""Sets up sixteen simulated CPU devices and a cache of compiled programs, before any test can start jax's backend. Only
`pytest -m gpu` runs on the devices that jax finds."""

import os
import shutil
from pathlib import Path

# Compiled programs are kept for the next test session and for the processes that tests start. The key of a program is
# its text, with the names of its operations but without source lines. So an edit that changes what is computed, or how
# it is named, compiles again.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache/jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY"] = "true"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        use_simulated_devices()
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    # A run adds about 0.2 GB after a change to the programs.
    if not hasattr(config, "workerinput") and sum(file.stat().st_size for file in folder.glob("*")) > 2e9:
        shutil.rmtree(folder)


def use_simulated_devices():
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from jaxpar.run.runtime import simulate_devices

    jax.config.update("jax_platforms", "cpu")
    simulate_devices(16)
    jax.devices()  # now, because a Trainer would change the number of devices to that of its config
