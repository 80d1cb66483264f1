"""The actor of reinforcement learning: from rollouts and rewards to optimizer steps."""

from jaxpar.rl.actor import Actor
from jaxpar.rl.rollouts import Rollout

__all__ = ["Actor", "Rollout"]
