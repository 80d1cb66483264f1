"""Every key of a config file, typed, with its unit and default.

Unless a comment says otherwise, meanings and defaults are Megatron-LM's (its user guide and
`megatron/training/arguments.py`), and the architecture's fields are those of a Hugging Face `config.json`. "Ours" marks
keys that neither RLinf nor Megatron-LM has.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxpar.config.values import (
    AsList,
    Beta,
    Count,
    Flag,
    Interval,
    Name,
    NonNegative,
    Number,
    Paths,
    Positive,
    Precision,
    Printable,
    Rate,
    Real,
    Share,
    Text,
    Texts,
    UserPath,
    Width,
)

TP_OVERLAP_PIECES = 4  # of the sequence, with tp_comm_overlap; TransformerEngine's default number

# What `recompute_modules` may name in the built-in decoder, the default first. linear_qkv and linear_proj are Megatron's
# names of these layers, but not among those of its --recompute-modules.
RECOMPUTE_MODULES = ("core_attn", "layernorm", "linear_qkv", "linear_proj", "mlp")


class Section(BaseModel):
    # strict: True is not the integer 1, and "4" is not 4. Nothing is converted silently.
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
    num_nodes: Annotated[int, Field(gt=0, le=100_000)] = 1
    num_gpus_per_node: Annotated[int, Field(gt=0, le=4096)] | None = None  # ours; null: ask the runtime
    xla_flags: dict[Printable, Flag] = {}  # ours: XLA flags without their dashes; they win over jaxpar/run/xla.py
    deterministic: bool = False  # ours: only GPU kernels that give the same bits each time; CPU kernels always do


class Logger(Section):
    project_name: Text = "jaxpar"  # for wandb
    # In addition to metrics.jsonl, which is always written. RLinf's swanlab is accepted, with a note that it is not
    # supported.
    logger_backends: Annotated[list[Literal["tensorboard", "wandb", "swanlab"]], AsList] | None = ["tensorboard"]


class Runner(Section):
    seq_length: Count = 0  # tokens; 0: not given
    max_steps: Interval = -1  # optimizer steps; 0 or -1: no limit, max_epochs ends the run
    max_epochs: Interval = 1
    save_interval: Interval = -1  # steps; 0 or -1: only at the end
    # Ours, from here to limit_val_batches. A checkpoint is deleted when none of the three keep_ keys keeps it.
    keep_checkpoints: Count | None = None  # how many of the newest to keep; null: all
    keep_checkpoint_interval: Count | None = None  # keep those whose step is a multiple of it
    keep_best_checkpoint: bool = False  # save and keep the one with the lowest validation loss
    verify_checkpoint: bool = True  # at resume, read all files once and compare their checksums
    max_skipped_steps: Count = 10  # consecutive steps with a non-finite loss or gradient that stop the run
    stall_timeout: NonNegative = 1800  # seconds without progress in one process after which all processes end; 0: never
    check_replicas_interval: Interval = -1  # steps; 0 or -1: never
    val_check_interval: Interval = -1  # steps; 0 or -1: never
    limit_val_batches: Count | None = None  # Lightning's name: global batches of an evaluation; null: all
    log_interval: Count = 1
    logger: Logger = Logger()
    output_dir: UserPath = "results"
    experiment_name: Name = "jaxpar"  # a folder in output_dir
    # null: start anew; auto: newest checkpoint of this experiment; fresh: as null, although all its checkpoints are torn; or a path
    resume_dir: UserPath | None = None
    resume_changes: Texts = []  # ours: settings (or data) that are meant to differ from those of the checkpoint
    enable_dynamic_batch_size: bool = False  # microbatches of whole documents, packed into rows of a token budget
    max_tokens_per_mbs: Count | None = None  # that budget in tokens, per cp rank


class Data(Section):
    train_data_paths: Paths = []
    val_data_paths: Paths = []
    shuffle: bool = True
    seed: NonNegative = 1234
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    text_key: Text = "text"  # ours: the field of a JSONL or Parquet record to train on
    # Megatron's name, but True by default: tokens attend only to their own document. False: to all before them in the row.
    reset_attention_mask: bool = True


class ArchitectureFields(Section):
    """The architecture, under Hugging Face's names. Given beside model_path, these keys win over its config.json."""

    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    num_hidden_layers: Annotated[int, Field(gt=0, le=10_000)] | None = None
    num_attention_heads: Width | None = None
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    vocab_size: Annotated[int, Field(gt=0, le=2**28)] | None = None
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


