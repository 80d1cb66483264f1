"""Sixteen simulated CPU devices, set up before any test can start jax's backend."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 16)
jax.devices()  # now, because a Trainer would change their number to its config's
