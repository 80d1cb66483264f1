"""Logical dimension → mesh axes: the one table, and what follows from it for each parameter.

A parameter names its dimensions (`("embed", "heads", "head_dim")`), the table says which mesh axes split each. A
parameter at rest (float32 master, optimizer moments) is further split over dp and cp where a dimension divides: ZeRO
(Rajbhandari et al., 2020, arXiv:1910.02054).

Layers at rest are one array [num_layers, ...] in their order on any mesh. Where stages hold them in another order
(chunks) or in unequal numbers, pp splits another dimension at rest, and the layers move once a step.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jaxpar.config import ConfigError
from jaxpar.parallel.collectives import vary
from jaxpar.parallel.mesh import REPLICA_AXES, TENSOR_AXES
from jaxpar.parallel.placement import NONE, LayerPlacement

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("dp",),
    "seq": ("cp",),
    "embed": (),
    "heads": TENSOR_AXES,
    "kv_heads": TENSOR_AXES,
    "head_dim": (),
    "mlp": TENSOR_AXES,
    "vocab": TENSOR_AXES,
    "layers": ("pp",),
}
# Explicit models split the vocabulary over the stages too, so that none carries the LM head alone (Yeung et al., 2024,
# arXiv:2411.05288). XLA cannot do that for an automatic model, because pp is always manual.
EXPLICIT_RULES = RULES | {"vocab": ("pp", *TENSOR_AXES)}

BATCH_SPEC = P("dp", "cp")  # every batch array is [global_batch, seq]


@dataclass(frozen=True)
class ParamLayout:
    """How one parameter lies on the mesh.

    Attributes:
      name: path in the parameter tree, such as "layers/attention/query".
      shape: global shape.
      dims: name of each dimension, or None for one that is never split.
      compute_spec: split during the forward and backward pass.
      rest_spec: split between steps; compute_spec plus dp and cp.
      gather: (axes, dimension) that lead from rest to compute, or None where both are the same.
      stages: (placement, dimension that pp splits at rest or None) where layers move before a step.
      repeated: (dimension, axes) where there are fewer kv heads than tensor ranks: the parameter is kept whole and
        each rank takes the one head it needs.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    compute_spec: P
    rest_spec: P
    gather: tuple[tuple[str, ...], int] | None
    stages: tuple[LayerPlacement, int | None] | None
    repeated: tuple[int, tuple[str, ...]] | None

    def bytes_per_device(self, mesh_shape: Mapping[str, int], itemsize: int = 4) -> int:
        """Bytes of one device's shard at rest."""
        ways = math.prod(mesh_shape[axis] for entry in self.rest_spec for axis in _axes(entry))
        return math.prod(self.shape) * itemsize // ways


