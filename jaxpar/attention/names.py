"""Names in traced and compiled programs by which other parts of jaxpar know parts of attention."""

CORE_ATTENTION = "core_attn"  # name scope of attention's core, and its name in `recompute_modules`
KERNEL_CALL = "kernel_call"  # a jitted function that must stay one call: traced anew, its kernel has other types
