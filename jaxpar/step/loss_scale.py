"""The loss scale, which keeps fp16 gradients from vanishing (Micikevicius et al., 2018, arXiv:1710.03740)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """A scale that is halved on overflow and doubled after a while without: Megatron-LM's `DynamicGradScaler`.

    Attributes:
      initial, minimum: the first and the smallest scale.
      window: the scale doubles after so many steps in a row without overflow.
      hysteresis: the scale is halved at each overflow from this one on, counted from the last doubling.
    """

    initial: float
    minimum: float
    window: int
    hysteresis: int

    def init(self) -> dict[str, jax.Array]:
        """`scale`, float32; `good_steps` and `patience`, int32."""
        return {
            "scale": jnp.float32(self.initial),
            "good_steps": jnp.int32(0),
            "patience": jnp.int32(self.hysteresis),
        }

    def update(self, state: dict[str, Any], finite: jax.Array) -> dict[str, jax.Array]:
        """The state after a step. `finite`: the loss and all gradients were finite."""
        scale, good_steps, patience = state["scale"], state["good_steps"] + 1, state["patience"] - 1
        grows = good_steps >= self.window
        larger = jnp.where(grows & jnp.isfinite(scale * 2), scale * 2, scale)
        smaller = jnp.where(patience <= 0, jnp.maximum(scale / 2, self.minimum), scale)
        return {
            "scale": jnp.where(finite, larger, smaller),
            "good_steps": jnp.where(finite & ~grows, good_steps, 0),
            "patience": jnp.where(finite, jnp.where(grows, self.hysteresis, state["patience"]), patience),
        }