def param_layout(
    name: str,
    shape: tuple[int, ...],
    dims: tuple[str | None, ...] | None,
    mesh_shape: Mapping[str, int],
    *,
    explicit: bool,
    zero_stage: int,
    num_chunks: int = 1,
) -> ParamLayout:
    """Apply the table to one parameter.

    Args:
      dims: a name from the table, or None, for each dimension of `shape`.
      mesh_shape: size of each mesh axis.
      explicit: the model calls the tensor collectives itself (see `jaxpar.parallel.collectives`).
      zero_stage: from 1 on the parameter is split over dp and cp at rest; from 2 on never along the layers, because
        these are gathered or reduced one at a time.
      num_chunks: virtual pipeline stages a stage.

    Raises:
      ConfigError: a name is missing or unknown, or a dimension does not divide by the axes that split it.
    """
    rules = EXPLICIT_RULES if explicit else RULES
    _check_names(name, shape, dims, rules)
    assert dims is not None
    spec: list[tuple[str, ...]] = []
    repeated = placement = None
    for dimension, (word, size) in enumerate(zip(dims, shape, strict=True)):
        axes = rules[word] if word else ()
        ways = math.prod(mesh_shape[axis] for axis in axes)
        if word == "layers":
            placement = LayerPlacement(size, mesh_shape["pp"], num_chunks)
            spec.append(axes if placement.is_contiguous else ())
        elif size % ways == 0:
            spec.append(axes)
        elif word == "kv_heads" and ways % size == 0:
            spec.append(())
            repeated = (dimension, axes) if explicit else None
        else:
            split = " x ".join(f"{axis} {mesh_shape[axis]}" for axis in axes)
            raise ConfigError(
                f"parameter {name} {list(shape)}: dimension {word!r} of {size} does not divide by {split} = {ways}: "
                f"change the model's size or actor.model's parallel sizes"
            )
    local = [size // math.prod(mesh_shape[axis] for axis in axes) for size, axes in zip(shape, spec, strict=True)]
    if repeated:
        local[repeated[0]] = 0
    gather = None
    moves = placement is not None and not placement.is_contiguous
    if zero_stage:
        inside = dict(enumerate(local))
        if placement and (moves or zero_stage > 1):
            inside.pop(dims.index("layers"))
        if zero_stage > 1 and "vocab" in dims:  # as a last resort: see `jaxpar.pipeline.ends`
            inside[dims.index("vocab")] = inside.pop(dims.index("vocab"))
        gather = _zero_dimension(inside, mesh_shape)
    rest = [axes + gather[0] if gather and i == gather[1] else axes for i, axes in enumerate(spec)]
    stages = None
    if placement and moves:
        held = [size // math.prod(mesh_shape[axis] for axis in axes) for size, axes in zip(shape, rest, strict=True)]
        moved = _stage_dimension(held, gather[1] if gather else None, mesh_shape["pp"])
        stages = (placement, moved)
        if moved is not None:
            rest[moved] += ("pp",)
        spec[0] = ("pp",)
    return ParamLayout(name, tuple(shape), tuple(dims), P(*spec), P(*rest), gather, stages, repeated)


def place_layers(param: jax.Array, layout: ParamLayout) -> jax.Array:
    """Inside `shard_map`: layers at rest → this stage's, [chunks · slots, ...]; other parameters as they are.

    Linear, like `gather_param`; the transpose brings gradients home.
    """
    if layout.stages is None:
        return param
    placement, dimension = layout.stages
    slots = placement.slots.reshape(-1)
    padded = jnp.take(param, np.maximum(slots, 0), axis=0)
    real = (slots != NONE).reshape(-1, *[1] * (param.ndim - 1))
    padded = padded if real.all() else jnp.where(real, padded, 0)
    if dimension is None:
        mine = len(slots) // placement.num_stages
        return lax.dynamic_slice_in_dim(vary(padded, ("pp",)), lax.axis_index("pp") * mine, mine)
    return lax.all_to_all(padded, "pp", 0, dimension, tiled=True)


def mark_varying(param: jax.Array, layout: ParamLayout, accumulate_axes: tuple[str, ...]) -> jax.Array:
    """Inside `shard_map`: take the kv head that this rank needs, and mark the parameter as varying over
    `accumulate_axes`: its gradient is summed over these once a step (the transpose of this function) and not wherever
    the parameter is used."""
    param = vary(param, accumulate_axes)
    if layout.repeated:
        dimension, axes = layout.repeated
        heads = layout.shape[dimension]
        head = lax.axis_index(axes) * heads // lax.axis_size(axes)
        param = lax.dynamic_slice_in_dim(vary(param, axes), head, 1, dimension)
    return param


def gather_param(param: jax.Array, layout: ParamLayout) -> jax.Array:
    """Inside `shard_map`: this device's shard over dp and cp → the whole.

    The function is linear, and its transpose is the gradient reduction: all-gather becomes reduce-scatter. So one
    function says both, and they cannot disagree.
    """
    if not layout.gather:
        return param
    axes, dimension = layout.gather
    return lax.all_gather(param, axes, axis=dimension, tiled=True)


def reduce_grad(grad: jax.Array, layout: ParamLayout) -> jax.Array:
    """The transpose of `gather_param`: this device's gradient of the whole → its shard of the sum over dp and cp."""
    if not layout.gather:
        return grad
    axes, dimension = layout.gather
    return lax.psum_scatter(grad, axes, scatter_dimension=dimension, tiled=True)


def layout_tree(
    shapes: Any, dims: Any, mesh: Mesh | AbstractMesh, *, explicit: bool, zero_stage: int, num_chunks: int = 1
) -> Any:
    """`param_layout` for a tree of ShapeDtypeStructs and the matching tree of dimension names (tuples or None).

    Raises:
      ConfigError: every parameter's problem, all at once.
    """
    problems: list[str] = []

    def one(path: Any, shape: Any, names: Any) -> ParamLayout | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        try:
            return param_layout(
                name, shape.shape, names, mesh.shape, explicit=explicit, zero_stage=zero_stage, num_chunks=num_chunks
            )
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    tree = jax.tree_util.tree_map_with_path(one, shapes, dims)
    if problems:
        raise ConfigError(problems)
    return tree


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _check_names(name: str, shape: tuple[int, ...], dims: tuple[str | None, ...] | None, rules: Mapping) -> None:
    known = ", ".join(sorted(rules))
    if dims is None:
        raise ConfigError(
            f"parameter {name} {list(shape)} has no dimension names: create it with "
            f"nnx.with_partitioning(initializer, (name, ...)), each one of: {known}; or None for never split"
        )
    if len(dims) != len(shape):
        raise ConfigError(f"parameter {name} {list(shape)} has {len(shape)} dimensions but {len(dims)} names {dims}")
    for word in dims:
        if word is not None and word not in rules:
            close = difflib.get_close_matches(word, rules, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {known}"
            raise ConfigError(f"parameter {name} {list(shape)}: unknown dimension name {word!r}: {hint}")


def _zero_dimension(sizes: Mapping[int, int], mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int] | None:
    """(axes, dimension) to split over dp and cp at rest: the first dimension that divides, because shards of it are
    contiguous and need no copy before they are sent.

    Where none divides by dp·cp, the larger of the two axes alone is tried, then the other.
    """
    single = sorted(REPLICA_AXES, key=lambda axis: -mesh_shape[axis])
    for axes in (REPLICA_AXES, *((axis,) for axis in single)):
        ways = math.prod(mesh_shape[axis] for axis in axes)
        fits = [dimension for dimension, size in sizes.items() if size and size % ways == 0]
        if ways > 1 and fits:
            return axes, fits[0]
    return None


def _stage_dimension(sizes: list[int], gathered: int | None, num_stages: int) -> int | None:
    """The dimension, not that of the layers, that pp splits at rest where it cannot split the layers."""
    others = sorted(range(1, len(sizes)), key=lambda dimension: (dimension != gathered, dimension))
    return next((dimension for dimension in others if sizes[dimension] % num_stages == 0), None)
