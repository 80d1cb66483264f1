"""jaxpar: five-axis parallel training of large Transformers with JAX.

import jaxpar

config = jaxpar.load_config("configs/quickstart.yaml", ["runner.max_steps=10"])
jaxpar.Trainer(config).fit()
"""

from typing import TYPE_CHECKING, Any

from jaxpar.config import Config, ConfigError, MeshSizes, config_from_dict, load_config

if TYPE_CHECKING:
    from jaxpar.models import Model, Stack, TokenInfo, Whole, suggest_dims
    from jaxpar.objectives import Max, Mean, Objective, Sum, TokenStatistics
    from jaxpar.parallel.mesh import build_mesh
    from jaxpar.rl import Actor, Rollout
    from jaxpar.run.hooks import STOP, Hook, HookError
    from jaxpar.trainer import Trainer

__all__ = [
    "STOP",
    "Actor",
    "Config",
    "ConfigError",
    "Hook",
    "HookError",
    "Max",
    "Mean",
    "MeshSizes",
    "Model",
    "Objective",
    "Rollout",
    "Stack",
    "Sum",
    "TokenInfo",
    "TokenStatistics",
    "Trainer",
    "Whole",
    "build_mesh",
    "config_from_dict",
    "load_config",
    "suggest_dims",
]

_WITH_JAX = {
    "Actor": "jaxpar.rl",
    "build_mesh": "jaxpar.parallel.mesh",
    "Hook": "jaxpar.run.hooks",
    "HookError": "jaxpar.run.hooks",
    "Max": "jaxpar.objectives",
    "Mean": "jaxpar.objectives",
    "Model": "jaxpar.models",
    "Objective": "jaxpar.objectives",
    "Rollout": "jaxpar.rl",
    "Stack": "jaxpar.models",
    "STOP": "jaxpar.run.hooks",
    "Sum": "jaxpar.objectives",
    "TokenInfo": "jaxpar.models",
    "TokenStatistics": "jaxpar.objectives",
    "Trainer": "jaxpar.trainer",
    "suggest_dims": "jaxpar.models",
    "Whole": "jaxpar.models",
}


def __getattr__(name: str) -> Any:
    # Imported late: the command line must set up XLA before jax is loaded, and data workers need no jax.
    if name not in _WITH_JAX:
        raise AttributeError(f"module 'jaxpar' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WITH_JAX[name]), name)
