"""Floating-point operations of one instruction. A multiplication and an addition count as two.

Only products are counted (dot, convolution, cuBLAS calls, attention kernels). Everything else is bound by memory, and
published FLOPs leave it out (Narayanan et al., 2021, arXiv:2104.04473, appendix). XLA turns products with one row, one
column or one term into sums; these are not counted either.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxpar.measure.hlo.parse import Array, Instruction

# (operands, results) → FLOPs of one call; None if the kernel does not have such shapes.
KernelFlops = Callable[[Sequence[Array], Sequence[Array]], float | None]


def dot_flops(result: Array, lhs: Array, contracting: Sequence[int]) -> int:
    """2·M·N·K per product, times the batch: twice the size of the result times the number of terms of each sum."""
    return 2 * result.size * math.prod(lhs.dims[i] for i in contracting)


def convolution_flops(instruction: Instruction, lhs: Array, kernel: Array, result: Array) -> int:
    """Two FLOPs for each kernel element that meets an input element; none over padding or between dilated elements.

    This is XLA's own rule (`HloCostAnalysis::GetConvolutionFlops`). It matters on TPUs, where a batched product may
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
        position = out + np.arange(kernel.dims[kernel_labels.index(label)])[None] * kernel_dilation - low
        met *= int(((position >= 0) & (position % in_dilation == 0) & (position // in_dilation < in_size)).sum())
    outside = math.prod(result.dims[i] for i, label in enumerate(out_labels) if not label.isdigit())
    return 2 * outside * met * kernel.dims[kernel_labels.index("i")]


def _window(text: str, rank: int) -> list[tuple[int, int, int, int]]:
    """`size=3x3 stride=2x2 pad=1_1x1_1 lhs_dilate=1x1 rhs_dilate=1x1` → (stride, low padding, dilations) per dimension."""

    def field(key: str, default: int) -> list[int]:
        found = re.search(rf"\b{key}=(\S+)", text)
        return [int(part.split("_")[0]) for part in found[1].split("x")] if found else [default] * rank

    return list(zip(field("stride", 1), field("pad", 0), field("lhs_dilate", 1), field("rhs_dilate", 1), strict=True))


def cublas_flops(instruction: Instruction, operands: Sequence[Array]) -> int | None:
    """FLOPs of a `__cublas$…` call, whose first result is the product and whose next one is workspace."""
    contracting = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    if not contracting:
        return None
    return dot_flops(instruction.result[0], operands[0], [int(n) for n in re.findall(r"\d+", contracting[1])])


def attention_flops(pairs: float, qk_dim: int, v_dim: int, *, backward: bool = False, causal: bool = False) -> float:
    """FLOPs of a flash-attention kernel.

    The forward pass has two products, Q·Kᵀ and P·V. The backward pass has five, Q·Kᵀ again, dP, dV, dQ and dK: 2.5 times
    as much if the two head dimensions agree (Dao, 2023, arXiv:2307.08691, section 4.1). A causal kernel skips the upper
    triangle and counts half, as in that paper.

    Args:
      pairs: number of pairs of a query and a key, regardless of the mask: batch · query heads · queries · keys.
      qk_dim, v_dim: head dimension of queries and keys, and of values.
    """
    products = 3 * qk_dim + 2 * v_dim if backward else qk_dim + v_dim
    return 2 * pairs * products * (0.5 if causal else 1)


def cudnn_attention_flops(instruction: Instruction, operands: Sequence[Array]) -> float | None:
    """FLOPs of a `__cudnn$fmha…` call. Its operands are query, key, value, …, each with the head dimension last."""
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


def tokamax_attention_flops(instruction: Instruction, operands: Sequence[Array]) -> float | None:
    """FLOPs of one of tokamax's attention kernels, known by the scope in which `jaxpar.attention.tokamax` calls them.

    The forward pass has two products. The backward pass is two kernels, and both compute the scores and their gradients:
    three products for the query's gradient, four for those of key and value. A causal kernel counts half, as in
    `attention_flops`; one with other ranges of keys counts the whole square.
    """
    kind = re.search(r"\btokamax_(forward|backward)(_causal)?\b", instruction.op_name)
    is_kernel = (custom_call_target(instruction) or "").startswith("mosaic_gpu")
    if not kind or not is_kernel or len(operands) < 3 or any(len(array.dims) < 3 for array in operands[:3]):
        return None
    (*batch, queries, heads, dim), keys, value_dim = operands[0].dims, operands[1].dims[-3], operands[2].dims[-1]
    scores = 1 if kind[1] == "forward" else 2  # products with keys or queries; the others are with values or outputs
    others = 2 if kind[1] == "backward" and len(instruction.result) > 1 else 1
    per_pair = scores * dim + others * value_dim
    return 2 * per_pair * math.prod(batch) * heads * queries * keys * (0.5 if kind[2] else 1)


def _mha(backward: bool) -> KernelFlops:
    def flops(operands: Sequence[Array], results: Sequence[Array]) -> float | None:
        if len(operands) < 3 or any(len(array.dims) != 4 for array in operands[:3]):
            return None
        (batch, queries, heads, dim), keys = operands[0].dims, operands[1].dims[1]  # [batch, seq, heads, head_dim]
        return attention_flops(batch * heads * queries * keys, dim, dim, backward=backward)

    return flops


# The Pallas kernels of jax.experimental.pallas.ops.gpu.attention, by name (`pallas_call(…, name=…)`). A call shows its
# operands but not its mask, so the whole square is counted.
KERNELS: Mapping[str, KernelFlops] = {
    "mha_forward": _mha(backward=False),
    "mha_preprocess_backward": lambda operands, results: 0.0,
    "mha_backward": _mha(backward=True),
}


def custom_call_target(instruction: Instruction) -> str | None:
    return instruction.attribute(r'custom_call_target="([^"]*)"')


def kernel_name(instruction: Instruction) -> str | None:
    """A Pallas kernel's name, from the call's attributes (Triton) or from the scope in which jax names the operation."""
    if found := re.search(r'\bname = "([^"]+)"', instruction.attributes):
        return found[1]
    found = re.search(r"([^/()]+)\)*/pallas_call", instruction.op_name)
    return found[1] if found else None
