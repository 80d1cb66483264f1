"""Every key of a config file: ours, typed, with units and defaults, then RLinf's and Megatron-LM's that we ignore.

Meanings and defaults are Megatron-LM's (its user guide and `megatron/training/arguments.py`) unless a comment says
otherwise; the architecture's fields are those of a Hugging Face `config.json`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class ConfigError(Exception):
    """The config is wrong. `problems` has one line for each thing to change; `str()` is those lines."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = list(dict.fromkeys(problems.splitlines() if isinstance(problems, str) else problems))
        super().__init__("\n".join(self.problems))


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-05 as text (it wants 2.0e-05), and so do quotes: take text that is a number as the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path | int | float) and not isinstance(value, bool) else value


def _precision(value: Any) -> Any:
    """The spellings that RLinf's files, torch and Lightning have for the three precisions."""
    name = str(value).removeprefix("torch.")
    aliases = {
        "bf16-mixed": "bf16",
        "bfloat16": "bf16",
        "16": "fp16",
        "16-mixed": "fp16",
        "float16": "fp16",
        "half": "fp16",
        "32": "fp32",
        "32-true": "fp32",
        "float32": "fp32",
        "float": "fp32",
    }
    return aliases.get(name, name)


def _paths(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Interval = Annotated[int, Field(ge=-1)]
Number = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Beta = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Text = Annotated[str, BeforeValidator(_text)]
Paths = Annotated[list[Text], BeforeValidator(_paths)]


class Section(BaseModel):
    # strict: True is not the integer 1, "4" is not 4. Nothing is converted in silence.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: Any) -> Any:
        def means_default(key: str) -> bool:
            field = cls.model_fields.get(key)
            return field is not None and type(None) not in get_args(field.annotation)

        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or not means_default(key)}


class Cluster(Section):
    num_nodes: Count = 1
    num_gpus_per_node: Count | None = None  # ours: null asks the runtime
    xla_flags: dict[str, str | bool | int] = {}  # ours: XLA flags that win over jaxpar/run/xla.py, without their dashes
    deterministic: bool = False  # ours: only XLA GPU kernels that give the same bits each time; a CPU's always do


class Logger(Section):
    # Beside metrics.jsonl, which is always written. RLinf's other two load, and a note says that they are not there.
    logger_backends: Annotated[list[Literal["tensorboard", "wandb", "swanlab"]], BeforeValidator(_paths)] | None = [
        "tensorboard"
    ]


class Runner(Section):
    seq_length: Count = 0  # tokens; 0: not given
    max_steps: Interval = -1  # optimizer steps; 0 or -1: no limit, max_epochs ends the run
    max_epochs: Interval = 1
    save_interval: Interval = -1  # steps; 0 or -1: only at the end
    # Ours, up to the next comment. A checkpoint goes when none of the three keeps it.
    keep_checkpoints: Count | None = None  # the newest so many; null: all
    keep_checkpoint_interval: Count | None = None  # those of steps that are a multiple of it
    keep_best_checkpoint: bool = False  # the one of the lowest validation loss, saved when it is reached
    verify_checkpoint: bool = True  # at resume, read all files once and compare their checksums
    max_skipped_steps: Count = 10  # steps in a row with a loss or gradient that is not finite, and the run stops
    stall_timeout: Seed = 1800  # seconds without progress of a process, after which all end; 0: never
    check_replicas_interval: Interval = -1  # steps; 0 or -1: never
    val_check_interval: Interval = -1  # steps; 0 or -1: never
    limit_val_batches: Count | None = None  # Lightning's name: global batches of an evaluation; null: all
    log_interval: Count = 1
    logger: Logger = Logger()
    output_dir: Text = "results"
    experiment_name: Text = "jaxpar"
    resume_dir: Text | None = None  # null: start anew; "auto": newest checkpoint of this experiment; or a path
    enable_dynamic_batch_size: bool = False  # microbatches of whole documents, packed into rows of a token budget
    max_tokens_per_mbs: Count | None = None  # that budget, for each cp rank


class Data(Section):
    train_data_paths: Paths = []
    val_data_paths: Paths = []
    shuffle: bool = True
    seed: Seed = 1234
    num_workers: Seed = 0
    text_key: Text = "text"  # ours: the field of a JSONL or Parquet record that is trained on


