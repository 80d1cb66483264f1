"""A stage's layers, scanned, with as much recompute in the backward pass as was asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax import lax

ApplyLayer = Callable[[Any, jax.Array], jax.Array]  # (one layer's parameters, activations) → activations


@dataclass(frozen=True)
class Recompute:
    """Which activations the backward pass computes again; Megatron-LM's --recompute-method and --recompute-num-layers.

    Attributes:
      method: "none". "uniform": groups of num_layers layers, of each only the input is kept. "block": of the first
        num_layers layers of each stage only the input is kept, of the others everything.
      num_layers: 0 with "none".
    """

    method: Literal["none", "uniform", "block"] = "none"
    num_layers: int = 0

    def group(self, layers: Any) -> Any:
        """Stacked layers [layers, ...] → the groups that `scan` runs. Linear, and done once a step: a slice taken
        inside the pipeline would be kept with the activations of every microbatch."""
        if self.method == "uniform" and self.num_layers > 1:
            return jax.tree.map(lambda p: p.reshape(-1, self.num_layers, *p.shape[1:]), layers)
        if self.method == "block":
            first = jax.tree.map(lambda p: p[: self.num_layers], layers)
            return {"first": first, "rest": jax.tree.map(lambda p: p[self.num_layers :], layers)}
        return layers

    def scan(self, apply: ApplyLayer, groups: Any, x: jax.Array) -> jax.Array:
        """Apply every layer in order."""
        if self.method == "none":
            return _scan(apply, groups, x)
        if self.method == "block":
            return _scan(apply, groups["rest"], _scan(jax.checkpoint(apply), groups["first"], x))
        if self.num_layers > 1:
            return _scan(jax.checkpoint(lambda group, x: _scan(apply, group, x)), groups, x)
        return _scan(jax.checkpoint(apply), groups, x)


def _scan(apply: ApplyLayer, layers: Any, x: jax.Array) -> jax.Array:
    if not jax.tree.leaves(layers):  # a model without a stack
        return x
    return lax.scan(lambda x, layer: (apply(layer, x), None), x, layers)[0]
