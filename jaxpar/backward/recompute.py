"""Which activations the backward pass computes again, with Megatron-LM's meanings, and where the others wait."""

from dataclasses import dataclass
from typing import Literal

from jaxpar.attention.names import CORE_ATTENTION

Granularity = Literal["selective", "full"] | None
Again = Literal["full"] | tuple[str, ...]  # everything, or only these modules, besides elementwise work


@dataclass(frozen=True)
class LayerRun:
    """Consecutive layers of a chunk that are treated alike.

    Attributes:
      first: index of the first layer in the chunk.
      count: number of groups.
      size: layers in each group.
      again: what the backward pass computes again, see `Recompute`.
    """

    first: int
    count: int
    size: int
    again: Again


@dataclass(frozen=True)
class Recompute:
    """Megatron-LM's --recompute-granularity, -method, -num-layers and -modules, and where the rest waits.

    Attributes:
      granularity: None: only elementwise work (norms, activation functions, rotations), no product and no attention.
        "selective": the operations of `modules` as well (Korthikanti et al., 2022, arXiv:2205.05198, section 5).
        "full": everything.
      method: with "full". "uniform": all layers, in groups of `num_layers`; only the input of each group is kept.
        "block": the first `num_layers` layers of each chunk; the others as with None.
      num_layers: with "full".
      offload: what is kept waits in the host's pinned memory.
      modules: with "selective". Each is a name scope of the block. What is in attention's core belongs to no other.
    """

    granularity: Granularity = None
    method: Literal["uniform", "block"] | None = None
    num_layers: int = 0
    offload: bool = False
    modules: tuple[str, ...] = (CORE_ATTENTION,)

    def layer_runs(self, num_layers: int) -> list[LayerRun]:
        """The layers of a chunk of `num_layers`, in order."""
        if self.granularity != "full":
            runs = [LayerRun(0, num_layers, 1, self.modules if self.granularity == "selective" else ())]
        elif self.method == "uniform":
            groups, rest = divmod(num_layers, self.num_layers)
            runs = [LayerRun(0, groups, self.num_layers, "full"), LayerRun(num_layers - rest, 1, rest, "full")]
        else:
            again = min(self.num_layers, num_layers)
            runs = [LayerRun(0, again, 1, "full"), LayerRun(again, num_layers - again, 1, ())]
        return [run for run in runs if run.count * run.size]
