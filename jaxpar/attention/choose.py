"""Which kernel computes a block.

A kernel is a module with three functions: `problem(backend, needs)` says why it cannot compute such a block (None: it can),
`forward(spec, queries, keys, offset)` returns a `Partial`, and `backward(spec, queries, keys, offset, output_grads)`
returns `Grads`.
"""

from types import ModuleType
from typing import Literal

from jaxpar.attention import blockwise, cudnn, tokamax
from jaxpar.attention.settings import Backend
from jaxpar.attention.types import AttentionSpec, BlockNeeds, Keys, Offset, Queries
from jaxpar.config import ConfigError

# In the order of preference: of the published times of H100s, cuDNN's are the best (tokamax 0.0.12 ships them as data).
KERNELS: dict[str, ModuleType] = {"cudnn": cudnn, "tokamax": tokamax, "xla": blockwise}
NAMES = {"cudnn": "cuDNN", "tokamax": "tokamax", "xla": "plain JAX"}


def kernel_for(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset) -> ModuleType:
    """The kernel for a block. What was chosen, and why, is added to `spec.backend.choices`.

    Raises:
      ConfigError: the settings name a kernel that cannot compute such a block.
    """
    query = queries.query
    documents = queries.segments is not None and keys.segments is not None
    needs = BlockNeeds(str(query.dtype), query.shape[-1], documents, _mask(spec, offset))
    name, why = choose(spec.backend, needs)
    spec.backend.choices[f"{NAMES[name]}: {needs}"] = why
    return KERNELS[name]


def choose(backend: Backend, needs: BlockNeeds) -> tuple[str, str]:
    """(key of KERNELS, why none before it can). Raises as `kernel_for`."""
    if backend.name != "auto":
        if problem := KERNELS[backend.name].problem(backend, needs):
            raise ConfigError(
                f"actor.model.attention_backend: {backend.name} cannot compute {needs}, which this run needs: {problem}; "
                f"set auto"
            )
        return backend.name, "named in the config"
    reasons: list[str] = []
    for name, kernel in KERNELS.items():
        problem = kernel.problem(backend, needs)
        if problem is None:
            break
        reasons.append(f"{NAMES[name]} cannot: {problem}")
    return name, "; ".join(reasons)


def _mask(spec: AttentionSpec, offset: Offset) -> Literal["causal", "window", "shifted"] | None:
    if offset is None or not (spec.causal or spec.window is not None):
        return None
    if not (isinstance(offset, int) and offset == 0 and spec.causal):
        return "shifted"
    return "causal" if spec.window is None else "window"