class Model(ArchitectureFields):
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    context_parallel_size: Count = 1
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"  # how cp ranks communicate in attention
    hierarchical_context_parallel_sizes: list[Count] | None = None  # for a2a+p2p: ranks in an all-to-all, in a ring
    attention_backend: Literal["auto", "xla", "cudnn", "tokamax"] = "auto"  # Megatron's name; xla: plain JAX
    sequence_parallel: bool = False
    tp_comm_overlap: bool = False  # sp's transfers in pieces, which travel while others are multiplied
    virtual_pipeline_model_parallel_size: Count | None = None
    pipeline_schedule: Text = "1f1b"  # ours
    expert_model_parallel_size: Count = 1
    expert_tensor_parallel_size: Count | None = None
    num_moe_experts: Count | None = None
    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Count | None = None
    # With selective: RECOMPUTE_MODULES, or name scopes of your own model's block. null: [core_attn]. All but core_attn: as
    # full, but attention does not run again. linear_proj repeats its reduction over the tensor group.
    recompute_modules: list[Text] | None = None
    offload_activations: bool = False  # ours: activations that are not recomputed wait in pinned host memory
    precision: Precision = "bf16"
    seq_length: Count | None = None  # RLinf repeats runner.seq_length here
    model_path: UserPath | None = None  # folder with a Hugging Face config.json
    model_type: Text | None = None
    make_vocab_size_divisible_by: Width = 128
    is_lora: bool = (
        False  # train low-rank adapters (LoRA) and freeze the rest, unless optim.trainable says what is trained
    )
    lora_rank: Width | None = None  # null: that of lora_path, else 32, RLinf's default
    lora_path: UserPath | None = None  # folder with adapters in PEFT's format, to start from
    # Ours, from here to lora_dropout, under PEFT's names.
    lora_alpha: Positive | None = (
        None  # the adapters' product is multiplied by alpha / rank; null: that of lora_path, else rank
    )
    lora_target_modules: Texts | None = None  # q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; null: all
    lora_dropout: Number = 0.0  # only 0 is supported
    multi_latent_attention: bool = False
    activation: Text = "swiglu"
    normalization: Text = "rmsnorm"
    position_embedding_type: Text = "rope"
    add_bias_linear: bool = False
    add_qkv_bias: bool | None = None  # Megatron's name for attention_bias
    qk_layernorm: bool | None = None  # follows from model_type and is checked against it


class ParamGroup(Section):
    """Parameters with a learning rate or weight decay of their own. Ours."""

    match: Text  # a pattern of names such as layers/attention/*
    lr_mult: Number = 1.0  # times the learning rate
    weight_decay: Number | None = None  # null: that of the others


class Optim(Section):
    # adam and adamw: with decoupled weight decay (AdamW), as in Megatron. Ours: the name of any other of optax's or
    # optax.contrib's, with its arguments in optimizer_args.
    optimizer: Text = "adam"
    optimizer_args: dict[str, Any] = {}
    groups: list[ParamGroup] = []  # ours; a parameter belongs to the first that matches it
    ema_decay: Annotated[Beta, Field(gt=0)] | None = None  # ours; null: no average
    lr: Rate = 0.0  # peak; 0: not given
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.999
    adam_eps: Positive = 1e-8
    weight_decay: Number = 0.01
    clip_grad: Number | None = 1.0  # global norm; 0 or null: off
    trainable: Texts | None = None  # ours: patterns of the paths of the parameters to train, such as head/*; null: all
    use_distributed_optimizer: bool = True  # ZeRO: optimizer state is split over dp and cp
    zero_stage: Literal[0, 1, 2, 3] | None = None  # ours; null: 1, or 0 without use_distributed_optimizer
    # Gather a layer's parameters (ZeRO-3) while the previous layer computes, and reduce its gradients (ZeRO-2 and 3)
    # while the next one computes. Each of the two costs the memory of one layer.
    overlap_param_gather: bool = True
    overlap_grad_reduce: bool = True
    optimizer_cpu_offload: bool = False  # keep the optimizer's moments in pinned host memory
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"  # ours: dtype of gradients in the reduction over dp and cp
    # Only for fp16. A number is a static loss scale; null is a dynamic one, set by the four keys after it.
    loss_scale: Positive | None = None
    initial_loss_scale: Positive = 2.0**32
    min_loss_scale: Positive = 1.0
    loss_scale_window: Count = 1000  # steps without overflow after which the scale doubles
    hysteresis: Count = 2  # from this many overflows since the last doubling on, each one halves the scale


