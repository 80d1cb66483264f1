"""The table from dimension names to mesh axes, and what follows from it for each parameter.

A parameter names its dimensions, such as `("embed", "heads", "head_dim")`. The table says which mesh axes split each
of them during a step. Between steps ("at rest": float32 weights and optimizer moments) a parameter is also split over
dp and cp where a dimension divides: ZeRO (Rajbhandari et al., 2020, arXiv:1910.02054). A frozen parameter rests in the
compute dtype, as a step needs it, so only ZeRO stage 3 splits it.

At rest, layers are one array [num_layers, ...] in their order, on any mesh. Where stages hold them in another order
(chunks) or in unequal numbers, pp splits another dimension at rest, and the layers move to their stages once a step.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
# Explicit models also split the vocabulary over the stages, so that no stage carries the LM head alone (Yeung et al.,
# 2024, arXiv:2411.05288). XLA cannot do this for an automatic model, because pp is always a manual axis.
EXPLICIT_RULES = RULES | {"vocab": ("pp", *TENSOR_AXES)}

BATCH_SPEC = P("dp", "cp")  # every batch array is [global_batch, seq]

Split = tuple[tuple[str, ...], ...]  # for each dimension, the mesh axes that split it


@dataclass(frozen=True)
class ParamLayout:
    """How one parameter lies on the mesh.

    Attributes:
      name: path in the parameter tree, such as "layers/attention/query".
      shape: global shape.
      dims: the name of each dimension, or None for one that is never split.
      compute_spec: how it is split during the forward and backward pass.
      rest_spec: how it is split between steps: compute_spec, and dp and cp as well.
      gather: (axes, dimension) of the all-gather that leads from rest to compute; None if the two are the same.
      stages: (placement, dimension that pp splits at rest, or None), if layers move before a step; else None.
      repeated: (dimension, axes) if there are fewer kv heads than tensor ranks; else None. The parameter is then kept
        whole, and each rank takes the one head that it needs.
      trained: it has a gradient.
      dtype: at rest.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    compute_spec: P
    rest_spec: P
    gather: tuple[tuple[str, ...], int] | None
    stages: tuple[LayerPlacement, int | None] | None
    repeated: tuple[int, tuple[str, ...]] | None
    trained: bool = True
    dtype: Any = jnp.float32

    def bytes_per_device(self, mesh_shape: Mapping[str, int], itemsize: int | None = None) -> int:
        """Bytes of one device's shard at rest. `itemsize`: default: that of `dtype`."""
        ways = math.prod(mesh_shape[axis] for entry in self.rest_spec for axis in _axes(entry))
        return math.prod(self.shape) * (itemsize or jnp.dtype(self.dtype).itemsize) // ways


def param_layout(
    name: str,
    shape: tuple[int, ...],
    dims: tuple[str | None, ...] | None,
    mesh_shape: Mapping[str, int],
    *,
    explicit: bool,
    zero_stage: int,
    num_chunks: int = 1,
    num_layers: int | None = None,
) -> ParamLayout:
    """Applies the table to one parameter.

    Args:
      dims: for each dimension of `shape`, a name from the table or None.
      mesh_shape: size of each mesh axis.
      explicit: the model calls the tensor collectives itself (see `jaxpar.parallel.collectives`).
      zero_stage: from 1 on, the parameter is split over dp and cp at rest. From 2 on, it is never split over them
        along the layers, because layers are then gathered or reduced one at a time.
      num_chunks: chunks (virtual stages) of each pipeline stage.
      num_layers: of the stack, if this parameter has fewer (see `LayerPlacement`).

    Raises:
      ConfigError: a name is missing or unknown, or a dimension does not divide by the axes that split it.
    """
    rules = EXPLICIT_RULES if explicit else RULES
    _check_names(name, shape, dims, rules)
    assert dims is not None
    step_split = tuple(_axes_of_dimension(name, shape, dims, i, rules, mesh_shape) for i in range(len(dims)))
    repeated = _repeated_heads(shape, dims, rules, mesh_shape) if explicit else None
    placement = None
    if dims[:1] == ("layers",):
        present = None if num_layers in (None, shape[0]) else shape[0]
        placement = LayerPlacement(num_layers or shape[0], mesh_shape["pp"], num_chunks, present)
    moves = placement is not None and not placement.is_contiguous
    at_rest = tuple(() if moves and dim == "layers" else axes for dim, axes in zip(dims, step_split, strict=True))

    gather = None
    if zero_stage:
        excluded = {repeated[0]} if repeated else set()
        if placement and (moves or zero_stage > 1):
            excluded.add(0)
        # The vocabulary is the last choice: only if it is whole can it be gathered in parts (see `jaxpar.pipeline.ends`).
        last = dims.index("vocab") if zero_stage > 1 and "vocab" in dims else None
        candidates = sorted(set(range(len(dims))) - excluded, key=lambda i: (i == last, i))
        local = _local_shape(shape, at_rest, mesh_shape)
        gather = _zero_split({i: local[i] for i in candidates}, mesh_shape)
        at_rest = _split_further(at_rest, *gather) if gather else at_rest
    stages = None
    if placement and moves:
        local = _local_shape(shape, at_rest, mesh_shape)
        stage_dimension = _stage_dimension(local, gather[1] if gather else None, mesh_shape["pp"])
        at_rest = at_rest if stage_dimension is None else _split_further(at_rest, ("pp",), stage_dimension)
        stages = placement, stage_dimension
    return ParamLayout(name, tuple(shape), tuple(dims), P(*step_split), P(*at_rest), gather, stages, repeated)


