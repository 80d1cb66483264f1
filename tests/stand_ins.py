"""Stand-ins for attention kernels of GPUs, in plain JAX, on the CPU.

Each has the documented contract of its library: layouts, scale, statistics, what it ignores, and what it leaves undefined,
which is NaN here. So a wrong offset, range or statistic in an adaptor turns a parity test red.
"""

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import tokamax
from tokamax._src.ops.attention import base

from jaxpar.attention import cudnn as cudnn_adaptor
from jaxpar.attention import tokamax as tokamax_adaptor
from jaxpar.attention.settings import Backend


@dataclass(frozen=True)
class FakeGpu:
    """Enough of a device for the choice of a kernel."""

    compute_capability: str = "9.0"
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


H100, A100 = FakeGpu(), FakeGpu("8.0", device_kind="NVIDIA A100-SXM4-80GB")


def install(monkeypatch: Any) -> None:
    """Puts the stand-ins in the places of the libraries. They take float32 too, in which parity can be exact."""
    monkeypatch.setattr(cudnn_adaptor.library, "dot_product_attention", cudnn_attention)
    library = SimpleNamespace(Mask=base.Mask, forward=tokamax_forward, backward=tokamax_backward)
    monkeypatch.setattr(tokamax_adaptor, "_library", lambda: library)
    for adaptor in (cudnn_adaptor, tokamax_adaptor):
        monkeypatch.setattr(adaptor, "LOW_PRECISION", ("bfloat16", "float16", "float32"))


def backend(name: str = "auto", device: Any = H100) -> Backend:
    return Backend(name, device)


# cuDNN, as jax._src.cudnn.fused_attention_stablehlo calls it: query [b, q, h, d], key and value [b, s, kv heads, d].
# The log-sum-exp is float32 [b, h, q]. Its gradient is ignored. The backward pass takes output and log-sum-exp as they are.


def cudnn_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float,
    mask_type: Any,
    return_residual: bool,
    sliding_window_length: Any = None,
) -> tuple[jax.Array, jax.Array]:
    assert return_residual and cudnn_adaptor.library.check_cudnn_version() >= 90000
    assert cudnn_adaptor.library.check_compute_capability("8.0")
    causal = mask_type == cudnn_adaptor.library.MaskType.CAUSAL
    assert causal or mask_type == cudnn_adaptor.library.MaskType.NO_MASK
    distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])[None]
    mask = (distance >= 0) if causal else jnp.ones_like(distance, bool)
    if sliding_window_length is not None:
        assert causal, "the window of cuDNN needs causal order"
        mask &= distance < sliding_window_length
    return _cudnn(scale, query, key, value, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cudnn(scale: float, query: Any, key: Any, value: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
    return _cudnn_forward(scale, query, key, value, mask)[0]


def _cudnn_forward(scale: float, query: Any, key: Any, value: Any, mask: Any) -> Any:
    scores = _scores(query, key, scale, mask)
    lse = jax.nn.logsumexp(scores, -1)
    output = _output(jnp.exp(scores - lse[..., None]), value, query.dtype)
    return (output, lse), (query, key, value, mask, lse, output)


def _cudnn_backward(scale: float, residuals: Any, grads: Any) -> Any:
    query, key, value, mask, lse, output = residuals
    weights = jnp.exp(_scores(query, key, scale, mask) - lse[..., None])
    return *_gradients(weights, scale, query, key, value, output, grads[0]), None


_cudnn.defvjp(_cudnn_forward, _cudnn_backward)


# tokamax: the same layouts. Statistics are (highest score, sum of the exponentials), both float32 [b, h, q]. A query without
# keys gets anything. Weights of the backward pass are exp(score - highest) / sum.


def tokamax_forward(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any,
    logits_scale: float,
    logits_soft_cap: float | None,
    return_residuals: bool,
) -> Any:
    assert return_residuals
    allowed = _tokamax_mask(mask, query, key)
    scores = _scores(query, key, logits_scale, allowed, logits_soft_cap)
    highest = scores.max(-1)
    total = jnp.exp(scores - highest[..., None]).sum(-1)
    has_keys = jnp.broadcast_to(allowed.any(-1), highest.shape)
    nan = lambda x, there: jnp.where(there, x, jnp.nan)  # noqa: E731
    output = _output(jnp.exp(scores - highest[..., None]) / total[..., None], value, query.dtype)
    output = nan(output, jnp.moveaxis(has_keys, 1, 2)[..., None])
    return output, (nan(highest, has_keys), nan(total, has_keys))


def tokamax_backward(
    statistics: Any,
    output: Any,
    grad: Any,
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any,
    logits_scale: float,
    logits_soft_cap: float | None,
) -> Any:
    highest, total = statistics
    assert highest.dtype == total.dtype == jnp.float32
    scores = _scores(query, key, logits_scale, _tokamax_mask(mask, query, key), logits_soft_cap)
    weights = jnp.exp(scores - highest[..., None]) / total[..., None]
    slope: Any = logits_scale  # of a score that has a weight
    if logits_soft_cap is not None:
        slope *= 1 - jnp.where(weights > 0, scores / logits_soft_cap, 0) ** 2
    return _gradients(weights, slope, query, key, value, output, grad)


def _tokamax_mask(mask: Any, query: Any, key: Any) -> jax.Array:
    """tokamax's own reading of a mask, which tells what its kernels do. With cross-compiling on, as for an absent GPU."""
    assert tokamax.config.cross_compile.value
    found = mask.as_array(query.shape[1], key.shape[1])
    return (
        jnp.ones((1, 1, query.shape[1], key.shape[1]), bool)
        if found is None
        else found.reshape(-1, 1, *found.shape[-2:])
    )


# What both compute.


def _scores(query: Any, key: Any, scale: float, mask: Any, soft_cap: float | None = None) -> jax.Array:
    """Float32 [b, h, q, s]; a masked score has no weight."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scores = jnp.einsum("bqhd,bshd->bhqs", query, key, preferred_element_type=jnp.float32) * scale
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(mask, scores, -1e30)


def _output(weights: Any, value: Any, dtype: Any) -> jax.Array:
    value = jnp.repeat(value, weights.shape[1] // value.shape[2], axis=2)
    return jnp.einsum("bhqs,bshd->bqhd", weights, value, preferred_element_type=jnp.float32).astype(dtype)


def _gradients(
    weights: Any, slope: Any, query: Any, key: Any, value: Any, output: Any, grad: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    group = query.shape[2] // key.shape[2]
    wide_key, wide_value = (jnp.repeat(x, group, axis=2).astype(jnp.float32) for x in (key, value))
    delta = jnp.einsum("bqhd,bqhd->bhq", grad, output, preferred_element_type=jnp.float32)
    weights_grad = jnp.einsum("bqhd,bshd->bhqs", grad.astype(jnp.float32), wide_value)
    scores_grad = weights * (weights_grad - delta[..., None]) * slope
    by_group = lambda x: x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3)  # noqa: E731
    return (
        jnp.einsum("bhqs,bshd->bqhd", scores_grad, wide_key).astype(query.dtype),
        by_group(jnp.einsum("bhqs,bqhd->bshd", scores_grad, query.astype(jnp.float32))).astype(key.dtype),
        by_group(jnp.einsum("bhqs,bqhd->bshd", weights, grad.astype(jnp.float32))).astype(value.dtype),
    )
