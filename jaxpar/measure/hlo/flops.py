"""Floating-point operations of one instruction: a multiplication and an addition are two.

Only products are counted (dot, convolution, cuBLAS calls, attention kernels): the rest is bound by memory, and
published FLOPs leave it out (Narayanan et al., 2021, arXiv:2104.04473, appendix). XLA turns products with one row, one
column or one term into sums: those go uncounted too.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxpar.measure.hlo.parse import Array, Instruction

# (operands, results) → FLOPs of one call, or None for shapes that are not the kernel's.
KernelFlops = Callable[[Sequence[Array], Sequence[Array]], float | None]


def dot_flops(result: Array, lhs: Array, contracting: Sequence[int]) -> int:
    """2·M·N·K a product, times the batch: the result's size times the terms of each sum."""
    return 2 * result.size * math.prod(lhs.dims[i] for i in contracting)


def convolution_flops(instruction: Instruction, lhs: Array, kernel: Array, result: Array) -> int:
    """Two a kernel element that meets an input element: none for those over padding or between dilated elements.

    That is XLA's own rule (`HloCostAnalysis::GetConvolutionFlops`), and it matters on TPU, where a batched product may
    become a convolution that is mostly padding.
    """
    labels = instruction.attribute(r"dim_labels=(\S+?)(?:,|$)") or ""
    in_labels, kernel_labels, out_labels = re.split("_|->", labels)
    spatial = [label for label in in_labels if label.isdigit()]
    window = _window(instruction.attribute(r"window=\{([^}]*)\}") or "", len(spatial))
    met = 1
    for label, (stride, low, in_dilation, kernel_dilation) in zip(sorted(spatial), window, strict=True):
        in_size = lhs.dims[in_labels.index(label)]
        out = np.arange(result.dims[out_labels.index(label)])[:, None] * stride
        place = out + np.arange(kernel.dims[kernel_labels.index(label)])[None] * kernel_dilation - low
        met *= int(((place >= 0) & (place % in_dilation == 0) & (place // in_dilation < in_size)).sum())
    outside = math.prod(result.dims[i] for i, label in enumerate(out_labels) if not label.isdigit())
    return 2 * outside * met * kernel.dims[kernel_labels.index("i")]


def _window(text: str, rank: int) -> list[tuple[int, int, int, int]]:
    """`size=3x3 stride=2x2 pad=1_1x1_1 lhs_dilate=1x1 rhs_dilate=1x1` → (stride, low padding, dilations) a dimension."""

    def field(key: str, default: int) -> list[int]:
        found = re.search(rf"\b{key}=(\S+)", text)
        return [int(part.split("_")[0]) for part in found[1].split("x")] if found else [default] * rank

    return list(zip(field("stride", 1), field("pad", 0), field("lhs_dilate", 1), field("rhs_dilate", 1), strict=True))


def attention_flops(pairs: float, qk_dim: int, v_dim: int, *, backward: bool = False, causal: bool = False) -> float:
    """FLOPs of a flash-attention kernel.

    Forward has two products, Q·Kᵀ and P·V. Backward has five: Q·Kᵀ again, dP, dV, dQ, dK, so 2.5 times the forward's
    where the two sizes agree (Dao, 2023, arXiv:2307.08691, section 4.1). A causal kernel skips the upper triangle:
    half is counted, as there.

    Args:
      pairs: of a query and a key, mask left out: batch · heads of queries · queries · keys.
      qk_dim, v_dim: head dimension of queries and keys; of values.
    """
    products = 3 * qk_dim + 2 * v_dim if backward else qk_dim + v_dim
    return 2 * pairs * products * (0.5 if causal else 1)


def cudnn_attention_flops(instruction: Instruction, operands: Sequence[Array]) -> float | None:
    """Of a `__cudnn$fmha…` call; operands are query, key, value, …, each with the head dimension last."""
    scores = re.search(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]', instruction.attributes)
    if not scores or len(operands) < 3:
        return None
    mask = re.search(r'"mask_type":\s*"(\w+)"', instruction.attributes)
    return attention_flops(
        math.prod(int(n) for n in re.findall(r"\d+", scores[1])),
        operands[0].dims[-1],
        operands[2].dims[-1],
        backward="Backward" in (custom_call_target(instruction) or ""),
        causal=mask is not None and "CAUSAL" in mask[1],
    )


def _mha(backward: bool) -> KernelFlops:
    def flops(operands: Sequence[Array], results: Sequence[Array]) -> float | None:
        if len(operands) < 3 or any(len(array.dims) != 4 for array in operands[:3]):
            return None
        (batch, queries, heads, dim), keys = operands[0].dims, operands[1].dims[1]  # [batch, seq, heads, head_dim]
        return attention_flops(batch * heads * queries * keys, dim, dim, backward=backward)

    return flops


def _flash(products: int, causal: bool = False) -> KernelFlops:
    def flops(operands: Sequence[Array], results: Sequence[Array]) -> float | None:
        if len(operands) < 3 or len(operands[0].dims) != 5 or len(operands[1].dims) != 4:
            return None
        (batch, queries, kv_heads, group, dim), keys = operands[0].dims, operands[1].dims[1]
        return 2 * products * batch * kv_heads * group * queries * keys * dim * (0.5 if causal else 1)

    return flops


# Pallas kernels by the name that they are given (`pallas_call(…, name=…)`), here those of
# jax.experimental.pallas.ops.gpu.attention. A call shows its operands and not its mask: these count the whole square.
KERNELS: Mapping[str, KernelFlops] = {
    "mha_forward": _mha(backward=False),
    "mha_preprocess_backward": lambda operands, results: 0.0,
    "mha_backward": _mha(backward=True),
}

# Those of jaxpar.attention.flash, whose names tell the mask: "_causal" walks over half of the square, "_masked" has a
# window or an offset of its own and counts whole. The backward pass is two kernels, which both compute the scores and
# their gradients.
FLASH_KERNELS: Mapping[str, KernelFlops] = {
    f"attention_{name}{mask}": _flash(products, causal=mask == "_causal")
    for name, products in (("forward", 2), ("query_grad", 3), ("key_grad", 4))
    for mask in ("", "_masked", "_causal")
}


def custom_call_target(instruction: Instruction) -> str | None:
    return instruction.attribute(r'custom_call_target="([^"]*)"')


def kernel_name(instruction: Instruction) -> str | None:
    """A Pallas kernel's name: in the call's own attributes (Triton), or the scope that jax names its operation by."""
    if found := re.search(r'\bname = "([^"]+)"', instruction.attributes):
        return found[1]
    found = re.search(r"([^/()]+)\)*/pallas_call", instruction.op_name)
    return found[1] if found else None
