"""How the optimizer's state lies on the mesh, whatever the optimizer is."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec as P

from jaxpar.parallel.sharding import ParamLayout


def by_path(param_layouts: Any) -> Callable[[tuple[Any, ...]], Any]:
    """A function from the path of a leaf to the `ParamLayout` of the parameter in whose name it ends, the longest if there
    are several; None if there is none. So a moment is found wherever it is in an optimizer's state."""
    layouts = dict(jax.tree_util.tree_leaves_with_path(param_layouts))

    def find(path: tuple[Any, ...]) -> ParamLayout | None:
        return next((layouts[path[i:]] for i in range(len(path)) if path[i:] in layouts), None)

    return find


def opt_state_specs(shapes: Any, param_layouts: Any) -> Any:
    """A tree of PartitionSpecs for an optimizer's state.

    An array with its parameter's shape lies like the parameter (ZeRO); one that lacks some of its dimensions (Adafactor's
    rows and columns) or has more before them (a history) lies like the dimensions that it has. Others are on every device.

    Args:
      shapes: the state, as ShapeDtypeStructs.
      param_layouts: tree of `ParamLayout`.
    """
    find = by_path(param_layouts)

    def spec(path: Any, leaf: jax.ShapeDtypeStruct) -> P:
        layout = find(path)
        return P() if layout is None else _spec_of(leaf.shape, layout)

    return jax.tree_util.tree_map_with_path(spec, shapes)


def bytes_everywhere(shapes: Any, param_layouts: Any) -> int:
    """Bytes of the arrays of an optimizer's state that lie whole on every device, because no parameter has their shape."""
    find, specs = by_path(param_layouts), jax.tree.leaves(opt_state_specs(shapes, param_layouts))
    leaves = zip(jax.tree_util.tree_leaves_with_path(shapes), specs, strict=True)
    return sum(
        leaf.size * leaf.dtype.itemsize
        for (path, leaf), spec in leaves
        if leaf.ndim and not any(spec) and ((layout := find(path)) is None or any(layout.rest_spec))
    )


def num_updates(opt_state: Any, step: jax.Array) -> jax.Array:
    """How many updates were applied, int32: the state's own count, or if it has none, the number of steps."""
    counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return counts[0][1] if counts else step


def _spec_of(shape: tuple[int, ...], layout: ParamLayout) -> P:
    if shape == layout.shape:
        return layout.rest_spec
    ndim = len(layout.shape)
    entries = (*layout.rest_spec, *[None] * (ndim - len(layout.rest_spec)))
    if shape[-ndim:] == layout.shape:
        return P(*[None] * (len(shape) - ndim), *entries)
    # Where dimensions are of one size, the first that fit: any choice is right, and these arrays are small.
    for kept in combinations(range(ndim), len(shape)):
        if shape == tuple(layout.shape[i] for i in kept):
            return P(*(entries[i] for i in kept))
    return P()