class Model(Section):
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    context_parallel_size: Count = 1
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"  # what cp ranks send each other for attention
    hierarchical_context_parallel_sizes: list[Count] | None = None  # of a2a+p2p: ranks of an all-to-all, of a ring
    attention_backend: Literal["auto", "xla", "pallas"] = "auto"  # the name is Megatron's; xla: plain JAX; pallas: ours
    sequence_parallel: bool = False
    virtual_pipeline_model_parallel_size: Count | None = None
    pipeline_schedule: Text = "1f1b"  # ours
    expert_model_parallel_size: Count = 1
    expert_tensor_parallel_size: Count | None = None
    num_moe_experts: Count | None = None
    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Count | None = None
    offload_activations: bool = False  # ours: what is not computed again waits in pinned host memory
    precision: Annotated[Literal["bf16", "fp16", "fp32"], BeforeValidator(_precision)] = "bf16"
    seq_length: Count | None = None  # RLinf repeats runner.seq_length here
    model_path: Text | None = None  # folder with a Hugging Face config.json
    model_type: Text | None = None
    make_vocab_size_divisible_by: Count = 128
    is_lora: bool = False
    multi_latent_attention: bool = False
    activation: Text = "swiglu"
    normalization: Text = "rmsnorm"
    position_embedding_type: Text = "rope"
    add_bias_linear: bool = False
    add_qkv_bias: bool | None = None  # Megatron's name for what attention_bias says
    qk_layernorm: bool | None = None  # follows from model_type; checked against it
    # Hugging Face's names; given beside model_path they win over its config.json.
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Count | None = None
    rms_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    sliding_window: Count | None = None
    use_sliding_window: bool | None = None
    max_position_embeddings: Count | None = None
    initializer_range: Positive | None = None
    hidden_act: Text | None = None


class Optim(Section):
    optimizer: Text = "adam"  # with decoupled weight decay (AdamW), as in Megatron
    lr: Positive = 0.0  # peak; 0: not given
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.999
    adam_eps: Positive = 1e-8
    weight_decay: Number = 0.01
    clip_grad: Number | None = 1.0  # global norm; 0 or null: off
    use_distributed_optimizer: bool = True  # ZeRO: state split over dp and cp
    zero_stage: Literal[0, 1, 2, 3] | None = None  # ours; null: 1, or 0 without use_distributed_optimizer
    # A layer's parameters come (ZeRO-3) while the layer before computes, its gradients leave (ZeRO-2 and 3) while the next
    # one does. Each takes a layer's memory.
    overlap_param_gather: bool = True
    overlap_grad_reduce: bool = True
    optimizer_cpu_offload: bool = False  # moments rest in pinned host memory
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"  # ours: of gradients on their way over dp and cp
    # For fp16 alone. A number is a static scale; null is a dynamic one, by the four settings below.
    loss_scale: Positive | None = None
    initial_loss_scale: Positive = 2.0**32
    min_loss_scale: Positive = 1.0
    loss_scale_window: Count = 1000  # steps without overflow, after which the scale doubles
    hysteresis: Count = 2  # overflows that are forgiven before it halves


class LrSched(Section):
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_iters: Seed = 0
    lr_warmup_fraction: Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)] | None = None  # of lr_decay_iters
    lr_warmup_init: Number = 0.0
    lr_decay_iters: Count | None = None  # steps, warm-up included; null: runner.max_steps
    min_lr: Number = 0.0
    max_lr: Positive | None = None  # null: optim.lr


class Tokenizer(Section):
    tokenizer_model: Text | None = None  # null or "byte": bytes; or a path to a Hugging Face tokenizer


class Megatron(Section):
    """Nothing in it is ours."""


class Actor(Section):
    micro_batch_size: Count = 0  # sequences a device group takes at once; 0: not given
    global_batch_size: Count = 0  # sequences an optimizer step, documents with dynamic batches; 0: not given
    seed: Seed = 1234
    model: Model = Model()
    optim: Optim = Optim()
    lr_sched: LrSched = LrSched()
    tokenizer: Tokenizer = Tokenizer()
    megatron: Megatron = Megatron()


SECTIONS: dict[str, type[Section]] = {"cluster": Cluster, "runner": Runner, "data": Data, "actor": Actor}
ARCHITECTURE_KEYS = tuple(Model.model_fields)[list(Model.model_fields).index("hidden_size") :]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPAQUE_SECTIONS = _names("""
    agentlightning agentloop algorithm critic defaults env eval hydra inference profile_data reward rollout
    rollout_judge rollout_server tools weight_syncer
""")
"""Top-level sections ignored whole; their values may still be the target of an interpolation."""

