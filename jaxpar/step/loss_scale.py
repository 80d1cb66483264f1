"""The scale of the loss that keeps fp16 gradients from vanishing (Micikevicius et al., 2018, arXiv:1710.03740)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """Halved on overflow, doubled after a while without: the rule of Megatron-LM's `DynamicGradScaler`.

    Attributes:
      initial, minimum: scales.
      window: steps in a row without overflow, after which the scale doubles.
      hysteresis: overflows since the last doubling from which on the scale is halved, each time.
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
        """The state after a step whose loss and gradients were all finite, or were not."""
        scale, good_steps, patience = state["scale"], state["good_steps"] + 1, state["patience"] - 1
        grows = good_steps >= self.window
        larger = jnp.where(grows & jnp.isfinite(scale * 2), scale * 2, scale)
        smaller = jnp.where(patience <= 0, jnp.maximum(scale / 2, self.minimum), scale)
        return {
            "scale": jnp.where(finite, larger, smaller),
            "good_steps": jnp.where(finite & ~grows, good_steps, 0),
            "patience": jnp.where(finite, jnp.where(grows, self.hysteresis, state["patience"]), patience),
        }
