"""Problems of the settings that say how a layer is computed: what is recomputed, and which transfers overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxpar.config.errors import did_you_mean, one_of
from jaxpar.config.keys import Model

MOE = "mixture of experts is not supported"
_NOT_RECOMPUTED = {  # Megatron-LM's other names for recompute_modules
    **dict.fromkeys(("moe", "moe_act", "shared_experts"), f"is a part of experts, but {MOE}"),
    "mla_up_proj": "is a part of multi-latent attention, which is not supported",
}


def layer_problems(model: Model, modules: Sequence[str] | None) -> Iterator[str]:
    """All of them. `modules`: the names that recompute_modules may have, None if the model's block has yet to be traced."""
    yield from _recompute_problems(model)
    yield from _module_problems(model, modules)
    yield from _overlap_problems(model)


def _recompute_problems(model: Model) -> Iterator[str]:
    if model.recompute_granularity == "selective" and model.recompute_method is not None:
        yield (
            f"actor.model.recompute_method: {model.recompute_method} only applies to recompute_granularity full, but "
            "recompute_granularity is selective: remove it, or set recompute_granularity: full"
        )
    if model.recompute_granularity != "full":
        return
    if model.recompute_method is None:
        yield (
            "actor.model.recompute_method: not given, but recompute_granularity full needs it: set uniform (every layer, "
            "in groups of recompute_num_layers) or block (the first recompute_num_layers of each chunk of layers)"
        )
    if model.recompute_num_layers is None:
        yield (
            "actor.model.recompute_num_layers: not given, but recompute_granularity full needs it: set a number of "
            "layers, such as 1"
        )


def _module_problems(model: Model, known: Sequence[str] | None) -> Iterator[str]:
    """Problems of recompute_modules. `known` are the names that the model has, None if its block has yet to be traced."""
    key, modules = "actor.model.recompute_modules", model.recompute_modules
    if modules is None:
        return
    if model.recompute_granularity != "selective":
        yield (
            f"{key}: {modules} only applies to recompute_granularity selective, but recompute_granularity is "
            f"{model.recompute_granularity or 'null'}: remove it, or set recompute_granularity: selective"
        )
    if not modules:
        yield f"{key}: [] names nothing: name some modules, or set recompute_granularity: null"
    for name in modules:
        if known is not None and name not in known:
            reason = _NOT_RECOMPUTED.get(name) or f"is unknown{did_you_mean(name, known)}"
            yield f"{key}: {name} {reason}: {one_of(known)}"


def _overlap_problems(model: Model) -> Iterator[str]:
    if model.tp_comm_overlap and not model.sequence_parallel:
        yield (
            "actor.model.tp_comm_overlap: True needs actor.model.sequence_parallel: True, but that is False: only the "
            "gathers and reduce-scatters of sequence parallelism are cut into pieces; set sequence_parallel: True and "
            "tensor_model_parallel_size > 1, or tp_comm_overlap: False"
        )
