"""YAML → one typed, validated `Config`.

`keys` has every key, `architecture` the model's shape, `checks` the arithmetic, `load` the reading and `Config` itself.
"""

from jaxpar.config.architecture import Architecture, RopeScaling
from jaxpar.config.keys import ConfigError
from jaxpar.config.load import Config, MeshSizes, config_from_dict, load_config

__all__ = ["Architecture", "Config", "ConfigError", "MeshSizes", "RopeScaling", "config_from_dict", "load_config"]
