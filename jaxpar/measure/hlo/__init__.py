"""What a compiled program computes and sends: XLA's optimized text → numbers. Knows no jax.

text → parse.py (computations, instructions) → count.py (walk) → Count
                                                 loops.py   trip counts
                                                 flops.py   FLOPs of a product, a convolution, a kernel call
                                                 groups.py  replica groups → mesh axes
"""

from jaxpar.measure.hlo.count import Collective, Count, count
from jaxpar.measure.hlo.flops import KERNELS, attention_flops

__all__ = ["KERNELS", "Collective", "Count", "attention_flops", "count"]
