"""Models: the protocol that jaxpar trains, and the built-in decoder."""

from jaxpar.models.decoder import Decoder
from jaxpar.models.protocol import FunctionalModel, Model, TokenInfo, WholeModel

__all__ = ["Decoder", "FunctionalModel", "Model", "TokenInfo", "WholeModel"]
