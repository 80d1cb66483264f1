"""One layer's backward pass, taken apart: what is kept for it, what is computed again, and what travels meanwhile."""

from jaxpar.backward.float32_grads import in_float32
from jaxpar.backward.overlap import Overlap, overlapped_loop
from jaxpar.backward.pullback import Pullback, take_apart
from jaxpar.backward.recompute import LayerRun, Recompute

__all__ = ["LayerRun", "Overlap", "Pullback", "Recompute", "in_float32", "overlapped_loop", "take_apart"]