def place_layers(param: jax.Array, layout: ParamLayout) -> jax.Array:
    """Inside `shard_map`: moves layers from rest to their stages, [chunks * layers of a chunk, ...]. Other parameters
    are returned as they are.

    Linear, like `gather_param`; its transpose brings gradients back to rest.
    """
    if layout.stages is None:
        return param
    placement, dimension = layout.stages
    layers = placement.table.reshape(-1)
    padded = jnp.take(param, np.maximum(layers, 0), axis=0)
    real = (layers != NONE).reshape(-1, *[1] * (param.ndim - 1))
    padded = padded if real.all() else jnp.where(real, padded, 0)
    if placement.num_stages == 1:
        return padded
    if dimension is None:
        mine = len(layers) // placement.num_stages
        return lax.dynamic_slice_in_dim(vary(padded, ("pp",)), lax.axis_index("pp") * mine, mine)
    return lax.all_to_all(padded, "pp", 0, dimension, tiled=True)


def mark_varying(param: jax.Array, layout: ParamLayout, accumulate_axes: tuple[str, ...]) -> jax.Array:
    """Inside `shard_map`: takes the kv head that this rank needs, and marks the parameter as varying over
    `accumulate_axes`. Its gradient is then summed over these once a step, by the transpose of this function, and not
    at each use of the parameter."""
    param = vary(param, accumulate_axes)
    if layout.repeated:
        dimension, axes = layout.repeated
        heads = layout.shape[dimension]
        head = lax.axis_index(axes) * heads // lax.axis_size(axes)
        param = lax.dynamic_slice_in_dim(vary(param, axes), head, 1, dimension)
    return param


def gather_param(param: jax.Array, layout: ParamLayout) -> jax.Array:
    """Inside `shard_map`: all-gathers this device's shard over dp and cp.

    The function is linear, and its transpose is the reduction of the gradient: the all-gather becomes a
    reduce-scatter. One function defines both, so they cannot disagree.
    """
    if not layout.gather:
        return param
    axes, dimension = layout.gather
    return lax.all_gather(param, axes, axis=dimension, tiled=True)


def reduce_grad(grad: jax.Array, layout: ParamLayout) -> jax.Array:
    """The transpose of `gather_param`: from this device's gradient of the whole parameter to its shard of the sum over
    dp and cp."""
    if not layout.gather:
        return grad
    axes, dimension = layout.gather
    return lax.psum_scatter(grad, axes, scatter_dimension=dimension, tiled=True)


