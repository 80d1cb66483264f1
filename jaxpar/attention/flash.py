"""The backend `pallas`: attention of one block as flash kernels for GPUs, in Pallas (Triton).

FlashAttention-2 (Dao, 2023, arXiv:2307.08691): a program of the grid holds a tile of queries and walks over the keys; for
the gradients of the keys it holds a tile of keys and walks over the queries. Unlike the kernels that come with JAX, these
do what a ring needs: the forward pass returns the log-sum-exp, the backward pass takes the log-sum-exp over *all* keys,
several query heads read one kv head without copies of it, and the mask may be at any offset.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxpar.attention.flash_kernels import forward_kernel, key_grad_kernel, query_grad_kernel
from jaxpar.attention.types import AttentionSpec, Grads, Keys, Offset, OutputGrads, Partial, Queries
from jaxpar.config import ConfigError

INTERPRET = False  # True: run the kernels' steps as plain JAX, for tests without a GPU
FORWARD_TILES, BACKWARD_TILES = (128, 64), (64, 64)  # queries, keys


def forward(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset) -> Partial:
    query, key = queries.query, keys.key
    check_shapes(query, key)
    batch, tokens, kv_heads, group, head_dim = query.shape
    tiles = _tiles(FORWARD_TILES, query, key)
    per_query, all_keys = _query_tile(tiles[0], group, head_dim), _all_keys(key, group)
    output, lse = _call(
        forward_kernel,
        (batch, kv_heads * group, tokens // tiles[0]),
        tiles,
        spec,
        offset,
        inputs=[
            (query, per_query),
            (key, all_keys),
            (keys.value, all_keys),
            (queries.segments, _tokens(tiles[0])),
            (keys.segments, _all_tokens(key)),
        ],
        outputs=[(query.shape, per_query), (query.shape[:-1], _query_tile(tiles[0], group))],
    )
    return Partial(output, lse)


def backward(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset, output_grads: OutputGrads) -> Grads:
    query, key = queries.query, keys.key
    check_shapes(query, key)
    batch, tokens, kv_heads, group, head_dim = query.shape
    tiles = _tiles(BACKWARD_TILES, query, key)
    per_query, per_row = _query_tile(tiles[0], group, head_dim), _query_tile(tiles[0], group)
    all_keys = _all_keys(key, group)
    (query_grad,) = _call(
        query_grad_kernel,
        (batch, kv_heads * group, tokens // tiles[0]),
        tiles,
        spec,
        offset,
        inputs=[
            (query, per_query),
            (key, all_keys),
            (keys.value, all_keys),
            *zip(output_grads, (per_query, per_row, per_row), strict=True),
            (queries.segments, _tokens(tiles[0])),
            (keys.segments, _all_tokens(key)),
        ],
        outputs=[(query.shape, per_query)],
    )
    per_key = pl.BlockSpec((None, tiles[1], None, head_dim), lambda b, h, i: (b, i, h, 0))
    all_rows = pl.BlockSpec((None, tokens, None, group), lambda b, h, i: (b, 0, h, 0))
    all_queries = pl.BlockSpec((None, tokens, None, group, head_dim), lambda b, h, i: (b, 0, h, 0, 0))
    key_grad, value_grad = _call(
        key_grad_kernel,
        (batch, kv_heads, key.shape[1] // tiles[1]),
        tiles,
        spec,
        offset,
        inputs=[
            (query, all_queries),
            (key, per_key),
            (keys.value, per_key),
            *zip(output_grads, (all_queries, all_rows, all_rows), strict=True),
            (queries.segments, _all_tokens(query)),
            (keys.segments, _tokens(tiles[1])),
        ],
        outputs=[(key.shape, per_key), (key.shape, per_key)],
    )
    return Grads(query_grad, key_grad, value_grad)


def check_shapes(query: jax.Array, key: jax.Array) -> None:
    """Checks that the kernels can compute a block: Triton's tiles are powers of two, and there are no partial tiles.

    Raises:
      ConfigError: the tokens of a block are not a multiple of a tile, or a tile or head_dim is not a power of two >= 16.
    """
    (queries, keys), head_dim = (query.shape[1], key.shape[1]), query.shape[-1]
    for tiles in (FORWARD_TILES, BACKWARD_TILES):
        rows, columns = _tiles(tiles, query, key)
        powers = all(n >= 16 and n & (n - 1) == 0 for n in (rows, columns, head_dim))
        if queries % rows or keys % columns or not powers:
            raise ConfigError(
                f"actor.model.attention_backend: pallas needs blocks that are multiples of {rows} x {columns} tokens, and "
                f"tiles and a head_dim that are powers of two >= 16, but a block here has {queries} queries and {keys} "
                f"keys of head_dim {head_dim}: change runner.seq_length or context_parallel_size, or set "
                f"attention_backend to xla"
            )


def _tiles(tiles: tuple[int, int], query: jax.Array, key: jax.Array) -> tuple[int, int]:
    return min(tiles[0], query.shape[1]), min(tiles[1], key.shape[1])


def _call(
    kernel: Any,
    grid: tuple[int, int, int],
    tiles: tuple[int, int],
    spec: AttentionSpec,
    offset: Offset,
    inputs: Sequence[tuple[jax.Array | None, pl.BlockSpec]],
    outputs: Sequence[tuple[tuple[int, ...], pl.BlockSpec]],
) -> list[jax.Array]:
    """Calls kernel(inputs…, offset, outputs…) and returns its outputs, float32.

    An input or offset that is None is passed to the kernel as None. The kernel's name says how it is masked, for
    `jaxpar.measure.hlo.flops`.
    """
    name = f"attention_{kernel.__name__.removesuffix('_kernel')}"
    offset_array = None
    if offset is not None:
        name += "_causal" if isinstance(offset, int) and spec.causal and spec.window is None else "_masked"
        offset_array = jnp.reshape(jnp.asarray(offset, jnp.int32), (1,))
    inputs = [*inputs, (offset_array, pl.BlockSpec((1,), lambda b, h, i: (0,)))]
    query = inputs[0][0]
    assert query is not None
    # Under shard_map an output must declare the axes along which it varies between devices: the queries' own.
    output_type = {"dtype": jnp.float32, "manual_axis_type": jax.typeof(query).manual_axis_type}
    return pl.pallas_call(
        functools.partial(kernel, spec=spec, tiles=tiles),
        grid=grid,
        in_specs=[None if x is None else spec for x, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, **output_type) for shape, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=4 if query.shape[-1] <= 64 else 8, num_stages=2),
        interpret=INTERPRET,
        name=name,
    )(*(x for x, _ in inputs))


# Block specs for a grid of (batch, heads or kv heads, tiles).


def _query_tile(tile: int, group: int, *head_dim: int) -> pl.BlockSpec:
    """A tile of an array [b, q, k, g] or [b, q, k, g, d], for a grid over all query heads."""
    return pl.BlockSpec(
        (None, tile, None, None, *head_dim), lambda b, h, i: (b, i, h // group, h % group, *(0 for _ in head_dim))
    )


def _all_keys(key: jax.Array, group: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, key.shape[1], None, key.shape[3]), lambda b, h, i: (b, 0, h // group, 0))


def _tokens(tile: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, tile), lambda b, h, i: (b, i))


def _all_tokens(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, x.shape[1]), lambda b, h, i: (b, 0))
