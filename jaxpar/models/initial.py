"""The parameters from which a run starts: those that are given, those of a Hugging Face folder, adapters of a PEFT folder. The
others have yet to be initialized."""

from typing import Any

from jaxpar.config import Architecture
from jaxpar.models.hugging_face import load_params
from jaxpar.models.lora import only_adapters
from jaxpar.models.peft import load_adapters
from jaxpar.models.protocol import Params
from jaxpar.models.weights import Source, check_params, given_params, named_params
from jaxpar.parallel.trained import merge, partition


class InitialParams:
    """Where a model's first parameters come from.

    Args:
      shapes: of its parameters, with their dtypes.
      architecture: the built-in decoder's, or None.
      given: as in `jaxpar.Trainer`. For a decoder with adapters it need not have these.
      folder, adapters: Hugging Face's and PEFT's folder, or None.
      period: as in `jaxpar.models.weights.given_params`.

    Raises:
      ConfigError: the tree `given` does not fit the model.
    """

    def __init__(
        self,
        shapes: Params,
        architecture: Architecture | None,
        *,
        given: Source | None,
        folder: str | None,
        adapters: str | None,
        period: int = 1,
    ):
        self._architecture, self._folder, self._adapters, self._period = architecture, folder, adapters, period
        self.given, self._shapes = given, shapes
        if given is not None and not callable(given):
            check_params(given, self._given_shapes)

    @property
    def _adapter_shapes(self) -> Params:
        return only_adapters(self._shapes) if self._architecture else partition(self._shapes, self._shapes)[1]

    @property
    def _given_shapes(self) -> Params:
        """Of the parameters that `given` has."""
        adapters = named_params(self._adapter_shapes)
        if self.given is not None and not callable(self.given) and adapters.keys() & named_params(self.given).keys():
            return self._shapes
        return partition(self._shapes, self._adapter_shapes)[1]

    @property
    def are_random(self) -> bool:
        """Whether weights besides adapters are random numbers."""
        return self.given is None and self._folder is None

    def load(self, shardings: Params) -> Params:
        """A tree with None at the parameters that are to be initialized.

        Raises:
          ConfigError: a folder cannot be read, or weights do not fit.
        """
        nothing: Any = partition(self._shapes, self._shapes)[1]
        params, wanted = nothing, self._given_shapes
        if self.given is not None:
            params = given_params(self.given, wanted, partition(shardings, wanted)[0], self._period)
        elif self._folder and self._architecture:
            params = load_params(self._folder, self._architecture, wanted, partition(shardings, wanted)[0])
        adapters = self._adapter_shapes
        if self._adapters and self._architecture and not named_params(params).keys() & named_params(adapters).keys():
            own = load_adapters(self._adapters, self._architecture, adapters, partition(shardings, adapters)[0])
            params = merge(params, own)
        return params