def layout_tree(
    shapes: Any,
    dims: Any,
    mesh: Mesh | AbstractMesh,
    *,
    explicit: bool,
    zero_stage: int,
    num_chunks: int = 1,
    num_layers: int | None = None,
    trained: Any = None,
    frozen_dtype: Any = jnp.float32,
) -> Any:
    """Applies `param_layout` to a tree of ShapeDtypeStructs and the matching tree of dimension names (tuples or None).

    Args:
      trained: the same tree with a bool at each leaf. None: all.
      frozen_dtype: in which the others rest.

    Raises:
      ConfigError: with the problems of all parameters at once.
    """
    problems: list[str] = []

    def one(path: Any, shape: Any, names: Any, is_trained: bool) -> ParamLayout | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        try:
            layout = param_layout(
                name,
                shape.shape,
                names,
                mesh.shape,
                explicit=explicit,
                zero_stage=zero_stage if is_trained or zero_stage == 3 else 0,
                num_chunks=num_chunks,
                num_layers=num_layers,
            )
            return layout if is_trained else replace(layout, trained=False, dtype=frozen_dtype)
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    trained = jax.tree.map(lambda _: True, shapes) if trained is None else trained
    tree = jax.tree_util.tree_map_with_path(one, shapes, dims, trained)
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
            f"nnx.with_partitioning(initializer, (name, ...)), each one of: {known}; or None for never split. Or give the model "
            f"dims={{{name!r}: (name, ...)}}: jaxpar.suggest_dims(model) prints a guess"
        )
    if len(dims) != len(shape):
        raise ConfigError(f"parameter {name} {list(shape)} has {len(shape)} dimensions but {len(dims)} names {dims}")
    for word in dims:
        if word is not None and word not in rules:
            close = difflib.get_close_matches(word, rules, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {known}"
            raise ConfigError(f"parameter {name} {list(shape)}: unknown dimension name {word!r}: {hint}")


def _axes_of_dimension(
    name: str,
    shape: tuple[int, ...],
    dims: tuple[str | None, ...],
    dimension: int,
    rules: Mapping[str, tuple[str, ...]],
    mesh_shape: Mapping[str, int],
) -> tuple[str, ...]:
    """The mesh axes that split one dimension during a step."""
    word, size = dims[dimension], shape[dimension]
    axes = rules[word] if word else ()
    ways = math.prod(mesh_shape[axis] for axis in axes)
    if word == "layers" or size % ways == 0:  # layers need not divide: some stages then hold one more than others
        return axes
    if word == "kv_heads" and ways % size == 0:
        return ()
    split = " x ".join(f"{axis} {mesh_shape[axis]}" for axis in axes)
    raise ConfigError(
        f"parameter {name} {list(shape)}: dimension {word!r} of {size} does not divide by {split} = {ways}: "
        f"change the model's size or actor.model's parallel sizes"
    )


def _repeated_heads(
    shape: tuple[int, ...],
    dims: tuple[str | None, ...],
    rules: Mapping[str, tuple[str, ...]],
    mesh_shape: Mapping[str, int],
) -> tuple[int, tuple[str, ...]] | None:
    """(dimension, axes) of kv heads that are fewer than the tensor ranks; None if there are none."""
    if "kv_heads" not in dims:
        return None
    dimension, axes = dims.index("kv_heads"), rules["kv_heads"]
    divides = shape[dimension] % math.prod(mesh_shape[axis] for axis in axes) == 0
    return None if divides else (dimension, axes)


def _local_shape(shape: Sequence[int], split: Split, mesh_shape: Mapping[str, int]) -> list[int]:
    """The shape of a device's shard."""
    return [size // math.prod(mesh_shape[axis] for axis in axes) for size, axes in zip(shape, split, strict=True)]


def _split_further(split: Split, axes: tuple[str, ...], dimension: int) -> Split:
    return tuple(old + axes if i == dimension else old for i, old in enumerate(split))


def _zero_split(sizes: Mapping[int, int], mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int] | None:
    """(axes, dimension) to split over dp and cp at rest. The first dimension that divides is taken, because its shards
    are contiguous and need no copy before they are sent.

    If no dimension divides by dp * cp, the larger of the two axes is tried alone, then the other.

    Args:
      sizes: the local size of each dimension that may be split, the most wanted first.
    """
    single = sorted(REPLICA_AXES, key=lambda axis: -mesh_shape[axis])
    for axes in (REPLICA_AXES, *((axis,) for axis in single)):
        ways = math.prod(mesh_shape[axis] for axis in axes)
        fits = [dimension for dimension, size in sizes.items() if size % ways == 0]
        if ways > 1 and fits:
            return axes, fits[0]
    return None


def _stage_dimension(sizes: list[int], gathered: int | None, num_stages: int) -> int | None:
    """The dimension that pp splits at rest where it cannot split the layers: the gathered one if it divides, else the
    first that does."""
    others = sorted(range(1, len(sizes)), key=lambda dimension: (dimension != gathered, dimension))
    return next((dimension for dimension in others if sizes[dimension] % num_stages == 0), None)
