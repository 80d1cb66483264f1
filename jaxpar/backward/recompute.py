"""How much of the forward pass the backward pass computes again, with Megatron-LM's meanings, and where the rest waits."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerRun:
    """Like layers of a chunk, handled alike.

    Attributes:
      first: the first of them, counted in the chunk.
      count: how many groups of `size` layers.
      recompute: see `jaxpar.backward.pullback.Pullback`.
    """

    first: int
    count: int
    size: int
    recompute: Literal["cheap", "core", "all"]


@dataclass(frozen=True)
class Recompute:
    """Which activations the backward pass computes again; Megatron-LM's --recompute-granularity, -method, -num-layers.

    Attributes:
      method: "none": what elementwise work leads to (norms, activation functions, rotations), no products and no
        attention. "selective": attention's core too (Korthikanti et al., 2022, arXiv:2205.05198, section 5).
        "uniform": everything, in groups of num_layers layers, of each of which only the input is kept. "block":
        everything in the first num_layers layers of each chunk, in the others as with "none".
      num_layers: of "uniform" and "block".
      offload: what is not computed again waits in pinned host memory.
    """

    method: Literal["none", "selective", "uniform", "block"] = "none"
    num_layers: int = 0
    offload: bool = False

    def runs(self, num_layers: int) -> list[LayerRun]:
        """The layers of a chunk, in order."""
        if self.method == "uniform":
            groups, rest = divmod(num_layers, self.num_layers)
            runs = [LayerRun(0, groups, self.num_layers, "all"), LayerRun(num_layers - rest, 1, rest, "all")]
        elif self.method == "block":
            again = min(self.num_layers, num_layers)
            runs = [LayerRun(0, again, 1, "all"), LayerRun(again, num_layers - again, 1, "cheap")]
        else:
            runs = [LayerRun(0, num_layers, 1, "core" if self.method == "selective" else "cheap")]
        return [run for run in runs if run.count * run.size]
