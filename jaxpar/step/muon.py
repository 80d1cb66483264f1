"""Muon on a mesh: momentum, whose matrices are made orthogonal (Jordan, 2024, https://kellerjordan.github.io/posts/muon/).

The arithmetic is `optax.contrib.muon`'s. This file says what a matrix is, and where each one is worked on: parameters are
stacked layers [layers, ...] and split over devices, but Newton and Schulz's iteration needs whole matrices. So each device
gets whole matrices of some of the layers by one all-to-all, works on them alone, and sends the results back by another.
Each of the two moves a device's own shard once for each dimension of a matrix that is split. Without this, each of the
iteration's 15 products would need a transfer.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jaxpar.parallel.sharding import ParamLayout
from jaxpar.step.opt_state import by_path


class MatrixDims(NamedTuple):
    """Which dimensions of a parameter are those of a matrix. The others are many matrices."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


def matrix_dims(layout: ParamLayout) -> MatrixDims | None:
    """None: not a matrix, so Adam trains it: embeddings and the head, which have "vocab", biases, norms, and parameters whose
    names do not tell which dimensions the product sums over.

    Of `("embed", "heads", "head_dim")` the rows are "embed", of `("heads", "head_dim", "embed")` the columns: "embed" is one
    side. Unnamed dimensions beside them are many matrices, as "layers" is.
    """
    own = tuple(i for i, dim in enumerate(layout.dims) if dim not in ("layers", None))
    if "vocab" in layout.dims or layout.name.endswith("bias") or len(own) < 2:
        return None
    if len(own) == 2:
        return MatrixDims(own[:1], own[1:])
    if [layout.dims[i] for i in own].count("embed") != 1:
        return None
    if layout.dims[own[0]] == "embed":
        return MatrixDims(own[:1], own[1:])
    return MatrixDims(own[:-1], own[-1:]) if layout.dims[own[-1]] == "embed" else None


def left_to_adam(param_layouts: Any) -> list[str]:
    """Names of parameters that may be matrices of layers, but whose dimensions' names do not say so."""
    return [
        layout.name
        for layout in jax.tree.leaves(param_layouts)
        if matrix_dims(layout) is None
        and sum(dim != "layers" for dim in layout.dims) > 1
        and "vocab" not in layout.dims
        and not layout.name.endswith("bias")
    ]


def muon(
    learning_rate: optax.Schedule,
    *,
    param_layouts: Any,
    mesh: Mesh | AbstractMesh | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    beta: float = 0.95,
    nesterov: bool = True,
    mu_dtype: Any = None,
    eps: float = 1e-8,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    adam_eps_root: float = 0.0,
    adam_learning_rate: optax.Schedule | None = None,
    **matrix: Any,
) -> optax.GradientTransformation:
    """`optax.contrib.muon`, with these differences: its matrices are those of `matrix_dims`, and `weight_decay` is that of
    all parameters.

    Args:
      learning_rate: of the matrices.
      param_layouts: tree of `ParamLayout`.
      mesh: what the parameters are split over; None: nothing.
      adam_learning_rate: of the other parameters; None: the same.
      matrix: further arguments of `optax.contrib.muon`: `ns_coeffs`, `ns_steps`, `preconditioning`, `adaptive`,
        `consistent_rms`. `adaptive` looks at one matrix at a time.
    """
    # Without momentum and rate, what is left of optax's is the work on one matrix.
    of_matrix = optax.contrib.muon(-1.0, beta=0.0, nesterov=False, eps=eps, **matrix)
    by_parameter = by_path(param_layouts)

    def orthogonalized(updates: Any, _: Any = None) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: _on_whole_matrices(of_matrix, x, by_parameter(path), mesh), updates
        )

    def kind(params: Any) -> Any:
        of = lambda path, _: "adam" if matrix_dims(by_parameter(path)) is None else "muon"  # noqa: E731
        return jax.tree_util.tree_map_with_path(of, params)

    matrices = optax.chain(
        _momentum(beta, nesterov, mu_dtype),
        optax.stateless(orthogonalized),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    adam = optax.adamw(
        adam_learning_rate or learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=eps,
        eps_root=adam_eps_root,
        weight_decay=weight_decay,
        mask=weight_decay_mask,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
    )
    return optax.partition({"muon": matrices, "adam": adam}, kind)


def _momentum(beta: float, nesterov: bool, dtype: Any) -> optax.GradientTransformation:
    """The first half of `optax.contrib.scale_by_muon`: the average of gradients, corrected for its start at zero."""

    def init(params: Any) -> optax.EmaState:
        return optax.EmaState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=dtype))

    def update(grads: Any, state: optax.EmaState, params: Any = None) -> tuple[Any, optax.EmaState]:
        mu, count = optax.tree.update_moment(grads, state.ema, beta, 1), state.count + 1
        if nesterov:
            ahead, now = (optax.tree.bias_correction(x, beta, n) for x, n in ((mu, count + 1), (grads, count)))
            updates = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        else:
            updates = optax.tree.bias_correction(mu, beta, count)
        return updates, optax.EmaState(count, optax.tree.cast(mu, dtype))

    return optax.GradientTransformation(init, update)


