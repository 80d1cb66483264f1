"""Random numbers that are the same on every layout: for dropout, and for whatever else a model draws.

A number must not depend on how the batch is split. So it is drawn for a token by the token's place: its row in the global
batch and its index in the sequence. `jax.random` draws by the place in the local array, which differs between layouts. But it
lets one define a kind of key. Ours carries, beside the two words of a Threefry key, where the local tokens lie.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import random as extension

from jaxpar.parallel.collectives import rank_and_size, vary, varying_axes

UINTS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}
WAYS = ("dp", "cp")  # tokens differ between the ranks of these


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["rows", "seq"])
@dataclass(frozen=True)
class TokenKey:
    """A key for the tokens of one microbatch on one device.

    Attributes:
      words: uint32 [5]: two words of a Threefry key, the first row's index in the global batch, the indices in the sequence
        of the first tokens of this cp rank's early and late chunk.
      rows, seq: the local tokens, [rows, seq].
    """

    words: jax.Array
    rows: int
    seq: int

    def fold_in(self, number: Any) -> "TokenKey":
        """A key for one of several uses, such as a layer."""
        return replace(self, words=jax.random.key_data(jax.random.fold_in(self.key, number)))

    @property
    def key(self) -> jax.Array:
        """A key for `jax.random`. It draws shapes (), [rows, seq, …], [rows, 1, …] and [rows * seq, …], and raises
        ValueError for others, whose numbers would depend on the layout."""
        return jax.random.wrap_key_data(self.words, impl=_kind_of_key(self.rows, self.seq))


def token_keys(seed: jax.Array, num_microbatches: int, rows: int, seq: int) -> jax.Array:
    """The words of each microbatch's `TokenKey`, uint32 [num_microbatches, 5], on this device.

    Args:
      seed: uint32 [2], the data of a Threefry key, the same on all devices.
      rows, seq: the local tokens of a microbatch.
    """
    dp, _ = rank_and_size("dp")
    cp, ways = rank_and_size("cp")
    first_rows = (dp * num_microbatches + jnp.arange(num_microbatches)) * rows
    chunk = seq // 2  # see `jaxpar.parallel.zigzag`; with cp = 1, the two chunks follow each other
    places = [cp * chunk, (2 * ways - 1 - cp) * chunk if ways > 1 else chunk]
    columns = [*seed, first_rows, *places]
    spread = [vary(jnp.broadcast_to(jnp.asarray(x, jnp.uint32), (num_microbatches,)), WAYS) for x in columns]
    return jnp.stack(spread, axis=1)


@functools.cache
def _kind_of_key(rows: int, seq: int) -> Any:
    def bits(words: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
        return _token_bits(words, bit_width, shape, rows, seq)

    return extension.define_prng_impl(
        key_shape=(5,), seed=_no_seed, split=_split, random_bits=bits, fold_in=_fold_in,
        name=f"jaxpar_tokens_{rows}x{seq}", tag="tok",
    )  # fmt: skip


def _no_seed(_: Any) -> Any:
    raise ValueError("a key of tokens is made by jaxpar.parallel.randomness.token_keys, not from a seed")


def _with_words(words: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Keys [..., 5] with these two words and the place of `words`."""
    place = jnp.broadcast_to(words[2:], (*first.shape, 3))
    return jnp.concatenate([first[..., None], second[..., None], place], axis=-1)


def _fold_in(words: jax.Array, data: Any) -> jax.Array:
    return _with_words(words, *_hash(words[0], words[1], jnp.uint32(0), data.astype(jnp.uint32)))


def _split(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    count = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _with_words(words, *_hash(words[0], words[1], jnp.uint32(1), count))


def _token_bits(words: jax.Array, bit_width: int, shape: tuple[int, ...], rows: int, seq: int) -> jax.Array:
    """Random bits of a shape whose first dimensions are the local tokens."""
    if shape[:1] == (rows * seq,) and shape[:2] != (rows, seq):
        return _token_bits(words, bit_width, (rows, seq, *shape[1:]), rows, seq).reshape(shape)
    if shape and shape[:2] not in ((rows, seq), (rows, 1)):
        raise ValueError(
            f"random numbers of shape {list(shape)}: they would depend on the layout. jaxpar draws them for tokens, of "
            f"which a device has [{rows}, {seq}] here: draw a shape that begins with [batch, seq], [batch, 1] or "
            f"[batch * seq], or a scalar"
        )
    k0, k1, first_row, early, late = words
    if not shape:
        high, low = _hash(k0, k1, jnp.uint32(2), jnp.uint32(0))
    else:
        row = first_row + jnp.arange(rows, dtype=jnp.uint32)
        k0, k1 = (k[:, None, None] for k in _hash(k0, k1, jnp.uint32(3), row))  # a key for each row
        index = jnp.arange(shape[1], dtype=jnp.uint32)
        half = seq // 2
        token = jnp.where(index < half, early + index, late + index - half) if shape[1] == seq else index
        element = jnp.arange(math.prod(shape[2:]), dtype=jnp.uint32)
        high, low = _hash(k0, k1, token[:, None], element)
    bits = high ^ low
    if bit_width == 64:
        bits = (high.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)
    return bits.astype(UINTS[bit_width]).reshape(shape)


def _hash(*words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 (Salmon et al., 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") of (key, key, count, count)."""
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in words))
    axes = tuple({axis: None for x in words for axis in varying_axes(jnp.asarray(x))})
    spread = [vary(jnp.broadcast_to(x, shape), axes) for x in words]
    return tuple(extension.threefry2x32_p.bind(*spread))
