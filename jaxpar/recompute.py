"""How much of the forward pass the backward pass computes again, with Megatron-LM's meanings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax


@dataclass(frozen=True)
class Run:
    """Like layers of a chunk, handled alike.

    Attributes:
      first: the first of them, counted in the chunk.
      count: how many groups of `size` layers.
      recompute: keep only each group's input.
    """

    first: int
    count: int
    size: int
    recompute: bool


@dataclass(frozen=True)
class Recompute:
    """Which activations the backward pass computes again; Megatron-LM's --recompute-granularity, -method, -num-layers.

    Attributes:
      method: "none". "selective": in every layer all but the outputs of products and of attention, which are what costs
        to compute (Korthikanti et al., 2022, arXiv:2205.05198, section 5, and the norms, activations and rotations
        beside). "uniform": groups of num_layers layers, of each only the input is kept. "block": of the first num_layers
        layers of each chunk only the input is kept, of the others everything.
      num_layers: 0 with "none" and "selective".
    """

    method: Literal["none", "selective", "uniform", "block"] = "none"
    num_layers: int = 0

    def runs(self, num_layers: int) -> list[Run]:
        """The layers of a chunk, in order."""
        if self.method == "uniform":
            groups, rest = divmod(num_layers, self.num_layers)
            runs = [Run(0, groups, self.num_layers, True), Run(num_layers - rest, 1, rest, True)]
        elif self.method == "block":
            again = min(self.num_layers, num_layers)
            runs = [Run(0, again, 1, True), Run(again, num_layers - again, 1, False)]
        else:
            runs = [Run(0, num_layers, 1, False)]
        return [run for run in runs if run.count * run.size]

    def wrap(self, block: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """A block that keeps as much of itself as the method says."""
        if self.method != "selective":
            return block
        return jax.checkpoint(block, policy=_saves_products)


def _saves_products(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in ("dot_general", "conv_general_dilated", "custom_vjp_call", "pallas_call")
