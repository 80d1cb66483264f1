"""Attention: one function for models, and the kinds behind it."""

from jaxpar.attention.reference import reference_attention
from jaxpar.attention.ring import attention

__all__ = ["attention", "reference_attention"]
