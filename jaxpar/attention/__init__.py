"""Attention: the function that models call, and its implementations under context parallelism."""

from jaxpar.attention.choose import choice_lines
from jaxpar.attention.dispatch import attention
from jaxpar.attention.flax import flax_attention
from jaxpar.attention.reference import reference_attention
from jaxpar.attention.settings import AttentionSettings, Backend, attention_settings
from jaxpar.parallel.zigzag import zigzag_order

__all__ = [
    "AttentionSettings",
    "Backend",
    "attention",
    "attention_settings",
    "choice_lines",
    "flax_attention",
    "reference_attention",
    "zigzag_order",
]
