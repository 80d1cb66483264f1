"""Which part of the sequence each cp rank holds.

Zigzag: with n = cp, the sequence is cut into 2n chunks and rank r holds chunks r and 2n-1-r, an early and a late one.
Causal attention then is the same work on every rank (Megatron-LM's context parallelism does so too).
"""

import numpy as np


def zigzag_chunks(cp: int) -> list[int]:
    """Number of the chunk at each of the 2·cp places, ranks in order."""
    return [chunk for rank in range(cp) for chunk in (rank, 2 * cp - 1 - rank)]


def zigzag_order(seq: int, cp: int) -> np.ndarray:
    """Index in the sequence of the token at each place, int [seq]: `array[:, zigzag_order(seq, cp)]` is placed.

    Raises:
      ValueError: cp > 1, and seq is not a multiple of 2·cp.
    """
    if cp == 1:
        return np.arange(seq)
    if seq % (2 * cp):
        raise ValueError(
            f"a sequence of {seq} cannot be cut into 2 * cp = {2 * cp} chunks: {seq} / {2 * cp} = {seq / (2 * cp):.2f}"
        )
    return np.arange(seq).reshape(2 * cp, -1)[zigzag_chunks(cp)].ravel()
