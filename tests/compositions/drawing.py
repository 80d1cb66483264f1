"""Cases drawn from their numbers: sizes of the mesh, two or more `FEATURES` that are rare by themselves, now and then a mistake."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxpar.config.errors import divisors
from jaxpar.config.keys import RECOMPUTE_MODULES
from jaxpar.config.lora import TARGETS
from jaxpar.pipeline.schedule import SCHEDULES

TEACHER_TOKENS = 4
OWN_MODELS = {"GPT": 4, "LinenGPT": 4, "NoStack": 0, "gemma": 3, "gpt2": 4, "moe": 4}  # → layers that stages share


@dataclass
class Case:
    """What is computed.

    Attributes:
      features: names in `FEATURES`, and the mistake if there is one.
      settings: key.path → value.
      model: one of `OWN_MODELS`; None: the built-in decoder.
      mask, documents: which tokens are trained, and what a row has, see `compositions.running.make_batch`.
      own_objective: a loss from Python that looks at whole rows.
      updates: gradients are read from the moments after `train_step`, instead of from `loss_and_grads`.
    """

    number: int
    features: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    mask: str = "uneven"
    documents: str = "packed"
    own_objective: bool = False
    updates: bool = False

    def values(self) -> dict[str, Any]:
        """The settings as the contents of a YAML file."""
        nested: dict[str, Any] = {}
        for key, value in self.settings.items():
            *path, name = key.split(".")
            section = nested
            for part in path:
                section = section.setdefault(part, {})
            section[name] = value
        return nested

    def __str__(self) -> str:
        model = {key.removeprefix("actor.model."): value for key, value in self.settings.items()}
        sizes = (
            f"{short}{model[key]}"
            for short, key in _SIZES.items()
            if str(model.get(key, 1)) not in ("None", "1", "False")
        )
        return f"{model['cluster.num_gpus_per_node']} devices: {' '.join(sizes)} [{', '.join(self.features)}]"


_SIZES = {
    "pp": "pipeline_model_parallel_size",
    "tensor": "tensor_model_parallel_size",
    "sp=": "sequence_parallel",
    "cp": "context_parallel_size",
    "chunks": "virtual_pipeline_model_parallel_size",
    "": "pipeline_schedule",
}


# --- drawing ----------------------------------------------------------------------------------------------------------


class Drawing:
    """A case being drawn. The sizes of the mesh are known before any feature is drawn."""

    def __init__(self, number: int):
        self.rng = rng = random.Random(number)
        features = rng.sample(list(FEATURES), 2)
        # 8 or 11 bits hide what 24 show, so they are drawn less often.
        features += [name for name in FEATURES if name not in ("bf16", "fp16", *features) and rng.random() < 0.08]
        features = _compatible(features)
        self.case = Case(number, features)
        needed = {axis for name in features for axis in NEEDS.get(name, ())}
        while True:
            self.dp, self.pp, self.tensor, self.cp = (rng.choice(sizes) for sizes in ((1, 2, 2, 3, 4), (1, 2, 2, 3, 4), (1, 2, 2, 4), (1, 1, 2, 2, 4)))  # fmt: skip
            self.devices = self.dp * self.pp * self.tensor * self.cp
            sizes = {"dp": self.dp, "pp": self.pp, "tensor": self.tensor, "cp": self.cp}
            if all(sizes[axis] > 1 for axis in needed) and 2 <= self.devices <= rng.choice((8, 8, 8, 8, 16)):
                break
        self.sp = self.tensor > 1 and ("tp_comm_overlap" in features or rng.random() < 0.5)
        most = (4 if "own model" in features else 12) // self.pp
        self.chunks = rng.choice([n for n in (1, 1, 2, 3) if n <= max(1, most)]) if self.pp > 1 else 1
        self.set_model(pipeline_model_parallel_size=self.pp, tensor_model_parallel_size=self.tensor,
                       context_parallel_size=self.cp, sequence_parallel=self.sp)  # fmt: skip
        self.set(**{"cluster.num_gpus_per_node": self.devices})
        self.precision = next((name for name in features if name in ("bf16", "fp16")), "fp32")
        self._batch()
        self._decoder()
        self._pipeline()
        self.set(**{"actor.optim.lr": 1e-3, "actor.optim.clip_grad": 0.0, "runner.max_steps": 10})
        self.set_model(precision=self.precision)
        for name in features:
            FEATURES[name](self)
        if (
            "actor" in features and self.precision != "fp32"
        ):  # rounding decides on which side of the clip's jump a ratio is
            self.set(
                **{"algorithm.clip_ratio_low": 0.999, "algorithm.clip_ratio_high": 1e3, "algorithm.clip_ratio_c": None}
            )
        if self.case.model:  # it has its own sizes
            for key in _OF_DECODERS & self.case.settings.keys():
                del self.case.settings[key]
        if rng.random() < 0.06:
            self._mistake()

    def set(self, **settings: Any) -> None:
        self.case.settings |= settings

    def set_model(self, **settings: Any) -> None:
        self.set(**{f"actor.model.{key}": value for key, value in settings.items()})

    def _batch(self) -> None:
        rng, micro, of_rank = self.rng, self.rng.choice((1, 1, 2)), self.rng.choice((1, 2, 3, 4, 4, 6))
        part = (2 * self.cp if self.cp > 1 else 1) * (self.tensor if self.sp else 1)
        part *= 4 if "tp_comm_overlap" in self.case.features else 1
        self.seq = part * rng.randint(-(-24 // part), max(1, 64 // part))
        self.set(**{"runner.seq_length": self.seq, "actor.micro_batch_size": micro,
                    "actor.global_batch_size": micro * of_rank * self.dp})  # fmt: skip
        self.case.mask = rng.choice(("uneven", "uneven", "dense", "weights"))

    def _decoder(self) -> None:
        rng = self.rng
        heads = rng.choice((8, 8, 4))
        fits = [kv for kv in divisors(heads) if kv % self.tensor == 0 or (self.tensor % kv == 0 and "few kv heads" in self.case.features)]  # fmt: skip
        self.heads, self.layers = heads, rng.randint(2, 4)
        self.set_model(
            model_type=rng.choice(("llama", "mistral", "qwen2", "qwen3")),
            hidden_size=rng.choice((32, 48, 64)),
            intermediate_size=self.tensor * rng.randint(8, 24),
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=rng.choice(fits),
            head_dim=rng.choice((4, 8, 16)),
            vocab_size=64,
            make_vocab_size_divisible_by=math.lcm(8, self.pp * self.tensor),
        )

    def _pipeline(self) -> None:
        if self.pp == 1:
            return
        names = [name for name in SCHEDULES if name != "interleaved_1f1b"]
        with_chunks = [name for name in SCHEDULES if name in ("gpipe", "zb1p", "interleaved_1f1b")]
        chunks = self.chunks if self.chunks > 1 else None
        self.set_model(
            pipeline_schedule=self.rng.choice(with_chunks if chunks else names),
            virtual_pipeline_model_parallel_size=chunks,
            num_hidden_layers=self.pp * self.chunks + self.rng.choice((0, 0, 1, 2)),
        )

    def _mistake(self) -> None:
        """A setting that most probably does not fit."""
        key, value = self.rng.choice([
            ("runner.seq_length", self.seq + 1), ("actor.global_batch_size", 7), ("actor.model.num_key_value_heads", 3),
            ("actor.model.num_hidden_layers", 1), ("actor.model.virtual_pipeline_model_parallel_size", 2),
            ("actor.model.make_vocab_size_divisible_by", 1), ("actor.model.intermediate_size", 37),
            ("actor.model.pipeline_schedule", "interleaved_1f1b"), ("actor.model.cp_comm_type", "a2a"),
            ("actor.optim.use_distributed_optimizer", False), ("actor.model.tp_comm_overlap", True),
        ])  # fmt: skip
        self.case.features.append(f"{key.rpartition('.')[2]}={value}")
        self.set(**{key: value})


def _compatible(features: list[str]) -> list[str]:
    """Without those that exclude one before them."""
    kept: list[str] = []
    for name in features:
        if not any(name in group and other in group for group in _EXCLUSIVE for other in kept):
            kept.append(name)
    return kept


def draw(number: int) -> Case:
    """The case with this number, the same everywhere."""
    return Drawing(number).case


def _recompute_full(d: Drawing) -> None:
    method = d.rng.choice(("uniform", "block"))
    d.set_model(recompute_granularity="full", recompute_method=method, recompute_num_layers=d.rng.randint(1, 3))


def _recompute_modules(d: Drawing) -> None:
    names = [name for name in RECOMPUTE_MODULES if d.rng.random() < 0.5]
    d.set_model(recompute_granularity="selective", recompute_modules=names or None)


def _context(d: Drawing) -> None:
    kind = d.rng.choice(("all_gather", "a2a", "a2a+p2p"))
    d.set_model(cp_comm_type=kind)
    ranks = d.cp
    if kind == "a2a+p2p":
        ranks = d.rng.choice(divisors(d.cp))
        d.set_model(hierarchical_context_parallel_sizes=[ranks, d.cp // ranks])
    d.heads = 8 if d.tensor * ranks <= 8 else 16
    d.set_model(num_attention_heads=d.heads, num_key_value_heads=d.rng.choice([k for k in (4, 8) if k % d.tensor == 0]))


def _window(d: Drawing) -> None:
    # A window of 1 has gradients of exactly zero on one device, and of rounding errors on several.
    d.set_model(sliding_window=d.rng.randint(2, d.seq + 3), use_sliding_window=True)


def _few_kv_heads(d: Drawing) -> None:
    fits = [kv for kv in (1, 2) if kv % d.tensor == 0 or d.tensor % kv == 0]
    d.set_model(num_key_value_heads=d.rng.choice(fits))


def _vocabulary(d: Drawing) -> None:
    size, parts = d.rng.choice((61, 97, 130)), d.pp * d.tensor
    d.set_model(vocab_size=size, make_vocab_size_divisible_by=parts * d.rng.choice((1, 3, 32)))


def _rope(d: Drawing) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    d.set_model(rope_scaling={**scaling, "original_max_position_embeddings": 16}, rope_theta=500.0)


def _zero(d: Drawing) -> None:
    d.set(**{"actor.optim.zero_stage": d.rng.choice((0, 2, 3, 3))})


def _overlap(d: Drawing) -> None:
    gather, reduce = d.rng.choice(((False, False), (True, False), (False, True)))
    d.set(**{"actor.optim.overlap_param_gather": gather, "actor.optim.overlap_grad_reduce": reduce})
    d.set(**{"actor.optim.zero_stage": d.rng.choice((2, 3, 3))})


def _lora(d: Drawing) -> None:
    d.set_model(is_lora=True, lora_rank=d.rng.choice((1, 2, 4)), lora_alpha=d.rng.choice((0.5, 1.0)))
    d.set_model(lora_target_modules=d.rng.choice((None, d.rng.sample(list(TARGETS), 2))))


def _trainable(d: Drawing) -> None:
    patterns = ["head/*", "embed/*", "layers/*", "*/scale", "layers/attention/*", "layers/mlp/*", "*/query"]
    d.set(**{"actor.optim.trainable": d.rng.sample(patterns, d.rng.choice((1, 2)))})


def _dynamic(d: Drawing) -> None:
    d.set(**{"runner.enable_dynamic_batch_size": True, "runner.max_tokens_per_mbs": d.seq // d.cp})


def _across_documents(d: Drawing) -> None:
    d.case.documents = "one"
    d.set(**{"data.reset_attention_mask": False})


def _objective(loss_type: str, **settings: list[Any]) -> Callable[[Drawing], None]:
    """Each setting with one of its values."""

    def feature(d: Drawing) -> None:
        d.set(**{"algorithm.loss_type": loss_type})
        d.set(**{f"algorithm.{key}": d.rng.choice(values) for key, values in settings.items()})

    return feature


def _own_model(d: Drawing) -> None:
    d.case.model = d.rng.choice([name for name, layers in OWN_MODELS.items() if d.pp == 1 or d.pp * d.chunks <= layers])


def _with(**attributes: Any) -> Callable[[Drawing], None]:
    def feature(d: Drawing) -> None:
        for name, value in attributes.items():
            setattr(d.case, name, value)

    return feature


def _updates(d: Drawing) -> None:
    d.case.updates = True
    d.set(**{"actor.optim.optimizer_cpu_offload": d.rng.random() < 0.7})


AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
FEATURES: dict[str, Callable[[Drawing], None]] = {
    "recompute full": _recompute_full,
    "recompute modules": _recompute_modules,
    "offload activations": lambda d: d.set_model(offload_activations=True),
    "zero": _zero,
    "overlap": _overlap,
    "tp_comm_overlap": lambda d: d.set_model(tp_comm_overlap=True),
    "context": _context,
    "window": _window,
    "few kv heads": _few_kv_heads,
    "tied": lambda d: d.set_model(tie_word_embeddings=True),
    "vocabulary": _vocabulary,
    "rope": _rope,
    "lora": _lora,
    "trainable": _trainable,
    "dynamic": _dynamic,
    "across documents": _across_documents,
    "padding": _with(documents="padded"),
    "empty ranks": _with(mask="empty"),
    "few targets": _with(mask="few"),
    "z-loss": _objective("cross_entropy", z_loss=[0.0, 0.01], label_smoothing=[0.0, 0.1]),
    "sft": _objective("sft", loss_agg_func=AGGREGATIONS),
    "dpo": _objective("dpo", dpo_beta=[0.1, 0.5], label_smoothing=[0.0, 0.1]),
    "distillation": _objective(
        "distillation", teacher_top_k=[TEACHER_TOKENS], distillation_alpha=[1.0, 0.7]
    ),
    "actor": _objective(
        "actor", loss_agg_func=AGGREGATIONS, kl_beta=[0.0, 0.1], kl_penalty_type=["kl", "abs", "mse", "low_var_kl"],
        calculate_entropy=[True], entropy_bonus=[0.0, 0.05], clip_ratio_high=[None, 0.3], clip_ratio_c=[None, 3.0],
        sampling_params=[{"temperature": 1.0}, {"temperature": 1.5}],
    ),
    "own objective": _with(own_objective=True),
    "own model": _own_model,
    "bf16": lambda d: d.set(**{"actor.optim.grad_reduce_dtype": d.rng.choice(("fp32", "bf16"))}),
    "fp16": lambda d: d.set(**{"actor.optim.loss_scale": 256.0}),
    "updates": _updates,
}  # fmt: skip
NEEDS = {
    "context": ("cp",), "tp_comm_overlap": ("tensor",), "overlap": ("dp",), "zero": ("dp",), "few kv heads": ("tensor",),
}  # fmt: skip
_OBJECTIVES = {"z-loss", "sft", "dpo", "distillation", "actor", "own objective"}
_EXCLUSIVE = [
    _OBJECTIVES, {"bf16", "fp16"}, {"recompute full", "recompute modules"}, {"empty ranks", "few targets"}, {"padding", "across documents"},
    {"dynamic", "across documents"}, {"dpo", "across documents"}, {"dpo", "padding"}, {"vocabulary", "own model"}, {"lora", "trainable"},
    *({"own model", name} for name in (
        "window", "few kv heads", "tied", "vocabulary", "rope", "lora", "trainable", "tp_comm_overlap", "recompute modules",
    )),
]  # fmt: skip
# Of the built-in decoder
_OF_DECODERS = {
    f"actor.model.{key}" for key in (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "vocab_size", "make_vocab_size_divisible_by",
    )
}  # fmt: skip
