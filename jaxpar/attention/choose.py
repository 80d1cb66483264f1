"""Which kernel computes a block.

A kernel is a module with three functions: `problem(backend, needs)` says why it cannot compute such a block (None: it can),
`forward(spec, queries, keys, offset)` returns a `Partial`, and `backward(spec, queries, keys, offset, output_grads)`
returns `Grads`.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Literal

from jaxpar.attention import blockwise, cudnn, tokamax
from jaxpar.attention.gpu import LOW_PRECISION, compute_capability
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
    needs = _needs(spec, queries, keys, offset)
    name, why = choose(spec.backend, needs)
    spec.backend.choices[f"{NAMES[name]}: {needs}"] = why
    return KERNELS[name]


def choose(backend: Backend, needs: BlockNeeds) -> tuple[str, str]:
    """(key of KERNELS, why it). On the CPU there is no choice, and no reason is given. Raises as `kernel_for`."""
    if backend.name != "auto" and (problem := KERNELS[backend.name].problem(backend, needs)):
        raise ConfigError(
            f"actor.model.attention_backend: {backend.name} cannot compute {needs}, which this run needs: {problem}; "
            f"set auto"
        )
    if getattr(backend.device, "platform", "cpu") == "cpu":
        return "xla", ""
    if backend.name != "auto":
        return backend.name, f"attention_backend: {backend.name}{'; set auto' if backend.name == 'xla' else ''}"
    reasons: dict[str, list[str]] = {}
    for name, kernel in KERNELS.items():
        problem = kernel.problem(backend, needs)
        if problem is None:
            break
        reasons.setdefault(problem, []).append(NAMES[name])
    why = [f"{' and '.join(names)} cannot: {problem}" for problem, names in reasons.items()]
    why += _advice(backend, needs) if name == "xla" else []
    return name, "; ".join(why) or "the fastest, by published times"


def choice_lines(choices: Mapping[str, str]) -> list[str]:
    """`Backend.choices` for the user to read. Where there is no choice, there is no line."""
    lines = [f"attention: {what} ({why})" for what, why in choices.items() if why]
    return [line.replace(f": {NAMES['xla']}:", f": SLOW, in {NAMES['xla']}:", 1) for line in lines]


def _advice(backend: Backend, needs: BlockNeeds) -> list[str]:
    """What to change so that a kernel can compute such a block."""
    capability = compute_capability(backend)
    if capability is None:
        return []
    advice = [] if needs.dtype in LOW_PRECISION else ["set actor.model.precision: bf16"]
    cudnn_could = not needs.soft_cap and needs.value_dim is None
    if capability[0] not in tokamax.ARCHITECTURES and cudnn_could:  # so only cuDNN is left
        if needs.documents:
            advice.append(
                "set data.reset_attention_mask: false, if tokens may attend to the documents before their own"
            )
        if needs.mask == "shifted":
            advice.append("set actor.model.cp_comm_type: a2a")
    return advice


def _needs(spec: AttentionSpec, queries: Queries, keys: Keys, offset: Offset) -> BlockNeeds:
    head_dim, value_dim = queries.query.shape[-1], keys.value.shape[-1]
    return BlockNeeds(
        str(queries.query.dtype),
        head_dim,
        queries.segments is not None and keys.segments is not None,
        _mask(spec, offset),
        spec.soft_cap is not None,
        None if value_dim == head_dim else value_dim,
    )


def _mask(spec: AttentionSpec, offset: Offset) -> Literal["causal", "window", "shifted"] | None:
    if offset is None or not (spec.causal or spec.window is not None):
        return None
    if not (isinstance(offset, int) and offset == 0 and spec.causal):
        return "shifted"
    return "causal" if spec.window is None else "window"
