"""Everything around the steps of a training run: processes, signals, watchdog, metrics, evaluation, XLA settings.

This file imports nothing, because `jaxpar.run.xla` must set the environment before jax is imported.
"""
