"""The kernel `cudnn`: attention of one block by NVIDIA's cuDNN, as jax calls it.

`jax.nn.dot_product_attention` gives the log-sum-exp in bfloat16, which is too coarse to merge blocks. The function beneath
it gives cuDNN's own float32, and is private to jax. So is the backward pass with given statistics: `_with_statistics`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as library

from jaxpar.attention.gpu import (
    LOW_PRECISION,
    compute_capability,
    is_absent,
    join_statistics,
    merge_heads,
    split_heads,
)
from jaxpar.attention.settings import Backend
from jaxpar.attention.types import AttentionSpec, BlockNeeds, Grads, Keys, Offset, OutputGrads, Partial, Queries

ABSENT_VERSION = 90800  # the cuDNN that programs for absent GPUs are compiled for: 9.8.0, as in `jaxpar.hardware`


def problem(backend: Backend, needs: BlockNeeds) -> str | None:
    """Why cuDNN cannot compute such a block (NVIDIA, cuDNN frontend, "Attention", and jax's own checks); None: it can."""
    capability = compute_capability(backend)
    if capability is None or capability < (8, 0):
        return "the devices are not NVIDIA GPUs of the A100's generation or later"
    if needs.dtype not in LOW_PRECISION:
        return f"{needs.dtype} is not bfloat16 or float16"
    largest = 128 if capability < (9, 0) else 256
    if needs.head_dim > largest or needs.head_dim % 8:
        return f"head_dim {needs.head_dim} is not a multiple of 8 up to {largest}"
    if needs.value_dim is not None:  # jax 0.10.2 has it for cuDNN 9.10 and later, and counts on 9.8 elsewhere
        return f"values of size {needs.value_dim} with keys of size {needs.head_dim}"
    if needs.soft_cap:
        return "a soft cap"
    if needs.documents:
        return "documents"
    return "the order of queries and keys is shifted" if needs.mask == "shifted" else None


def forward(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset) -> Partial:
    query = queries.query
    with _answers(spec.backend):
        output, lse = _block(spec, offset)(merge_heads(query), keys.key, keys.value)
    return Partial(output.reshape(query.shape), split_heads(lse, query))


def backward(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset, output_grads: OutputGrads) -> Grads:
    query = queries.query
    given = merge_heads(output_grads.output.astype(query.dtype)), join_statistics(output_grads.lse)
    with _answers(spec.backend):
        pullback = _with_statistics(_block(spec, offset), (merge_heads(query), keys.key, keys.value), given)
        grad = merge_heads(output_grads.grad.astype(query.dtype))
        query_grad, key_grad, value_grad = pullback((grad, jnp.zeros_like(given[1])))
    return Grads(query_grad.reshape(query.shape), key_grad, value_grad)


def _block(spec: AttentionSpec, offset: Offset) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(query [b, q, h, d], key, value [b, s, k, d]) → (output [b, q, h, d], float32 log-sum-exp [b, h, q])."""
    causal = offset is not None and spec.causal
    options: dict[str, Any] = {"mask_type": library.MaskType.CAUSAL if causal else library.MaskType.NO_MASK}
    if causal and spec.window is not None:
        options["sliding_window_length"] = spec.window

    def block(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        return library.dot_product_attention(query, key, value, scale=spec.scale, return_residual=True, **options)

    return block


def _with_statistics(block: Callable, args: tuple[Any, ...], given: tuple[jax.Array, jax.Array]) -> Callable:
    """The backward pass of `block` at `args`, with a given output and log-sum-exp in the place of the block's own.

    `jax.vjp` returns a function that is a pytree, and the two are leaves of it. Nothing then needs the block's forward pass,
    and XLA drops it.
    """
    own, pullback = jax.vjp(block, *args)
    leaves, tree = jax.tree.flatten(pullback)
    for old, new in zip(own, given, strict=True):
        places = [i for i, leaf in enumerate(leaves) if leaf is old]
        if len(places) != 1:
            raise RuntimeError(
                f"jax {jax.__version__} keeps cuDNN's statistics in another way: set attention_backend: xla"
            )
        leaves[places[0]] = new
    return jax.tree.unflatten(tree, leaves)


@contextmanager
def _answers(backend: Backend) -> Iterator[None]:
    """jax asks the GPU of this machine for cuDNN's version and its own kind. If the program is for GPUs that are not here,
    they are told instead."""
    if not is_absent(backend):
        yield
        return
    capability = compute_capability(backend) or (0, 0)
    parse = lambda text: tuple(int(part) for part in text.split("."))  # noqa: E731
    answers = {
        "check_cudnn_version": lambda: ABSENT_VERSION,
        "check_compute_capability": lambda least: parse(least) <= capability,
        "is_cuda_compute_capability_equal": lambda other: parse(other) == capability,
    }
    before = {name: getattr(library, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(library, name, answer)
        yield
    finally:
        for name, function in before.items():
            setattr(library, name, function)
