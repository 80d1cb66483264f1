"""`attention`, the one function that models call."""

from typing import Literal

import jax
from jax import lax
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int

from jaxpar.attention.all_gather import all_gather_attention
from jaxpar.attention.all_to_all import all_to_all_attention
from jaxpar.attention.names import CORE_ATTENTION
from jaxpar.attention.order import from_zigzag, to_zigzag
from jaxpar.attention.ring import Ring, ring_attention
from jaxpar.attention.settings import AttentionSettings, current_settings
from jaxpar.attention.types import AttentionSpec, Keys
from jaxpar.parallel.collectives import manual, vary, varying_axes
from jaxpar.parallel.mesh import AXES

Order = Literal["zigzag", "contiguous"]


def attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    *,
    segment_ids: Int[Array, "batch seq"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    axis: str | None = "cp",
    order: Order | None = None,
) -> Float[Array, "batch seq heads value_dim"]:
    """softmax(query keyᵀ * scale) value over the whole sequence, even if each rank of `axis` holds only a part of it.

    It can be called anywhere. Inside jaxpar's train step, `seq` is this rank's two chunks of the sequence (see
    `jaxpar.attention.zigzag_order`), and kernels of GPUs compute it. In a `shard_map` of your own, `axis` and `order` say
    what this rank holds. Elsewhere `seq` is the whole sequence, in plain JAX.

    Args:
      query, key, value: any float dtype. heads is a multiple of kv_heads (grouped-query attention: query head i reads
        kv head i // (heads / kv_heads)); only the kv heads travel. value_dim may differ from head_dim.
      segment_ids: a token attends only to tokens with the same id (the documents of a packed sequence). Inside jaxpar's train
        step they do not decrease along the sequence, which kernels of GPUs need.
      causal: a token attends only to itself and to earlier tokens.
      window: of these, a token attends only to the latest `window`.
      scale: None: head_dim ** -0.5.
      soft_cap: scaled scores become soft_cap * tanh(scores / soft_cap) before they are masked (Gemma 2, arXiv:2408.00118).
      axis: the mesh axis that splits the sequence, if it is manual where this is called. None: no axis splits it.
      order: what a rank of `axis` holds. "zigzag": its part of tokens that were put in `zigzag_order`. "contiguous":
        consecutive tokens of the sequence; they are exchanged for zigzag chunks, and the output back. None: zigzag, inside
        jaxpar's train step.

    Returns:
      An array of the query's dtype; statistics and sums are float32. A token with no key to attend to gets zeros.

    Raises:
      ValueError: the shapes do not fit together; seq is odd and split; the mesh has no such axis; `order` is missing in a
        `shard_map` of your own that splits the sequence.
      ConfigError: the heads cannot be shared out as `actor.model.cp_comm_type` requires.
    """
    _check_shapes(query, key, value)
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"attention: soft_cap={soft_cap} is not more than 0; for scores without a cap, leave it out")
    in_force = current_settings()
    settings = AttentionSettings() if in_force is None else in_force
    settings.calls.append(settings.cp_comm_type)
    ranks = _ranks(axis, known=in_force is not None)
    if ranks.size > 1:
        _check_split(query.shape[1], ranks, order, known=in_force is not None)
    arrays: tuple = query, key, value, segment_ids
    axes = {axis for axis in (axis,) if axis}.union(*map(varying_axes, jax.tree.leaves(arrays)))
    arrays = jax.tree.map(lambda x: vary(x, tuple(sorted(axes))), arrays)
    exchanged = ranks.size > 1 and order == "contiguous"
    if exchanged:
        arrays = to_zigzag(arrays, ranks.axis)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    spec = AttentionSpec(causal, window, scale, settings.backend, None if soft_cap is None else float(soft_cap))
    output = _exchange_and_compute(spec, settings, ranks, *arrays)
    return from_zigzag(output, ranks.axis) if exchanged else output


def _exchange_and_compute(
    spec: AttentionSpec,
    settings: AttentionSettings,
    ranks: Ring,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Output [batch, seq, heads, value_dim] for arrays in zigzag order."""
    batch, seq, heads, head_dim = query.shape
    kv_heads, value_dim = value.shape[2:]
    grouped, keys = query.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim), Keys(key, value, segment_ids)
    with jax.named_scope(CORE_ATTENTION):
        if ranks.size == 1 or settings.cp_comm_type == "p2p":
            output = ring_attention(spec, ranks, grouped, keys)
        elif settings.cp_comm_type == "all_gather":
            output = all_gather_attention(spec, ranks, grouped, keys)
        else:
            group = ranks.size if settings.cp_comm_type == "a2a" else settings.a2a_size
            output = all_to_all_attention(spec, ranks, group, grouped, keys)
    return output.reshape(batch, seq, heads, value_dim)


def _ranks(axis: str | None, *, known: bool) -> Ring:
    """The ranks that hold parts of the sequence. `known`: whether jaxpar's settings are in force.

    Raises:
      ValueError: this is a `shard_map` over other axes, and one of them may well split the sequence.
    """
    if axis is None:
        return Ring()
    if manual(axis):
        return Ring(lax.axis_size(axis), 1, axis)
    mesh = get_abstract_mesh()
    if mesh.manual_axes and axis not in mesh.axis_names and not known:
        raise ValueError(
            f"attention: axis={axis!r} is not an axis of the mesh, whose axes are {', '.join(mesh.axis_names)}: write axis= "
            f"the one that splits the sequence, or axis=None if each device holds whole sequences"
        )
    return Ring(1, 1, axis)


def _check_shapes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {kv_heads} kv heads")
    if not query.shape[1] == key.shape[1] == value.shape[1]:
        raise ValueError(
            f"attention: {query.shape[1]} queries, {key.shape[1]} keys and {value.shape[1]} values: a sequence attends to "
            f"itself, so all must be as many (attention to another sequence, or to a cache, is not supported)"
        )
    if query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1] or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"attention: query {query.shape}, key {key.shape} and value {value.shape} do not fit together: query and key "
            f"have the same head_dim, key and value the same number of heads, and all the same batch"
        )


def _check_split(seq: int, ranks: Ring, order: Order | None, *, known: bool) -> None:
    """Of a sequence that several ranks hold. `known`: whether jaxpar's settings are in force."""
    if seq % 2:
        raise ValueError(
            f"attention: {seq} tokens on a {ranks.axis} rank are not two chunks: choose a sequence length that is a multiple "
            f"of 2 * {ranks.axis} = {2 * ranks.size}"
        )
    if order is None and not known:
        raise ValueError(
            f"attention: the {ranks.size} ranks of {ranks.axis} hold parts of the sequence, and nothing says which: write "
            f'order="zigzag" if the tokens were put in jaxpar.attention.zigzag_order, or order="contiguous" if each rank '
            f"holds a consecutive part of the sequence"
        )
    if order == "contiguous" and known and get_abstract_mesh().axis_names == AXES:
        raise ValueError(
            'attention: order="contiguous", but in jaxpar\'s train step the tokens are in zigzag order: leave it out'
        )
    if order not in (None, "zigzag", "contiguous"):
        raise ValueError(f'attention: order={order!r} is neither "zigzag" nor "contiguous"')
