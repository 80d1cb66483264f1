"""Checkpoints: written in the background by Orbax, verified when read, readable on any layout."""

from jaxpar.checkpoint.checkpoints import CheckpointError, Checkpoints

__all__ = ["CheckpointError", "Checkpoints"]
