"""The GPU that a program is for. It may not be here: `jaxpar compile` works without one."""

import jax

from jaxpar.attention.settings import Backend

LOW_PRECISION = ("bfloat16", "float16")


def compute_capability(backend: Backend) -> tuple[int, int] | None:
    """NVIDIA's number of the architecture: (8, 0) Ampere, (9, 0) Hopper, (10, 0) Blackwell; None for no GPU of NVIDIA's."""
    text = getattr(backend.device, "compute_capability", None) or ""
    major, _, minor = str(text).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def is_absent(backend: Backend) -> bool:
    """Whether the device is only there to compile for. Libraries that ask jax for "the GPU" then need to be told."""
    return backend.device not in jax.devices()


def merge_heads(x: jax.Array) -> jax.Array:
    """[b, q, k, g, d] → [b, q, k·g, d]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def split_heads(statistics: jax.Array, query: jax.Array) -> jax.Array:
    """Statistics [b, k·g, q] → [b, k, g, q], for a query [b, q, k, g, d]."""
    batch, tokens, kv_heads, group, _ = query.shape
    return statistics.reshape(batch, kv_heads, group, tokens)


def join_statistics(statistics: jax.Array) -> jax.Array:
    """The inverse of `split_heads`."""
    batch, _, _, tokens = statistics.shape
    return statistics.reshape(batch, -1, tokens)
