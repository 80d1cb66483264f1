"""Names in traced and compiled programs by which other parts of jaxpar know parts of attention."""

CORE_ATTENTION = "core_attention"  # name scope of what `recompute_granularity: selective` recomputes
KERNEL_CALL = "kernel_call"  # a jitted function that must stay one call: traced anew, its kernel has other types


def tokamax_scope(*, backward: bool, causal: bool) -> str:
    """Name scope of a call of tokamax, from which the counter of FLOPs (`jaxpar.measure.hlo.flops`) reads what it computes."""
    return f"tokamax_{'backward' if backward else 'forward'}{'_causal' if causal else ''}"
