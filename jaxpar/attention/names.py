"""Names in the traced program by which `jaxpar.backward.pullback` knows parts of attention."""

CORE_ATTENTION = "core_attention"  # name scope of what `recompute_granularity: selective` recomputes
KERNEL_CALL = "kernel_call"  # a jitted function that must stay one call: traced anew, its kernel has other types