def _on_whole_matrices(
    of_matrix: optax.GradientTransformation, x: jax.Array, layout: ParamLayout, mesh: Mesh | AbstractMesh | None
) -> jax.Array:
    """Applies `of_matrix` to each matrix of one parameter, which is split as at rest, and so is the result."""
    dims = matrix_dims(layout)
    assert dims is not None
    many = tuple(i for i in range(x.ndim) if i not in dims.rows + dims.columns)
    order = (*many, *dims.rows, *dims.columns)
    entries = (*layout.rest_spec, *[None] * (x.ndim - len(layout.rest_spec)))
    axes_of = [tuple(axis for axis in _axes(entry) if mesh and mesh.shape[axis] > 1) for entry in entries]
    # (dimension of [matrices, *rows, *columns], axes that split it)
    moves = [(1 + k, axes_of[i]) for k, i in enumerate(dims.rows + dims.columns) if axes_of[i]]
    ways = math.prod(mesh.shape[axis] for _, axes in moves for axis in axes) if mesh else 1

    def whole(x: jax.Array) -> jax.Array:
        """[matrices, *rows, *columns], all of them on this device."""
        sides = x.shape[1 : 1 + len(dims.rows)], x.shape[1 + len(dims.rows) :]
        flat = x.reshape(-1, math.prod(sides[0]), math.prod(sides[1]))
        return jax.vmap(lambda one: of_matrix.update(one, of_matrix.init(one), one)[0])(flat).reshape(x.shape)

    def of_shard(x: jax.Array) -> jax.Array:
        x = x.transpose(order)
        shape = x.shape
        x = x.reshape(-1, *shape[len(many) :])
        count = len(x)
        x = jnp.pad(x, [(0, -count % ways), *[(0, 0)] * (x.ndim - 1)])  # where devices outnumber matrices, some idle
        x = _exchanged(x, moves, whole)
        return x[:count].reshape(shape).transpose([order.index(i) for i in range(len(order))])

    if not any(axes_of):
        return of_shard(x)
    assert mesh is not None
    spec = P(*(axes or None for axes in axes_of))
    return jax.shard_map(of_shard, mesh=_abstract(mesh), in_specs=spec, out_specs=spec)(x)


def _exchanged(x: jax.Array, moves: Sequence[tuple[int, tuple[str, ...]]], work: Callable) -> jax.Array:
    """`work(x)` where x [matrices, ...] is split over its first dimension alone; `moves` are split before and after."""
    if not moves:
        return work(x)
    (dimension, axes), *rest = moves
    swap = partial(lax.all_to_all, axis_name=axes, tiled=True)
    x = _exchanged(swap(x, split_axis=0, concat_axis=dimension), rest, work)
    return swap(x, split_axis=dimension, concat_axis=0)


def _abstract(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    return mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
