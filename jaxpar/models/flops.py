"""The useful FLOPs of a training step, by formula: the numerator of model FLOPs utilization (MFU)."""

from jaxpar.config import Architecture


def model_flops_per_token(
    architecture: Architecture, num_params: int, seq_length: int, *, num_frozen: int = 0
) -> float:
    """FLOPs that a training step needs for one token: 6 for each parameter of a matrix product (4 if it is frozen: gradients
    pass through it, but it has none), and for attention 6 * layers * heads * head_dim * seq, the causal half (half of
    Chowdhery et al., 2022, arXiv:2204.02311, appendix B)."""
    per_token, per_pair = flops_coefficients(architecture, num_params, num_frozen=num_frozen)
    return per_token + per_pair * min(seq_length, architecture.sliding_window or seq_length)


def flops_coefficients(architecture: Architecture, num_params: int, *, num_frozen: int = 0) -> tuple[float, float]:
    """FLOPs that a training step needs for each token outside of attention, and for each pair of a token and one that it
    may attend to. If nothing below the head is trained, it needs fewer.

    Args:
      num_frozen: how many of the parameters of matrix products are frozen.
    """
    a = architecture
    lookups = 0 if a.tie_word_embeddings else a.padded_vocab_size * a.hidden_size
    return 6 * (num_params - lookups) - 2 * num_frozen, 6 * a.num_hidden_layers * a.num_attention_heads * a.head_dim