FOREIGN_KEYS: dict[str, frozenset[str]] = {
    "cluster": _names("""
        auto_scheduler component_placement node_groups recreate_nccl_groups use_pre_process_policy
        use_wait_before_last_iter_policy
    """),
    "runner": _names("only_eval task_type"),
    "runner.logger": _names("experiment_name log_path project_name"),
    "data": _names("""
        answer_key answer_separator apply_chat_template apply_chat_template_kwargs choice_key data_size dataset_name
        eval_data_paths filter_prompt_by_length image_keys is_hybrid is_markdown lazy_loading max_prompt_length
        prompt_key rollout_batch_size type unique_columns use_chat_template val_rollout_batch_size validation_shuffle
    """),
    "actor": _names("""
        calculate_flops enable_dp_load_balance enable_offload eval_batch_size fsdp_config group_name mcore_gpt
        offload_grad offload_optimizer offload_weight pack_traj spec_name sync_precision training_backend
    """),
    "actor.model": _names("""
        apply_rope_fusion attention_softmax_in_fp32 batch_p2p_comm bias_activation_fusion bias_dropout_fusion
        encoder_seq_length gradient_accumulation_fusion init_method_std masked_softmax_fusion megatron_checkpoint
        moe_aux_loss_coeff moe_grouped_gemm moe_permute_fusion moe_router_bias_update_rate
        moe_router_load_balancing_type moe_router_pre_softmax moe_router_topk moe_token_dispatcher_type
        persist_layer_norm use_cpu_initialization variable_seq_lengths
    """),
    "actor.optim": _names("""
        bf16 fp16 lr_warmup_steps_ratio min_lr
        optimizer_enable_pin optimizer_offload_fraction overlap_param_gather_with_optimizer_step total_training_steps
        use_precision_aware_optimizer
    """),
    "actor.lr_sched": _names("""
        end_weight_decay override_opt_param_scheduler start_weight_decay use_checkpoint_opt_param_scheduler
        weight_decay_incr_style
    """),
    "actor.tokenizer": _names("padding_side trust_remote_code use_fast"),
    "actor.megatron": _names("""
        accumulate_allreduce_grads_in_fp32 async_save auto_detect_ckpt_format check_for_large_grads
        check_for_nan_in_loss_and_grad ckpt_convertor ckpt_format ckpt_fully_parallel_save ddp_average_in_collective
        ddp_bucket_size ddp_num_buckets ddp_pad_buckets_for_high_nccl_busbw distributed_backend
        distributed_timeout_minutes log_progress mbridge nccl_communicator_config_path
        num_distributed_optimizer_instances profiler timing_log_level timing_log_option tp_comm_bootstrap_backend
        tp_comm_overlap_cfg use_dist_ckpt use_hf_ckpt use_profiler use_tp_pp_dp_mapping
    """),
}
"""Section → its ignored keys, with everything below them."""


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def one_of(choices: Sequence[Any]) -> str:
    return ("choose one of " if len(choices) > 1 else "choose ") + ", ".join(map(str, choices))


def must_divide(key: str, size: int, what: str, total: int, choices: Sequence[int] = ()) -> Iterator[str]:
    """`choices`: what to suggest, where not every divisor of `total` will do."""
    if total % size:
        yield (
            f"{key}: {size} does not divide {what} {total} ({total} / {size} = {round(total / size, 2)}): "
            f"{one_of(choices or divisors(total))}"
        )


def describe_error(error: Any, suspects: set[str] | None = None) -> str:
    """One line of ours for one error of pydantic's. Adds to `suspects` the keys that the user got wrong."""
    key, kind, value, context = ".".join(map(str, error["loc"])), error["type"], error["input"], error.get("ctx", {})
    suspects = set() if suspects is None else suspects
    suspects.update(str(part) for part in error["loc"][-1:] if isinstance(part, str))
    if kind == "extra_forbidden":
        meant = _did_you_mean(key)
        suspects.update(meant.split(".")[-1:])
        return f"{key}: unknown key" + (f": did you mean {meant}?" if meant else ": remove it")
    limits = {
        "greater_than": ("gt", "above"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "below"),
        "less_than_equal": ("le", "at most"),
    }
    if kind in limits:
        return f"{key}: must be {limits[kind][1]} {context[limits[kind][0]]}, got {value!r}"
    expected = {
        "int": "an integer",
        "float": "a number",
        "finite": "a finite number",
        "bool": "True or False",
        "string": "text",
        "list": "a list",
        "dict": "keys with values",
        "model": "a section (keys below it)",
        "literal": f"one of {str(context.get('expected', '')).replace(' or ', ', ')}",
    }.get(kind.split("_")[0])
    return f"{key}: expected {expected}, got {value!r}" if expected else f"{key}: {error['msg']}, got {value!r}"


def _known_keys(section: type[Section], path: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{path}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _known_keys(field.annotation, f"{path}{name}.")


def _did_you_mean(key: str) -> str:
    """The same name in another section, else the most similar name in its own; "" if nothing comes near."""
    path, _, name = key.rpartition(".")
    known = [k for top, section in SECTIONS.items() for k in (top, *_known_keys(section, f"{top}."))]
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    own = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == path]
    own += FOREIGN_KEYS.get(path, ()) if path else OPAQUE_SECTIONS
    close = difflib.get_close_matches(name, own, n=1)
    return elsewhere[0] if elsewhere else f"{path}.{close[0]}".lstrip(".") if close else ""