class LrSched(Section):
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_iters: NonNegative = 0
    lr_warmup_fraction: Share | None = None  # of lr_decay_iters
    lr_warmup_init: Number = 0.0
    lr_decay_iters: Count | None = None  # steps, including warm-up; null: runner.max_steps
    min_lr: Number = 0.0
    max_lr: Rate | None = None  # null: optim.lr


class Tokenizer(Section):
    tokenizer_model: UserPath | None = None  # null or "byte": bytes; or a path to a Hugging Face tokenizer


LossAggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
KlPenalty = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
# adv_type → the keys of `algorithm` that these advantages read, and those that jaxpar.Actor reads with any of them
ADVANTAGES: dict[str, tuple[str, ...]] = {
    "grpo": ("group_size",),
    "gae": ("normalize_advantages", "gamma", "gae_lambda"),
    "reinpp": ("group_size", "reinpp_kl_beta", "use_reinpp_baseline"),
    "raw": ("normalize_advantages",),
}
ROLLOUTS = ("adv_type", "n_minibatches", "shuffle_rollout", "recompute_logprobs")
# loss_type → the keys of `algorithm` that it reads
LOSS_TYPES: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("z_loss", "label_smoothing"),
    "sft": ("loss_agg_func",),
    "dpo": ("dpo_beta", "label_smoothing"),
    "distillation": ("teacher_top_k", "distillation_alpha"),
    "actor": (
        "loss_agg_func", "ratio_clip_eps", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "clip_log_ratio_min",
        "clip_log_ratio_max", "kl_beta", "kl_penalty_type", "calculate_entropy", "entropy_bonus", "sampling_params", *ROLLOUTS,
        *dict.fromkeys(key for keys in ADVANTAGES.values() for key in keys),
    ),
}  # fmt: skip


class SamplingParams(Section):
    temperature: Positive = 1.0  # by which loss_type actor divides logits


class Algorithm(Section):
    """What a step minimizes. The keys of loss_type actor and of advantages, and their defaults, are RLinf's."""

    loss_type: Text = "cross_entropy"  # one of LOSS_TYPES; RLinf has only actor of these
    z_loss: Number = 0.0  # ours: weight of the squared log-sum of logits
    label_smoothing: Beta = 0.0  # ours
    dpo_beta: Positive = 0.1
    teacher_top_k: Count = 16  # ours: tokens of the teacher for each position
    distillation_alpha: Share = 1.0  # ours: the teacher's share
    loss_agg_func: LossAggregation = "token-mean"
    ratio_clip_eps: Number = 0.2
    clip_ratio_low: Number | None = None  # null: ratio_clip_eps
    clip_ratio_high: Number | None = None  # null: ratio_clip_eps
    clip_ratio_c: Annotated[Real, Field(gt=1)] | None = None
    clip_log_ratio_min: Real | None = None
    clip_log_ratio_max: Real | None = None
    kl_beta: Number = 0.0
    kl_penalty_type: KlPenalty = "low_var_kl"
    calculate_entropy: bool = False
    entropy_bonus: Number = 0.0  # in the loss if calculate_entropy is True
    sampling_params: SamplingParams = SamplingParams()
    adv_type: Text = "grpo"  # grpo, gae, reinpp or raw
    group_size: Count = 1  # answers to one prompt
    n_minibatches: Count = 1  # optimizer steps for each batch of rollouts
    shuffle_rollout: bool = False  # which rollouts are in which minibatch
    recompute_logprobs: bool = True  # False: old_log_probs are those of the engine that sampled
    normalize_advantages: bool = True  # of adv_type gae and raw
    gamma: Share = 1.0  # gamma and gae_lambda: of gae with a critic
    gae_lambda: Share = 1.0
    reinpp_kl_beta: Number = 0.0
    use_reinpp_baseline: bool = False


class Megatron(Section):
    """RLinf's section for Megatron-LM. All its keys are ignored."""


class Actor(Section):
    micro_batch_size: Count = 0  # sequences in a microbatch of one dp rank; 0: not given
    global_batch_size: Count = 0  # sequences in an optimizer step, or documents with dynamic batches; 0: not given
    seed: NonNegative = 1234
    model: Model = Model()
    optim: Optim = Optim()
    lr_sched: LrSched = LrSched()
    tokenizer: Tokenizer = Tokenizer()
    megatron: Megatron = Megatron()


SECTIONS: dict[str, type[Section]] = {
    "cluster": Cluster,
    "runner": Runner,
    "data": Data,
    "algorithm": Algorithm,
    "actor": Actor,
}
