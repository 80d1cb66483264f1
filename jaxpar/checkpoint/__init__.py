"""Checkpoints: written in the background through Orbax, checked when they are read, readable on any layout."""

from jaxpar.checkpoint.checkpoints import CheckpointError, Checkpoints

__all__ = ["CheckpointError", "Checkpoints"]
