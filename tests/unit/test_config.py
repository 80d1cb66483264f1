"""Config: keys and types, interpolation, the five axis sizes, the arithmetic of every rule, the architecture."""

import json
from pathlib import Path

import pytest

from jaxpar.config import Config, ConfigError, MeshSizes, RopeScaling, config_from_dict, load_config
from jaxpar.config.lora import Lora

ROOT = Path(__file__).resolve().parents[2]

MODEL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=256,
)

UNIFORM = dict(recompute_method="uniform", recompute_num_layers=1)


def train_config(**sections: dict) -> Config:
    """A config that trains on one device. `model=`, `optim=` and so on add keys to a section."""
    values = {
        "runner": {"seq_length": 64, "max_steps": 10, **sections.get("runner", {})},
        "actor": {
            "micro_batch_size": 2,
            "global_batch_size": 16,
            **sections.get("actor", {}),
            "model": {**MODEL, **sections.get("model", {})},
            "optim": {"lr": 1e-3, **sections.get("optim", {})},
            "lr_sched": sections.get("lr_sched", {}),
        },
    }
    return config_from_dict(values)


def train_problems(num_devices: int = 1, **sections: dict) -> list[str]:
    config = train_config(**sections)
    try:
        config.check_train(config.mesh_sizes(num_devices), config.architecture())
    except ConfigError as error:
        return error.problems
    return []


def load_problems(values: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values)
    return caught.value.problems


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# --- The mesh

TABLE = [
    (dict(tensor_model_parallel_size=2), 8, (4, 1, 2, 1, 1)),
    (
        dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2),
        128,
        (16, 2, 2, 1, 2),
    ),
    (dict(pipeline_model_parallel_size=2), 8, (4, 2, 1, 1, 1)),
    (dict(tensor_model_parallel_size=2, sequence_parallel=True), 8, (4, 1, 1, 2, 1)),
    (dict(tensor_model_parallel_size=1, sequence_parallel=False), 8, (8, 1, 1, 1, 1)),
    (dict(context_parallel_size=2), 8, (4, 1, 1, 1, 2)),
]


@pytest.mark.parametrize("model,num_devices,expected", TABLE)
def test_mesh_sizes(model, num_devices, expected):
    config = config_from_dict(
        {"cluster": {"num_nodes": num_devices // 8, "num_gpus_per_node": 8}, "actor": {"model": model}}
    )
    assert config.num_configured_devices() == num_devices
    sizes = config.mesh_sizes(num_devices)
    assert sizes == MeshSizes(*expected)
    assert list(sizes.as_dict()) == ["dp", "pp", "tp", "sp", "cp"]
    assert sizes.num_devices == num_devices
    assert sizes.tensor == model.get("tensor_model_parallel_size", 1)


def test_devices_come_from_the_runtime_unless_configured():
    assert config_from_dict({"cluster": {"num_nodes": 2}}).num_configured_devices() is None


def mesh_problems(num_devices: int, **model) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"actor": {"model": model}}).mesh_sizes(num_devices)
    return str(caught.value)


def test_sequence_parallel_needs_a_tensor_group():
    assert mesh_problems(8, sequence_parallel=True) == (
        "actor.model.sequence_parallel: True needs actor.model.tensor_model_parallel_size > 1, but it is 1: sequence "
        "parallelism splits over the tensor group; raise that size, or set sequence_parallel: False"
    )


def test_world_size():
    assert mesh_problems(16, tensor_model_parallel_size=3, pipeline_model_parallel_size=2) == (
        "actor.model.tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size: 3 * 2 * 1 = 6 "
        "does not divide 16 devices (16 / 6 = 2.67): change the sizes so that their product is one of 1, 2, 4, 8, 16, "
        "or use a multiple of 6 devices"
    )


# --- The arithmetic of training


def test_a_good_config_has_no_problems():
    assert train_problems() == []
    assert train_config().num_microbatches(MeshSizes(2, 1, 1, 1, 1)) == 4


def test_dynamic_batches_need_neither_sequence_length_nor_micro_batch():
    config = train_config(
        runner=dict(enable_dynamic_batch_size=True, max_tokens_per_mbs=32, seq_length=None),
        actor=dict(micro_batch_size=None, global_batch_size=13),  # documents: any number is allowed
        model=dict(context_parallel_size=2),
    )
    sizes = config.mesh_sizes(8)
    config.check_train(sizes, config.architecture())
    assert (config.row_length, config.rows_per_microbatch, config.num_microbatches(sizes)) == (64, 1, 4)
    assert train_config().row_length == 64 and train_config().rows_per_microbatch == 2


