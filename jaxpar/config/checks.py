"""The arithmetic of a config. Each function yields one line for each problem; no line means that all is well."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jaxpar.config.architecture import Architecture
from jaxpar.config.batch_checks import batch_problems, row_problems
from jaxpar.config.errors import did_you_mean, divisors, listed, must_divide, one_of
from jaxpar.config.keys import (
    LOSS_TYPES,
    RECOMPUTE_MODULES,
    Actor,
    Algorithm,
    Model,
    Optim,
    Runner,
)
from jaxpar.config.layer_checks import MOE, layer_problems

# Key → (supported values, the reason for them). Checked before training and not at load, so that `jaxpar mesh` can show
# the mesh of a file with other values.
LIMITS: dict[str, tuple[tuple[Any, ...], str]] = {
    "actor.model.expert_model_parallel_size": ((1,), MOE),
    "actor.model.expert_tensor_parallel_size": ((None, 1), MOE),
    "actor.model.num_moe_experts": ((None, 1), MOE),
    "actor.model.multi_latent_attention": ((False,), "multi-latent attention is not supported"),
    "actor.model.activation": (("swiglu", "fast-swiglu"), "the decoder only supports SwiGLU"),
    "actor.model.normalization": (("rmsnorm", "RMSNorm"), "the decoder only supports RMSNorm"),
    "actor.model.position_embedding_type": (("rope",), "the decoder only supports RoPE"),
    "actor.model.add_bias_linear": ((False,), "the decoder's linear layers have no bias"),
}


MAX_DEVICES = 2**20


def mesh_problems(model: Model, num_devices: int) -> Iterator[str]:
    tensor, pp, cp = (model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size)
    yield from _cp_problems(model)
    if model.sequence_parallel and tensor == 1:
        yield (
            "actor.model.sequence_parallel: True needs actor.model.tensor_model_parallel_size > 1, but it is 1: "
            "sequence parallelism splits over the tensor group; raise that size, or set sequence_parallel: False"
        )
    product = tensor * pp * cp
    if num_devices > MAX_DEVICES:
        yield (
            f"cluster.num_nodes: {num_devices:,} devices in all are more than {MAX_DEVICES:,}, the most that are supported: "
            "lower it, or num_gpus_per_node"
        )
    elif num_devices % product:
        yield (
            "actor.model.tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size: "
            f"{tensor} * {pp} * {cp} = {product} does not divide {num_devices} devices "
            f"({num_devices} / {product} = {round(num_devices / product, 2)}): change the sizes so that their "
            f"product is one of {listed(divisors(num_devices))}, or use a multiple of {product} devices"
        )


def _cp_problems(model: Model) -> Iterator[str]:
    key, sizes = "actor.model.hierarchical_context_parallel_sizes", model.hierarchical_context_parallel_sizes
    cp = model.context_parallel_size
    if model.cp_comm_type != "a2a+p2p":
        if sizes is not None:
            yield f"{key}: {sizes} only applies to cp_comm_type a2a+p2p, but cp_comm_type is {model.cp_comm_type}: remove it"
    elif sizes is None or len(sizes) != 2:
        yield (
            f"{key}: {'not given' if sizes is None else sizes}, but cp_comm_type a2a+p2p needs two sizes: set "
            f"the cp ranks in an all-to-all and in a ring, whose product must be context_parallel_size {cp}"
        )
    elif math.prod(sizes) != cp:
        fits = [[d, cp // d] for d in divisors(cp)]
        yield (f"{key}: {sizes[0]} * {sizes[1]} = {math.prod(sizes)} is not context_parallel_size {cp}: {one_of(fits)}")


def all_to_all_problem(heads: int, kv_heads: int, ranks: int) -> str | None:
    """One line if an all-to-all over `ranks` cp ranks cannot divide the heads of one device, else None."""
    if heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0):
        return None
    name, count = ("heads", heads) if heads % ranks else ("kv heads", kv_heads)
    return (
        f"actor.model.cp_comm_type: the all-to-all over {ranks} cp ranks cannot divide the {count} {name} on each "
        f"device of the tensor group ({count} / {ranks} = {round(count / ranks, 2)}): set p2p or all_gather, or a2a+p2p "
        "with smaller all-to-alls in hierarchical_context_parallel_sizes"
    )


def train_problems(
    runner: Runner, actor: Actor, dp: int | None, architecture: Architecture | None, *, own_rate: bool = False
) -> Iterator[str]:
    """All problems of a training run.

    Args:
      dp: None if it is unknown because the mesh itself has problems.
      architecture: None for a user's own model.
      own_rate: the learning rate is the caller's, and not from the file.
    """
    yield from _limit_problems(runner, actor)
    yield from batch_problems(runner, actor, dp)
    yield from row_problems(runner, actor.model)
    yield from _optimizer_problems(runner, actor.optim)
    yield from () if own_rate else _rate_problems(runner, actor)
    if architecture is not None:
        yield from _architecture_problems(actor.model, architecture)
    yield from schedule_problems(actor.model, architecture.num_hidden_layers if architecture else None)
    yield from layer_problems(actor.model, RECOMPUTE_MODULES if architecture else None)


def _limit_problems(runner: Runner, actor: Actor) -> Iterator[str]:
    for key, (allowed, reason) in LIMITS.items():
        top, *parts = key.split(".")
        value: Any = runner if top == "runner" else actor
        for part in parts:
            value = getattr(value, part)
        if value not in allowed:
            wanted = " or ".join(str(v) for v in allowed if v is not None)
            yield f"{key}: {value}, but {reason}: set it to {wanted}"


def schedule_problems(model: Model, num_layers: int | None, pattern: str = "") -> Iterator[str]:
    """Problems of the pipeline.

    Args:
      num_layers: None if it is unknown; 0 if the model is not a stack of layers.
      pattern: what such a layer is, if it is several of the model's blocks.
    """
    pp, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    stages_key, chunks_key = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
    if chunks is not None and chunks > 1 and pp == 1:
        yield (
            f"actor.model.{chunks_key}: {chunks} needs actor.model.{stages_key} > 1, but that is 1: there is no "
            f"pipeline to interleave; set {chunks_key} to null"
        )
    if model.pipeline_schedule == "interleaved_1f1b" and pp > 1 and (chunks or 1) == 1:
        yield (
            f"actor.model.pipeline_schedule: interleaved_1f1b needs actor.model.{chunks_key} > 1: set that to the "
            "number of layer chunks on each stage, such as 2, or set pipeline_schedule to 1f1b"
        )
    parts = pp * (chunks or 1)
    if pp > 1 and num_layers == 0:
        yield (
            f"actor.model.{stages_key}: {pp}, but the model is not a stack of blocks, so it cannot be cut into "
            "stages: set it to 1, or give a jaxpar.Stack of an embedding, blocks and a head"
        )
    elif num_layers and num_layers < parts:
        product = f"{stages_key} * {chunks_key} = {pp} * {chunks or 1} = {parts}"
        yield (
            f"actor.model.{stages_key}: the model has {pattern or f'{num_layers} layers'}, too few for {product} parts of the "
            "pipeline: lower one of the sizes so that each part has a layer"
        )


def _optimizer_problems(runner: Runner, optim: Optim) -> Iterator[str]:
    if runner.max_steps <= 0 and runner.max_epochs <= 0:
        yield (
            f"runner.max_steps: {runner.max_steps} and runner.max_epochs: {runner.max_epochs} both mean no limit: "
            "set one of them above 0"
        )
    if optim.zero_stage and not optim.use_distributed_optimizer:
        yield (
            f"actor.optim.zero_stage: {optim.zero_stage}, but actor.optim.use_distributed_optimizer is False: remove one "
            "of them"
        )
    if optim.initial_loss_scale < optim.min_loss_scale:
        yield (
            f"actor.optim.initial_loss_scale: {optim.initial_loss_scale:g} is below min_loss_scale "
            f"{optim.min_loss_scale:g}: raise it"
        )


def _rate_problems(runner: Runner, actor: Actor) -> Iterator[str]:
    optim, sched = actor.optim, actor.lr_sched
    if not optim.lr:
        yield "actor.optim.lr: not given: set the peak learning rate, for example 3.0e-4"
    if sched.max_lr is not None and optim.lr and sched.max_lr != optim.lr:
        yield (
            f"actor.lr_sched.max_lr: {sched.max_lr} differs from actor.optim.lr {optim.lr}, but both set the peak: "
            "remove one of them"
        )
    if sched.min_lr > (optim.lr or math.inf):
        yield f"actor.lr_sched.min_lr: {sched.min_lr} is above the peak, actor.optim.lr {optim.lr}: lower it"
    decay = sched.lr_decay_iters or max(runner.max_steps, 0)
    uses = ([f"actor.lr_sched.lr_decay_style {sched.lr_decay_style}"] if sched.lr_decay_style != "constant" else []) + (
        ["actor.lr_sched.lr_warmup_fraction"] if sched.lr_warmup_fraction else []
    )
    if uses and not decay:
        yield (
            f"actor.lr_sched.lr_decay_iters: not given, and runner.max_steps is {runner.max_steps}, but "
            f"{' and '.join(uses)} {'need' if len(uses) > 1 else 'needs'} it: set the number of steps of the decay"
        )
    if sched.lr_warmup_fraction and sched.lr_warmup_iters:
        yield (
            f"actor.lr_sched.lr_warmup_fraction: {sched.lr_warmup_fraction} and lr_warmup_iters "
            f"{sched.lr_warmup_iters} both set the warm-up: remove one of them"
        )
    elif sched.lr_decay_style != "constant" and 0 < decay <= int((sched.lr_warmup_fraction or 0) * decay):
        yield (
            f"actor.lr_sched.lr_warmup_fraction: {sched.lr_warmup_fraction} of {decay} steps leaves no steps for the decay: "
            "lower it, or set lr_decay_style: constant"
        )
    elif sched.lr_decay_style != "constant" and 0 < decay <= sched.lr_warmup_iters:
        yield (
            f"actor.lr_sched.lr_warmup_iters: {sched.lr_warmup_iters} is not below lr_decay_iters {decay}, so no "
            "steps are left for the decay: lower it"
        )


def _architecture_problems(model: Model, a: Architecture) -> Iterator[str]:
    tp_key, tensor = "actor.model.tensor_model_parallel_size", model.tensor_model_parallel_size
    pp = model.pipeline_model_parallel_size
    kv_heads = a.num_key_value_heads
    yield from must_divide(tp_key, tensor, "num_attention_heads", a.num_attention_heads)
    if kv_heads != a.num_attention_heads and kv_heads % tensor and tensor % kv_heads:
        fits = [t for t in divisors(a.num_attention_heads) if kv_heads % t == 0 or t % kv_heads == 0]
        yield (
            f"{tp_key}: {tensor} neither divides num_key_value_heads {kv_heads} ({kv_heads} / {tensor} = "
            f"{round(kv_heads / tensor, 2)}) nor is a multiple of it ({tensor} / {kv_heads} = "
            f"{round(tensor / kv_heads, 2)}): {one_of(fits)}"
        )
    yield from must_divide(
        tp_key,
        tensor,
        "intermediate_size",
        a.intermediate_size,
        divisors(math.gcd(a.intermediate_size, a.num_attention_heads)),
    )
    sizes = model.hierarchical_context_parallel_sizes
    ranks = {"a2a": model.context_parallel_size, "a2a+p2p": sizes[0] if sizes else 1}.get(model.cp_comm_type, 1)
    if problem := all_to_all_problem(a.num_attention_heads // tensor, max(1, kv_heads // tensor), ranks):
        yield problem
    if a.padded_vocab_size % (pp * tensor):
        divisor = math.lcm(model.make_vocab_size_divisible_by, pp * tensor)
        yield (
            f"actor.model.make_vocab_size_divisible_by: {model.make_vocab_size_divisible_by} pads the vocabulary to "
            f"{a.padded_vocab_size}, which is not a multiple of pipeline_model_parallel_size * "
            f"tensor_model_parallel_size = {pp} * {tensor} = {pp * tensor} ({a.padded_vocab_size} / {pp * tensor} = "
            f"{round(a.padded_vocab_size / (pp * tensor), 2)}): set it to {divisor}"
        )
    for key, asked, has in (
        ("add_qkv_bias", model.add_qkv_bias, a.attention_bias),
        ("qk_layernorm", model.qk_layernorm, a.qk_norm),
    ):
        if asked is not None and asked != has:
            yield f"actor.model.{key}: {asked}, but the config's {a.model_type} model has {has}: remove the key"


def user_model_problems(model: Model) -> Iterator[str]:
    """Problems of settings that only the built-in decoder reads."""
    if model.is_lora:
        yield (
            "actor.model.is_lora: True has no effect on your own model: set it to False, build the model with nnx.LoRA modules, and "
            "give Trainer(config, model, trainable=nnx.LoRAParam) or the paths of the adapters in actor.optim.trainable"
        )
    if model.tp_comm_overlap:
        yield (
            "actor.model.tp_comm_overlap: True has no effect on your own model: set it to False. A model with "
            "explicit_tensor_collectives can call jaxpar.parallel.collective_matmul.gather_then_multiply(…, overlap=True)"
        )


def algorithm_problems(algorithm: Algorithm) -> Iterator[str]:
    """Problems of the objective."""
    if algorithm.loss_type not in LOSS_TYPES:
        yield (
            f"algorithm.loss_type: {algorithm.loss_type} is not supported{did_you_mean(algorithm.loss_type, tuple(LOSS_TYPES))}: "
            f"{one_of(tuple(LOSS_TYPES))}, or give Trainer(config, objective=…)"
        )
    if algorithm.entropy_bonus and not algorithm.calculate_entropy:
        yield (
            f"algorithm.entropy_bonus: {algorithm.entropy_bonus} has no effect while algorithm.calculate_entropy is False: set "
            f"that to True, or entropy_bonus to 0"
        )
