"""YAML → one typed, validated `Config`. See README.md in this folder."""

from jaxpar.config.architecture import Architecture, RopeScaling
from jaxpar.config.config import Config, MeshSizes
from jaxpar.config.errors import ConfigError
from jaxpar.config.keys import TP_OVERLAP_PIECES
from jaxpar.config.load import config_from_dict, load_config

__all__ = [
    "TP_OVERLAP_PIECES",
    "Architecture",
    "Config",
    "ConfigError",
    "MeshSizes",
    "RopeScaling",
    "config_from_dict",
    "load_config",
]
