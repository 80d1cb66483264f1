"""Which part of the sequence each cp rank holds.

Zigzag: with n = cp, the sequence is cut into 2n chunks, and rank r holds chunks r and 2n-1-r, an early and a late one.
This makes causal attention the same amount of work on every rank, as in Megatron-LM's context parallelism.
"""

import numpy as np


def zigzag_chunks(cp: int) -> list[int]:
    """The 2·cp chunks in the order in which the ranks hold them: rank 0's two, then rank 1's, ..."""
    return [chunk for rank in range(cp) for chunk in (rank, 2 * cp - 1 - rank)]


def zigzag_order(seq: int, cp: int) -> np.ndarray:
    """Sequence indices in the order in which the ranks hold the tokens, int [seq].

    `array[:, zigzag_order(seq, cp)]`, split evenly along dimension 1, gives each rank its tokens.

    Raises:
      ValueError: cp > 1 and seq is not a multiple of 2·cp.
    """
    if cp == 1:
        return np.arange(seq)
    if seq % (2 * cp):
        raise ValueError(
            f"a sequence of {seq} tokens cannot be cut into 2 * cp = {2 * cp} chunks ({seq} / {2 * cp} = "
            f"{seq / (2 * cp):.2f}): choose a multiple of {2 * cp}"
        )
    return np.arange(seq).reshape(2 * cp, -1)[zigzag_chunks(cp)].ravel()
