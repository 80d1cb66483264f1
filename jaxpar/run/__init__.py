"""What surrounds the steps of a run: processes, signals, watchdog, metrics, evaluation, XLA's settings.

Nothing is imported here: `jaxpar.run.xla` must be at work before jax is loaded.
"""
