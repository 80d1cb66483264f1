"""Models: the protocol that jaxpar trains, and the built-in decoder."""

from jaxpar.models.decoder import Decoder
from jaxpar.models.functional import FunctionalModel, UserModel
from jaxpar.models.protocol import Model, Stack, TokenInfo, Whole
from jaxpar.models.suggest import suggest_dims

__all__ = ["Decoder", "FunctionalModel", "Model", "Stack", "TokenInfo", "UserModel", "Whole", "suggest_dims"]