RULES = {
    "heads": (
        3,
        dict(
            model=dict(
                tensor_model_parallel_size=3,
                num_attention_heads=32,
                num_key_value_heads=32,
                head_dim=2,
                make_vocab_size_divisible_by=96,
            )
        ),
        "actor.model.tensor_model_parallel_size: 3 does not divide num_attention_heads 32 (32 / 3 = 10.67): "
        "choose one of 1, 2, 4, 8, 16, 32",
    ),
    "kv heads": (
        4,
        dict(model=dict(tensor_model_parallel_size=4, num_attention_heads=12, num_key_value_heads=6, head_dim=8)),
        "actor.model.tensor_model_parallel_size: 4 neither divides num_key_value_heads 6 (6 / 4 = 1.5) nor is a "
        "multiple of it (4 / 6 = 0.67): choose one of 1, 2, 3, 6, 12",
    ),
    "mlp": (
        8,
        dict(model=dict(tensor_model_parallel_size=8, intermediate_size=100)),
        "actor.model.tensor_model_parallel_size: 8 does not divide intermediate_size 100 (100 / 8 = 12.5): choose one "
        "of 1, 2, 4",
    ),
    "layers": (
        4,
        dict(model=dict(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)),
        "actor.model.pipeline_model_parallel_size: the model has 4 layers, too few for pipeline_model_parallel_size "
        "* virtual_pipeline_model_parallel_size = 4 * 2 = 8 parts of the pipeline: lower one of the sizes so that each part "
        "has a layer",
    ),
    "vocabulary": (
        8,
        dict(model=dict(tensor_model_parallel_size=8, make_vocab_size_divisible_by=6, vocab_size=250)),
        "actor.model.make_vocab_size_divisible_by: 6 pads the vocabulary to 252, which is not a multiple of "
        "pipeline_model_parallel_size * tensor_model_parallel_size = 1 * 8 = 8 (252 / 8 = 31.5): set it to 24",
    ),
    "batch": (
        8,
        dict(actor=dict(global_batch_size=20)),
        "actor.global_batch_size: 20 is not a multiple of micro_batch_size * dp = 2 * 8 = 16 (20 / 16 = 1.25): "
        "choose 16 or 32",
    ),
    "small batch": (
        16,
        {},
        "actor.global_batch_size: 16 is not a multiple of micro_batch_size * dp = 2 * 16 = 32 "
        "(16 / 32 = 0.5): choose 32",
    ),
    "sequence, cp": (
        2,
        dict(model=dict(context_parallel_size=2), runner=dict(seq_length=66)),
        "runner.seq_length: 66 is not a multiple of 2 * context_parallel_size = 2 * 2 = 4 (66 / 4 = 16.5): "
        "choose 64 or 68",
    ),
    "sequence, cp and sp": (
        4,
        dict(
            model=dict(context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True),
            runner=dict(seq_length=100),
        ),
        "runner.seq_length: 100 is not a multiple of 2 * context_parallel_size * tensor_model_parallel_size = 2 * 2 * 2 "
        "= 8 (100 / 8 = 12.5): choose 96 or 104",
    ),
    "sequence, sp": (
        2,
        dict(model=dict(tensor_model_parallel_size=2, sequence_parallel=True), runner=dict(seq_length=63)),
        "runner.seq_length: 63 is not a multiple of tensor_model_parallel_size = 2 (63 / 2 = 31.5): choose 62 or 64",
    ),
    "sequence, pieces": (
        2,
        dict(
            model=dict(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True),
            runner=dict(seq_length=60),
        ),
        "runner.seq_length: 60 is not a multiple of tensor_model_parallel_size * the pieces of tp_comm_overlap = 2 * 4 = 8 "
        "(60 / 8 = 7.5): choose 56 or 64",
    ),
    "overlap without sequence parallelism": (
        2,
        dict(model=dict(tensor_model_parallel_size=2, tp_comm_overlap=True)),
        "actor.model.tp_comm_overlap: True needs actor.model.sequence_parallel: True, but that is False: only the gathers "
        "and reduce-scatters of sequence parallelism are cut into pieces; set sequence_parallel: True and "
        "tensor_model_parallel_size > 1, or tp_comm_overlap: False",
    ),
    "all-to-all, heads": (
        6,
        dict(
            model=dict(context_parallel_size=3, tensor_model_parallel_size=2, cp_comm_type="a2a"),
            runner=dict(seq_length=60),
        ),
        "actor.model.cp_comm_type: the all-to-all over 3 cp ranks cannot divide the 4 heads on each device of the tensor "
        "group (4 / 3 = 1.33): set p2p or all_gather, or a2a+p2p with smaller all-to-alls in "
        "hierarchical_context_parallel_sizes",
    ),
    "all-to-all and ring, no sizes": (
        8,
        dict(model=dict(context_parallel_size=8, cp_comm_type="a2a+p2p")),
        "actor.model.hierarchical_context_parallel_sizes: not given, but cp_comm_type a2a+p2p needs two sizes: set the cp "
        "ranks in an all-to-all and in a ring, whose product must be context_parallel_size 8",
    ),
    "all-to-all and ring, product": (
        8,
        dict(model=dict(context_parallel_size=8, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=[2, 2])),
        "actor.model.hierarchical_context_parallel_sizes: 2 * 2 = 4 is not context_parallel_size 8: choose one of [1, 8], "
        "[2, 4], [4, 2], [8, 1]",
    ),
    "sizes of no all-to-all": (
        8,
        dict(model=dict(context_parallel_size=8, hierarchical_context_parallel_sizes=[2, 4])),
        "actor.model.hierarchical_context_parallel_sizes: [2, 4] only applies to cp_comm_type a2a+p2p, but cp_comm_type is p2p: "
        "remove it",
    ),
    "two sequence lengths": (
        1,
        dict(model=dict(seq_length=32)),
        "actor.model.seq_length: 32 differs from runner.seq_length 64: remove it, or set it to ${runner.seq_length}",
    ),
    "virtual stages": (
        1,
        dict(model=dict(virtual_pipeline_model_parallel_size=2)),
        "actor.model.virtual_pipeline_model_parallel_size: 2 needs actor.model.pipeline_model_parallel_size > 1, but "
        "that is 1: there is no pipeline to interleave; set virtual_pipeline_model_parallel_size to null",
    ),
    "interleaving without chunks": (
        2,
        dict(model=dict(pipeline_model_parallel_size=2, pipeline_schedule="interleaved_1f1b")),
        "actor.model.pipeline_schedule: interleaved_1f1b needs actor.model.virtual_pipeline_model_parallel_size > 1: set that "
        "to the number of layer chunks on each stage, such as 2, or set pipeline_schedule to 1f1b",
    ),
    "ZeRO without a distributed optimizer": (
        1,
        dict(optim=dict(zero_stage=2, use_distributed_optimizer=False)),
        "actor.optim.zero_stage: 2, but actor.optim.use_distributed_optimizer is False: remove one of them",
    ),
    "recompute method": (
        1,
        dict(model=dict(recompute_granularity="full", recompute_num_layers=1)),
        "actor.model.recompute_method: not given, but recompute_granularity full needs it: set uniform (every layer, "
        "in groups of recompute_num_layers) or block (the first recompute_num_layers of each chunk of layers)",
    ),
    "recompute number": (
        1,
        dict(model=dict(recompute_granularity="full", recompute_method="block")),
        "actor.model.recompute_num_layers: not given, but recompute_granularity full needs it: set a number of layers, "
        "such as 1",
    ),
    "recompute selective": (
        1,
        dict(model=dict(recompute_granularity="selective", recompute_method="block")),
        "actor.model.recompute_method: block only applies to recompute_granularity full, but recompute_granularity is selective: "
        "remove it, or set recompute_granularity: full",
    ),
    "recompute modules without selective": (
        1,
        dict(model=dict(recompute_granularity="full", recompute_modules=["mlp"], **UNIFORM)),
        "actor.model.recompute_modules: ['mlp'] only applies to recompute_granularity selective, but recompute_granularity "
        "is full: remove it, or set recompute_granularity: selective",
    ),
    "recompute modules without recompute": (
        1,
        dict(model=dict(recompute_modules=["mlp"])),
        "actor.model.recompute_modules: ['mlp'] only applies to recompute_granularity selective, but recompute_granularity "
        "is null: remove it, or set recompute_granularity: selective",
    ),
    "no recompute modules": (
        1,
        dict(model=dict(recompute_granularity="selective", recompute_modules=[])),
        "actor.model.recompute_modules: [] names nothing: name some modules, or set recompute_granularity: null",
    ),
    "misspelled recompute module": (
        1,
        dict(model=dict(recompute_granularity="selective", recompute_modules=["mlp", "core_attention"])),
        "actor.model.recompute_modules: core_attention is unknown (did you mean core_attn?): choose one of core_attn, "
        "layernorm, linear_qkv, linear_proj, mlp",
    ),
    "recompute module of experts": (
        1,
        dict(model=dict(recompute_granularity="selective", recompute_modules=["shared_experts"])),
        "actor.model.recompute_modules: shared_experts is a part of experts, but mixture of experts is not supported: "
        "choose one of core_attn, layernorm, linear_qkv, linear_proj, mlp",
    ),
    "recompute module of latent attention": (
        1,
        dict(model=dict(recompute_granularity="selective", recompute_modules=["mla_up_proj"])),
        "actor.model.recompute_modules: mla_up_proj is a part of multi-latent attention, which is not supported: choose one "
        "of core_attn, layernorm, linear_qkv, linear_proj, mlp",
    ),
    "loss scale": (
        1,
        dict(optim=dict(initial_loss_scale=0.5)),
        "actor.optim.initial_loss_scale: 0.5 is below min_loss_scale 1: raise it",
    ),
    "experts": (
        1,
        dict(model=dict(expert_model_parallel_size=4)),
        "actor.model.expert_model_parallel_size: 4, but mixture of experts is not supported: set it to 1",
    ),
    "dynamic batch without a budget": (
        1,
        dict(runner=dict(enable_dynamic_batch_size=True)),
        "runner.max_tokens_per_mbs: not given, but runner.enable_dynamic_batch_size needs it: set the number of tokens in a "
        "microbatch on each cp rank, so that max_tokens_per_mbs * context_parallel_size holds the longest document",
    ),
    "budget": (
        4,
        dict(
            runner=dict(enable_dynamic_batch_size=True, max_tokens_per_mbs=30),
            model=dict(context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True),
        ),
        "runner.max_tokens_per_mbs: 30 is not a multiple of 2 * tensor_model_parallel_size = 2 * 2 = 4 (30 / 4 = 7.5): "
        "choose 28 or 32",
    ),
    "too few documents": (
        4,
        dict(
            runner=dict(enable_dynamic_batch_size=True, max_tokens_per_mbs=32),
            actor=dict(global_batch_size=3),
        ),
        "actor.global_batch_size: 3 documents are fewer than dp = 4 ranks, so some ranks would have none: choose "
        "at least 4",
    ),
    "no end": (
        1,
        dict(runner=dict(max_steps=-1, max_epochs=-1)),
        "runner.max_steps: -1 and runner.max_epochs: -1 both mean no limit: set one of them above 0",
    ),
    "decay": (
        1,
        dict(runner=dict(max_steps=-1), lr_sched=dict(lr_decay_style="cosine")),
        "actor.lr_sched.lr_decay_iters: not given, and runner.max_steps is -1, but actor.lr_sched.lr_decay_style "
        "cosine needs it: set the number of steps of the decay",
    ),
    "warm-up": (
        1,
        dict(lr_sched=dict(lr_decay_style="linear", lr_warmup_iters=10)),
        "actor.lr_sched.lr_warmup_iters: 10 is not below lr_decay_iters 10, so no steps are left for the decay: "
        "lower it",
    ),
    "two warm-ups": (
        1,
        dict(lr_sched=dict(lr_warmup_fraction=0.1, lr_warmup_iters=5)),
        "actor.lr_sched.lr_warmup_fraction: 0.1 and lr_warmup_iters 5 both set the warm-up: remove one of them",
    ),
    "two peaks": (
        1,
        dict(lr_sched=dict(max_lr=0.5)),
        "actor.lr_sched.max_lr: 0.5 differs from actor.optim.lr 0.001, but both set the peak: remove one of them",
    ),
    "qk norm": (
        1,
        dict(model=dict(qk_layernorm=True)),
        "actor.model.qk_layernorm: True, but the config's llama model has False: remove the key",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    num_devices, sections, expected = RULES[rule]
    assert train_problems(num_devices, **sections) == [expected]


@pytest.mark.parametrize(
    ("num_devices", "model"),
    [
        (3, dict(pipeline_model_parallel_size=3, make_vocab_size_divisible_by=3, vocab_size=255)),  # 4 layers: 2, 1, 1
        (2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
        (2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=1)),
        (
            2,
            dict(
                pipeline_model_parallel_size=2,
                recompute_granularity="full",
                recompute_method="uniform",
                recompute_num_layers=3,  # more than the 2 on a stage
            ),
        ),
        (1, dict(pipeline_schedule="interleaved_1f1b")),
        (1, dict(recompute_granularity="selective")),
        (1, dict(recompute_granularity="selective", recompute_modules=["core_attn", "linear_proj", "layernorm"])),
    ],
)
def test_what_needs_no_divisor(num_devices, model):
    assert train_problems(num_devices, model=model) == []
    assert train_config(model=model).notes == []


def test_a_users_own_model_has_no_tp_comm_overlap():
    config = train_config(model=dict(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True))
    with pytest.raises(
        ConfigError, match="actor.model.tp_comm_overlap: True has no effect on your own model: set it to"
    ):
        config.check_train(config.mesh_sizes(2), None)


def test_a_users_own_model_has_its_own_recompute_modules():
    config = train_config(model=dict(recompute_granularity="selective", recompute_modules=["feed_forward"]))
    config.check_train(config.mesh_sizes(1), None)


@pytest.mark.parametrize(
    "settings,expected",
    [
        ({"lora_dropout": 0.1}, "lora_dropout: 0.1, but dropout in adapters is not supported: set it to 0"),
        (
            {"lora_target_modules": ["q_prj"]},
            "lora_target_modules: q_prj is unknown (did you mean q_proj?): choose one of q_proj,",
        ),
        ({"lora_target_modules": []}, "lora_target_modules: [] names nothing: choose one of q_proj,"),
        ({"lora_path": "nowhere"}, "lora_path: nowhere/adapter_config.json: no such file: give a folder"),
    ],
)
def test_wrong_settings_of_lora(settings, expected):
    config = train_config(model=dict(is_lora=True, **settings))
    with pytest.raises(ConfigError) as caught:
        config.prepare_train(1)
    assert [p for p in caught.value.problems if p.startswith(f"actor.model.{expected}")], caught.value.problems


def test_settings_of_lora():
    lora = train_config(model=dict(is_lora=True, lora_alpha=64)).lora()
    assert lora == Lora(32, 64.0) and lora.scale == 2 and len(lora.targets) == 7
    chosen = train_config(model=dict(is_lora=True, lora_target_modules=["v_proj", "q_proj"])).lora()
    assert chosen == Lora(32, 32, ("q_proj", "v_proj"))
    off = train_config(model=dict(lora_rank=8))
    assert off.lora() is None and "actor.model: lora_rank have no effect without is_lora" in off.notes
    own = train_config(model=dict(is_lora=True))
    with pytest.raises(ConfigError, match="is_lora: True has no effect on your own model: .* trainable=nnx.LoRAParam"):
        own.check_train(own.mesh_sizes(1), None)


def test_zero_stage():
    assert train_config().zero_stage == 1
    assert train_config(optim=dict(use_distributed_optimizer=False)).zero_stage == 0
    assert train_config(optim=dict(zero_stage=3)).zero_stage == 3
    assert train_config(optim=dict(zero_stage=0)).zero_stage == 0
    assert train_config().actor.optim.grad_reduce_dtype == "fp32"


def test_what_training_needs_to_be_given():
    config = config_from_dict({"runner": {"max_steps": 1}})
    with pytest.raises(ConfigError) as caught:
        config.check_train(config.mesh_sizes(1), None)
    keys = [problem.split(": not given")[0] for problem in caught.value.problems]
    assert keys == ["actor.micro_batch_size", "actor.global_batch_size", "runner.seq_length", "actor.optim.lr"]


def test_kv_heads_are_repeated_with_a_note():
    model = dict(tensor_model_parallel_size=8, num_key_value_heads=2)
    assert train_problems(8, model=model) == []
    assert any(
        "kv heads are repeated: each of the 2 is held by 4 of the 8" in note for note in train_config(model=model).notes
    )


def test_padded_vocabulary_is_said():
    config = train_config(model=dict(vocab_size=300))
    assert config.architecture().padded_vocab_size == 384
    assert (
        "the vocabulary of 300 is padded to 384, a multiple of actor.model.make_vocab_size_divisible_by: 128"
        in config.notes
    )


def test_prepare_train_gives_all_problems_at_once():
    config = train_config(
        model=dict(tensor_model_parallel_size=3, sequence_parallel=True, virtual_pipeline_model_parallel_size=2)
    )
    with pytest.raises(ConfigError) as caught:
        config.prepare_train(8)
    text = str(caught.value)
    assert len(caught.value.problems) == len(text.splitlines()) == 6
    for part in (
        "does not divide 8 devices",
        "num_attention_heads 8",
        "num_key_value_heads 4",
        "virtual_pipeline",
        "runner.seq_length: 64",
        "set it to 384",
    ):
        assert part in text
    sizes, architecture = train_config().prepare_train(8)
    assert sizes.dp == 8 and architecture.num_hidden_layers == 4


# --- Names and types


@pytest.mark.parametrize(
    "values,expected",
    [
        ({"actor": {"micro_batch_size": "four"}}, "actor.micro_batch_size: expected an integer, got 'four'"),
        ({"actor": {"micro_batch_size": True}}, "actor.micro_batch_size: expected an integer, got True"),
        ({"actor": {"micro_batch_size": 2.5}}, "actor.micro_batch_size: expected an integer, got 2.5"),
        ({"actor": {"micro_batch_size": 0}}, "actor.micro_batch_size: must be above 0, got 0"),
        ({"runner": {"max_steps": -2}}, "runner.max_steps: must be at least -1, got -2"),
        ({"actor": {"optim": {"lr": "fast"}}}, "actor.optim.lr: expected a number, got 'fast'"),
        ({"actor": {"optim": {"adam_beta1": 1.0}}}, "actor.optim.adam_beta1: must be below 1, got 1.0"),
        (
            {"actor": {"model": {"sequence_parallel": "maybe"}}},
            "actor.model.sequence_parallel: expected True or False, got 'maybe'",
        ),
        (
            {"actor": {"model": {"precision": "int8"}}},
            "actor.model.precision: expected one of 'bf16', 'fp16', 'fp32', got 'int8'",
        ),
        (
            {"actor": {"optim": {"grad_reduce_dtype": "fp16"}}},
            "actor.optim.grad_reduce_dtype: expected one of 'fp32', 'bf16', got 'fp16'",
        ),
        (
            {"actor": {"optim": {"zero_stage": 4}}},
            "actor.optim.zero_stage: expected one of 0, 1, 2, 3, got 4",
        ),
        ({"actor": {"model": 3}}, "actor.model: expected a section (keys below it), got 3"),
        ({"data": {"train_data_paths": {"a": 1}}}, "data.train_data_paths: expected a list, got {'a': 1}"),
        (
            {"actor": {"model": {"tensor_parallel_size": 2}}},
            "actor.model.tensor_parallel_size: unknown key: did you mean actor.model.tensor_model_parallel_size?",
        ),
        (
            {"runner": {"global_batch_size": 2}},
            "runner.global_batch_size: unknown key: did you mean actor.global_batch_size?",
        ),
        ({"acter": {}}, "acter: unknown key: did you mean actor?"),
        ({"actor": {"xyzzy": 1}}, "actor.xyzzy: unknown key: remove it"),
        ({"actor": {"seed": "???"}}, "actor.seed: is ???, which marks a value that must be given: set it"),
        (
            {"actor": {"seed": "${data.sead}"}},
            "actor.seed: ${data.sead} cannot be resolved: Interpolation key 'data.sead' not found: correct it, or give a value",
        ),
    ],
)
def test_bad_value(values, expected):
    assert load_problems(values) == [expected]


def test_all_problems_of_a_file_at_once():
    problems = load_problems(
        {
            "runner": {"seq_length": 63, "max_stepz": 5, "save_interval": "often"},
            "actor": {
                "micro_batch_size": "four",
                "global_batch_size": 16,
                "seed": "${nothing.here}",
                "optim": {"lr": 1e-3},
                "model": {**MODEL, "tensor_model_parallel_size": 16, "sequence_parallel": True},
            },
        }
    )
    assert [problem.split(":")[0] for problem in problems] == [
        "actor.seed",
        "runner.save_interval",
        "runner.max_stepz",
        "actor.micro_batch_size",
        "runner.seq_length",
        "actor.model.tensor_model_parallel_size",
    ]  # no arithmetic with the invalid micro batch size


def test_null_is_the_default():
    config = config_from_dict({"runner": {"max_epochs": None}, "actor": None, "data": {"train_data_paths": None}})
    assert config == config_from_dict({})
    assert config_from_dict({"actor": {"optim": {"clip_grad": None}}}).actor.optim.clip_grad is None


def test_conversions():
    config = config_from_dict(
        {
            "actor": {"optim": {"lr": "2e-05"}, "model": {"precision": "bf16-mixed"}},
            "data": {"train_data_paths": "a.txt"},
            "runner": {"experiment_name": 7},
        }
    )
    assert config.actor.optim.lr == 2e-5 and config.actor.model.precision == "bf16"
    assert config.data.train_data_paths == ["a.txt"]
    assert config.output_path == Path("results/7")


# --- Files

RL_FILE = """
defaults:
  - override hydra/job_logging: stdout
hydra:
  run: {dir: .}
cluster:
  num_nodes: 4
  component_placement: {"actor,rollout": all}
runner:
  task_type: reasoning
  logger: {log_path: "${runner.output_dir}/logs", logger_backends: [tensorboard]}
  max_epochs: 3
  seq_length: 4096
  enable_dynamic_batch_size: True
  max_tokens_per_mbs: ${multiply:2,${runner.seq_length}}
  output_dir: out-${oc.env:JAXPAR_NO_SUCH_VARIABLE,here}
  experiment_name: rl
algorithm:
  loss_agg_func: token-mean
  recompute_logprobs: True
  sampling_params: {max_new_tokens: "${subtract:${runner.seq_length}, ${data.max_prompt_length}}"}
rollout:
  model: {model_path: /models/some, precision: "${torch.dtype:bfloat16}"}
  return_logprobs: ${not:${algorithm.recompute_logprobs}}
  broken: ${is.nowhere}
data:
  type: math
  max_prompt_length: 512
  rollout_batch_size: 64
  num_workers: ${int_div:9,2}
  shuffle: ${not:${rollout.return_logprobs}}
  train_data_paths: [a.jsonl]
  val_data_paths: ${data.train_data_paths}
actor:
  group_name: ActorGroup
  training_backend: megatron
  offload_weight: True
  model:
    precision: ${rollout.model.precision}
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 2
    sequence_parallel: True
    recompute_granularity: null
    seq_length: ${runner.seq_length}
    activation: swiglu
    apply_rope_fusion: True
    expert_model_parallel_size: 2
  optim: {bf16: True, fp16: False, lr: 2e-05, min_lr: 2.0e-6, clip_grad: 0.8, loss_scale: 65536}
  lr_sched: {lr_warmup_fraction: 0.01, max_lr: 2.0e-5, lr_decay_style: constant, lr_decay_iters: 10}
  tokenizer: {tokenizer_model: "${rollout.model.model_path}", use_fast: False}
  megatron: {distributed_backend: nccl, ckpt_convertor: {hf_model_path: "${is.nowhere.either}"}}
reward: {use_reward_model: False}
"""


def test_reinforcement_learning_file(tmp_path):
    config = load_config(write(tmp_path, RL_FILE))
    assert config.mesh_sizes(32) == MeshSizes(dp=8, pp=2, tp=1, sp=2, cp=1)
    assert config.architecture() is None
    assert config.runner.max_tokens_per_mbs == 8192
    assert config.runner.output_dir == "out-here"
    assert config.data.num_workers == 4 and config.data.shuffle is True and config.data.val_data_paths == ["a.jsonl"]
    assert config.actor.model.precision == "bf16"
    assert config.actor.optim.lr == 2e-5
    assert config.actor.tokenizer.tokenizer_model == "/models/some"
    note, algorithm, validation, scale, dynamic = config.notes
    assert scale == "actor.optim: loss_scale has no effect with actor.model.precision bf16"
    assert validation == "data.val_data_paths has no effect without runner.val_check_interval"
    assert "max_tokens_per_mbs * context_parallel_size = 8192 tokens" in dynamic
    assert "loss_agg_func" in algorithm and "have no effect with loss_type cross_entropy" in algorithm
    for name in ("rollout", "component_placement", "apply_rope_fusion", "ckpt_convertor"):
        assert name in note
    with pytest.raises(ConfigError) as caught:
        config.check_train(config.mesh_sizes(32), None)
    assert {p.split(":")[0] for p in caught.value.problems} == {
        "actor.model.expert_model_parallel_size",
        "actor.global_batch_size",
    }


def test_hydra_defaults_beside_the_file(tmp_path):
    write(tmp_path, "runner: {seq_length: 32, max_steps: 7}", "base.yaml")
    config = load_config(write(tmp_path, "defaults: [base]\nrunner: {max_steps: 9}"))
    assert (config.runner.seq_length, config.runner.max_steps) == (32, 9)
    with pytest.raises(ConfigError, match="needs Hydra to compose it.*write the keys of actor.model into the file"):
        load_config(write(tmp_path, "defaults: [model/qwen@actor.model]"))


def test_sequence_length_under_the_model(tmp_path):
    assert load_config(write(tmp_path, "actor: {model: {seq_length: 48}}")).runner.seq_length == 48


def test_overrides(tmp_path):
    path = write(tmp_path, "runner: {max_steps: 3, seq_length: 8}\nactor: null")
    config = load_config(
        path,
        [
            "actor.model.tensor_model_parallel_size=2",
            "actor.optim.lr=2e-05",
            "runner.max_steps=5",
            "actor.seed=${runner.seq_length}",
            "data.train_data_paths=[a, b]",
        ],
    )
    assert config.actor.model.tensor_model_parallel_size == 2 and config.actor.optim.lr == 2e-5
    assert config.runner.max_steps == 5 and config.actor.seed == 8 and config.data.train_data_paths == ["a", "b"]
    with pytest.raises(ConfigError) as caught:
        load_config(
            path, ["runner.max_steps", "=3", "actor.modle.precision=bf16", "data.seed=[", "runner.max_steps.x=1"]
        )
    problems = caught.value.problems
    assert problems[0] == "override 'runner.max_steps': expected key.path=value, such as runner.max_steps=100"
    assert problems[1].startswith("override '=3': expected key.path=value")
    assert problems[2].startswith("override 'data.seed=['")
    assert any(p == "actor.modle: unknown key: did you mean actor.model?" for p in problems)


@pytest.mark.parametrize(
    "text,expected",
    [
        ("runner: {max_steps: 3\n", "invalid YAML at line 2, column 1: expected ',' or '}', but got '<stream end>'"),
        ("runner:\n  seed: 1\n  seed: 2\n", "invalid YAML at line 3, column 3: found duplicate key seed"),
        ("- a\n- b\n", "expected sections (cluster, runner, data, actor) at the top level, got a plain list"),
        ("just text\n", "expected sections (cluster, runner, data, actor) at the top level, got a plain value"),
        ("runner:\n  output_dir: ${broken\n", "output_dir: "),
    ],
)
def test_bad_file(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)
    assert len(caught.value.problems) == 1


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_config(tmp_path / "binary.yaml")


def test_empty_file_is_all_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == config_from_dict({})


def test_quickstart():
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    sizes, architecture = config.prepare_train(config.num_configured_devices())
    assert sizes == MeshSizes(dp=2, pp=2, tp=1, sp=2, cp=2)
    assert (architecture.vocab_size, architecture.padded_vocab_size, architecture.head_dim) == (258, 384, 32)
    assert config.num_microbatches(sizes) == 4
    assert config.actor.lr_sched.min_lr == pytest.approx(3e-4)


# --- Architecture


def hugging_face(folder: Path, **values) -> Config:
    write(
        folder,
        json.dumps(
            {
                **MODEL,
                "vocab_size": 1000,
                "hidden_act": "silu",
                "rms_norm_eps": 1e-05,
                "max_position_embeddings": 4096,
                **values,
            }
        ),
        "config.json",
    )
    return config_from_dict({"actor": {"model": {"model_path": str(folder)}}})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "stored",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_llama(tmp_path, stored):
    architecture = hugging_face(tmp_path, model_type="llama", tie_word_embeddings=True, **stored).architecture()
    assert architecture.rope_theta == 500000.0
    assert architecture.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert (architecture.vocab_size, architecture.padded_vocab_size) == (1000, 1024)
    assert architecture.head_dim == 8 and architecture.num_key_value_heads == 4
    assert architecture.tie_word_embeddings and not architecture.attention_bias and not architecture.qk_norm
    assert architecture.rms_norm_eps == 1e-5 and architecture.initializer_range == 0.02


def test_mistral(tmp_path):
    architecture = hugging_face(tmp_path, model_type="mistral", sliding_window=512, head_dim=None).architecture()
    assert architecture.sliding_window == 512 and architecture.rope_scaling is None
    assert hugging_face(tmp_path, model_type="mistral", sliding_window=None).architecture().sliding_window is None


def test_qwen2(tmp_path):
    stored = dict(model_type="qwen2", sliding_window=512, max_window_layers=4, rope_scaling=None)
    architecture = hugging_face(tmp_path, use_sliding_window=False, **stored).architecture()
    assert architecture.attention_bias and architecture.sliding_window is None and not architecture.qk_norm
    assert hugging_face(tmp_path, use_sliding_window=True, **stored).architecture().sliding_window is None
    stored["max_window_layers"] = 0
    assert hugging_face(tmp_path, use_sliding_window=True, **stored).architecture().sliding_window == 512
    stored["max_window_layers"] = 1
    with pytest.raises(ConfigError, match="sliding_window: 512 on 3 of 4 layers, but a window on only some"):
        hugging_face(tmp_path, use_sliding_window=True, **stored).architecture()


def test_qwen3(tmp_path):
    architecture = hugging_face(tmp_path, model_type="qwen3", head_dim=16, attention_bias=False).architecture()
    assert architecture.qk_norm and not architecture.attention_bias and architecture.head_dim == 16


@pytest.mark.parametrize(
    "stored,expected",
    [
        ({"model_type": "gpt2"}, "model_type: gpt2 is not supported: choose one of llama, mistral, qwen2, qwen3"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling: rope_type linear is not supported: choose one of default, llama3",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "needs numbers for low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        ({"model_type": "llama", "rope_scaling": {"factor": 2.0}}, "rope_scaling: rope_type None is not supported"),
        ({"model_type": "llama", "hidden_size": None}, "hidden_size: not given"),
        ({"model_type": "llama", "hidden_size": "big"}, "hidden_size: expected an integer, got 'big'"),
        (
            {"model_type": "llama", "num_key_value_heads": 3},
            "num_key_value_heads: 3 does not divide num_attention_heads 8 (8 / 3 = 2.67): choose one of 1, 2, 4, 8",
        ),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"model_type": "llama", "attention_bias": True}, "llama with biases is not supported"),
    ],
)
def test_bad_hugging_face_config(tmp_path, stored, expected):
    with pytest.raises(ConfigError) as caught:
        hugging_face(tmp_path, **stored).architecture()
    assert expected in str(caught.value) and str(tmp_path) in str(caught.value)


def test_model_path_without_a_model(tmp_path):
    config = config_from_dict({"actor": {"model": {"model_path": str(tmp_path)}}})
    with pytest.raises(ConfigError, match="actor.model.model_path: .* has no config.json"):
        config.architecture()
    assert config.mesh_sizes(2).dp == 2 and config.notes == []  # the mesh does not need the model


def test_own_fields_win_over_config_json(tmp_path):
    hugging_face(tmp_path, model_type="llama")
    config = config_from_dict({"actor": {"model": {"model_path": str(tmp_path), "num_hidden_layers": 2}}})
    assert config.architecture().num_hidden_layers == 2
    assert any("actor.model.num_hidden_layers 2 overrides 4" in note for note in config.notes)


def test_byte_tokenizer_gives_the_vocabulary():
    fields = {key: value for key, value in MODEL.items() if key != "vocab_size"}
    config = config_from_dict({"actor": {"model": fields}})
    assert config.architecture().vocab_size == 258
    assert "actor.model.vocab_size is not given: using 258, the size of the byte tokenizer" in config.notes
    with pytest.raises(ConfigError, match="actor.model.vocab_size: not given"):
        config_from_dict({"actor": {"model": fields, "tokenizer": {"tokenizer_model": "x.json"}}}).architecture()


def test_families_from_own_fields():
    assert train_config(model=dict(model_type="qwen2.5")).architecture().attention_bias
    assert train_config(model=dict(model_type="qwen3")).architecture().qk_norm
    with pytest.raises(ConfigError, match="actor.model.model_type: deepseek_v3 is not supported"):
        train_config(model=dict(model_type="deepseek_v3")).architecture()


def test_an_empty_config_has_no_notes():
    assert config_from_dict({}).notes == []


def test_logger_backends():
    def backends(value):
        return config_from_dict({"runner": {"logger": {"logger_backends": value, "log_path": "logs"}}})

    assert config_from_dict({}).runner.logger.logger_backends == ["tensorboard"]
    assert backends("tensorboard").runner.logger.logger_backends == ["tensorboard"]
    assert "swanlab ignored, because only tensorboard and wandb are" in backends(["swanlab", "tensorboard"]).notes[1]
    with pytest.raises(ConfigError, match="expected one of 'tensorboard', 'wandb', 'swanlab', got 'tensorbord'"):
        backends(["tensorbord"])
