"""Checkpoints: written in the background by Orbax, verified when read, readable on any layout."""

from jaxpar.checkpoint.checkpoints import Checkpoints
from jaxpar.checkpoint.reading import CheckpointError

__all__ = ["CheckpointError", "Checkpoints"]
