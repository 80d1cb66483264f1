"""What a compiled program computes and sends, counted from XLA's optimized text. Does not import jax.

text → parse.py (computations, instructions) → count.py (walk through the program) → Count
                                                 loops.py   trip counts
                                                 flops.py   FLOPs of a product, a convolution, a kernel call
                                                 groups.py  replica groups → mesh axes
"""

from jaxpar.measure.hlo.count import Collective, Count, count
from jaxpar.measure.hlo.flops import KERNELS, attention_flops

__all__ = ["KERNELS", "Collective", "Count", "attention_flops", "count"]
