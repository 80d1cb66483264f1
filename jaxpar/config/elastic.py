"""The sizes for the nodes that there are, when they come and go: dp follows their number, and the global batch stays."""

from __future__ import annotations

from jaxpar.config.batch_checks import batch_problems
from jaxpar.config.checks import mesh_problems
from jaxpar.config.config import Config
from jaxpar.config.errors import ConfigError, divisors


def for_nodes(config: Config, nodes: int) -> Config:
    """The config for this many nodes. Each step trains on the same samples.

    Only dp changes; and `micro_batch_size`, if it no longer divides `global_batch_size / dp`, to the largest of its divisors
    that does. Tensor, pipeline, sequence and context parallelism stay, because what fits into a GPU depends on them.

    Raises:
      ConfigError: there is no such layout.
    """
    gpus = config.cluster.num_gpus_per_node
    if gpus is None:
        raise ConfigError(
            "cluster.num_gpus_per_node: not given, but --elastic chooses a layout by it: set it, such as 8"
        )
    devices = nodes * gpus
    problems = list(mesh_problems(config.actor.model, devices))
    if not problems:
        cluster, dp = config.cluster.model_copy(update={"num_nodes": nodes}), config.mesh_sizes(devices).dp
        for micro in reversed(divisors(config.actor.micro_batch_size or 1)):
            actor = config.actor.model_copy(update={"micro_batch_size": micro} if config.actor.micro_batch_size else {})
            problems = list(batch_problems(config.runner, actor, dp))
            if not problems:
                return config.model_copy(update={"cluster": cluster, "actor": actor})
    raise ConfigError([f"on {nodes} of the nodes: {problem}" for problem in problems])


def usable_nodes(config: Config, present: int, least: int) -> int:
    """The largest number of nodes from `least` to `present` that has a layout.

    Raises:
      ConfigError: none has one, or `present` is less than `least`.
    """
    problems: list[str] = []
    for nodes in range(present, least - 1, -1):
        try:
            for_nodes(config, nodes)
            return nodes
        except ConfigError as error:
            problems = problems or error.problems
    raise ConfigError(problems or [f"--elastic {least}: only {present} of the nodes are there"])


def changes(old: Config, new: Config, present: int) -> str:
    """One line: what `for_nodes` has changed."""
    gpus = new.cluster.num_gpus_per_node or 1
    nodes = new.cluster.num_nodes
    wanted = old.cluster.num_nodes
    parts = [f"{nodes} of {max(wanted, present)} nodes", f"dp {new.mesh_sizes(nodes * gpus).dp}"]
    if old.actor.micro_batch_size != new.actor.micro_batch_size:
        parts.append(f"micro_batch_size {old.actor.micro_batch_size} → {new.actor.micro_batch_size}")
    return f"elastic: {', '.join(parts)}; global_batch_size stays {new.actor.global_batch_size}"
