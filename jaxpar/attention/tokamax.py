"""The kernel `tokamax`: attention of one block by tokamax's kernels for Hopper (github.com/openxla/tokamax).

They know what cuDNN does not: that each query has a range of keys of its own. Documents, windows and shifted orders are such
ranges, which take no mask in memory. The classes are private to tokamax. Its public function takes no statistics.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.extend.backend
import jax.numpy as jnp
from absl import flags
from jax._src import config
from jax.extend import core

from jaxpar.attention.gpu import (
    LOW_PRECISION,
    compute_capability,
    is_absent,
    join_statistics,
    merge_heads,
    split_heads,
)
from jaxpar.attention.names import KERNEL_CALL
from jaxpar.attention.settings import Backend
from jaxpar.attention.types import AttentionSpec, BlockNeeds, Grads, Keys, Offset, OutputGrads, Partial, Queries
from jaxpar.parallel.collectives import MASKED, vary, varying_axes

# By the first number of the compute capability: Hopper. Kernels for Blackwell (10) exist but do not compile here. The backward
# pass of tokamax 0.0.12 asks for 298,252 of a B200's 232,448 bytes of shared memory. That of 0.0.17 compiles, but not inside
# `shard_map`: jax 0.12's `mpmd_map` refuses arrays that vary along its axes.
ARCHITECTURES = (9,)


def problem(backend: Backend, needs: BlockNeeds) -> str | None:
    """Why tokamax cannot compute such a block; None: it can."""
    capability = compute_capability(backend)
    if capability is None or capability[0] not in ARCHITECTURES:
        return "the devices are not GPUs of NVIDIA's Hopper generation"
    if needs.dtype not in LOW_PRECISION:
        return f"{needs.dtype} is not bfloat16 or float16"
    if needs.head_dim > 256:
        return f"head_dim {needs.head_dim} is more than 256"
    if needs.value_dim is not None and needs.value_dim > 256:
        return f"values of size {needs.value_dim} are larger than 256"
    if find_spec("tokamax") is None:
        return "it is not installed: pip install 'jaxpar[cuda12]'"
    return None


def forward(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset) -> Partial:
    query, ranges = queries.query, _ranges(spec, queries, keys, offset)
    forward = functools.partial(_library().forward, **_score_options(spec), return_residuals=True)
    output, (highest, total) = _one_call(spec.backend, forward, ranges, merge_heads(query), keys.key, keys.value)
    lse = highest + jnp.log(total)
    if ranges.is_empty is not None:
        # What the kernel leaves there is not defined.
        output = jnp.where(jnp.moveaxis(ranges.is_empty, 1, 2)[..., None], 0, output)
        lse = jnp.where(ranges.is_empty, MASKED, lse)
    return Partial(output.reshape(*query.shape[:-1], -1), split_heads(lse, query))


def backward(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset, output_grads: OutputGrads) -> Grads:
    query, ranges = queries.query, _ranges(spec, queries, keys, offset)
    lse = join_statistics(output_grads.lse)
    statistics = lse, jnp.ones_like(lse)  # the kernel's weights are exp(score - highest) / total
    output, grad = (merge_heads(x.astype(query.dtype)) for x in (output_grads.output, output_grads.grad))
    backward = functools.partial(_library().backward, **_score_options(spec))
    query_grad, key_grad, value_grad = _one_call(
        spec.backend, backward, ranges, statistics, output, grad, merge_heads(query), keys.key, keys.value
    )
    return Grads(query_grad.reshape(query.shape), key_grad, value_grad)


def _score_options(spec: AttentionSpec) -> dict[str, Any]:
    return {"logits_scale": spec.scale, "logits_soft_cap": spec.soft_cap}


class _Ranges(NamedTuple):
    """Which keys a query may attend to: [start, end), and no later ones than itself if `causal`.

    Attributes:
      start, end: int32 [b, 1, q]. None: from the first, to the last.
      is_empty: bool [b, 1, q], which queries have no key in this block. None: all have some.
    """

    start: jax.Array | None
    end: jax.Array | None
    causal: bool
    is_empty: jax.Array | None


def _one_call(backend: Backend, function: Any, ranges: _Ranges, *args: Any) -> Any:
    """function(*args, mask=ranges) as one call in the traced program.

    tokamax's kernels neither take arrays that differ between devices along manual axes nor say along which axes their
    results differ. So they are traced as if nothing did. The results differ as the keys do.
    """
    axes = varying_axes(args[-1])

    def with_mask(start: Any, end: Any, *args: Any) -> Any:
        return function(*args, mask=_library().Mask(k_start=start, k_end=end, is_causal=ranges.causal))

    inputs = ranges.start, ranges.end, *args
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    with _told(backend):
        traced, result = jax.make_jaxpr(with_mask, return_shape=True)(*shapes)

    def kernel_call(*inputs: Any) -> Any:
        with config._check_vma(False):  # as pallas itself does
            found = core.jaxpr_as_fun(traced)(*jax.tree.leaves(inputs))
        return jax.tree.unflatten(jax.tree.structure(result), [vary(x, axes) for x in found])

    assert kernel_call.__name__ == KERNEL_CALL
    # For the counter of FLOPs (jaxpar.measure.hlo.flops): a call does not show what it computes.
    with jax.named_scope(f"tokamax_{function.func.__name__}" + "_causal" * ranges.causal):
        return jax.jit(kernel_call)(*inputs)


def _ranges(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset) -> _Ranges:
    """The ids of documents must not decrease along the keys. Then the keys of a document are a range."""
    num_keys = keys.key.shape[1]
    starts: list[Any] = []
    ends: list[Any] = []
    if queries.segments is not None and keys.segments is not None:
        starts.append(_count_before(keys.segments, queries.segments, "left"))
        ends.append(_count_before(keys.segments, queries.segments, "right"))
    index = jnp.arange(queries.query.shape[1], dtype=jnp.int32)[None]
    # Of a block on the diagonal, each query has itself, and a document ends no earlier than that. Then tokamax's own causal
    # order does, of which it knows the tiles.
    on_diagonal = spec.causal and isinstance(offset, int) and offset == 0
    if on_diagonal:
        ends = []
    elif offset is not None and spec.causal:
        ends.append(index + offset + 1)
    if offset is not None and spec.window is not None:
        starts.append(index + offset + 1 - spec.window)
    axes, batch = varying_axes(queries.query), queries.query.shape[0]

    def bound(bounds: list[Any], most: Any) -> jax.Array | None:
        if not bounds:
            return None
        wide = jnp.broadcast_to(jnp.clip(functools.reduce(most, bounds), 0, num_keys), (batch, index.shape[1]))
        return vary(wide.astype(jnp.int32)[:, None], axes)

    start, end = bound(starts, jnp.maximum), bound(ends, jnp.minimum)
    if on_diagonal or (start is None and end is None):
        return _Ranges(start, end, on_diagonal, None)
    least, most = (0 if start is None else start), (num_keys if end is None else end)
    return _Ranges(start, end, on_diagonal, jnp.asarray(least >= most))


def _count_before(sorted_keys: jax.Array, queries: jax.Array, side: str) -> jax.Array:
    """For each query, how many keys have a smaller id ("right": or the same). int32 [b, q]."""
    count = functools.partial(jnp.searchsorted, side=side, method="scan_unrolled")
    return jax.vmap(count)(sorted_keys, queries).astype(jnp.int32)


@functools.cache
def _library() -> Any:
    """What is used of tokamax."""
    _package()
    from tokamax._src.ops.attention import base
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention
    from tokamax._src.ops.attention.pallas_mosaic_gpu_vjp import PallasMosaicGpuFlashAttentionVjp

    def backward(*args: Any, **options: Any) -> Any:
        defaults = {
            "bias": None, "precision": (jax.lax.DotAlgorithmPreset.DEFAULT,) * 2, "logits_dtype": jnp.dtype(jnp.float32),
            "dropout_mask": None, "dropout_rate": 0.0, "paging_info": None, "q_indices": None,
            "k_indices": None, "normalize_output": True,
        }  # fmt: skip
        found = PallasMosaicGpuFlashAttentionVjp()(*args, **defaults, **options)
        return found["q"], found["k"], found["v"]

    def forward(*args: Any, **options: Any) -> Any:
        # With a small soft cap tokamax would not subtract the largest score, and exp(score) overflows float16.
        stable = {} if options["logits_soft_cap"] is None else {"use_stable_softmax": True}
        return PallasMosaicGpuFlashAttention(**stable)(*args, **options)

    return SimpleNamespace(Mask=base.Mask, forward=forward, backward=backward)


def _package() -> Any:
    """tokamax itself. It takes a second to import."""
    import tokamax

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # otherwise tokamax reads its flags from our command line
    return tokamax


@contextmanager
def _told(backend: Backend) -> Iterator[None]:
    """tokamax asks jax for the GPU of this machine. If the program is for GPUs that are not here, it is told instead."""
    if not is_absent(backend):
        yield
        return
    module, before = jax.extend.backend, jax.extend.backend.get_default_device
    try:
        module.get_default_device = lambda: backend.device
        with _package().config.cross_compile(True):
            yield
    finally:
        module.get_default_device = before
