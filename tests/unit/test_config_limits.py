"""What a config may not say, in words: values that YAML misreads or nobody means, paths, files beside it, and the size of it all."""

import json
import time

import pytest
from test_config import MODEL, load_problems, train_config, train_problems, write

from jaxpar.config import ConfigError, load_config
from jaxpar.config.errors import MAX_LINE

NESTED = "[" * 60 + "]" * 60


def problems_of(folder, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return [problem.replace(f"{folder}/config.yaml: ", "") for problem in caught.value.problems]


@pytest.mark.parametrize(
    "text,expected",
    [
        ("data: {seed: 0200}", "line 1: 0200 is octal in YAML 1.1: write it without the 0, or '0200' for text"),
        ("runner: {save_interval: 1:30}", "line 1: 1:30 is a number in base 60 in YAML 1.1: write '1:30' for text"),
        ("data: {seed: !!int x}", "line 1: the tag tag:yaml.org,2002:int is not supported: remove it"),
        (f"data: {{x: {NESTED}}}", "line 1: more than 32 sections or lists inside each other: remove some"),
        ("data: &a {x: *a}", "line 1: *a is not known, or is part of itself: write the value out"),
        ("data:\n  a: &a [1, 2]\n  b: &b [" + "*a, " * 999 + "]\n  c: [" + "*b, " * 999 + "]", "line 4: more than 100,000 values"),
        (f"data: {{seed: {'9' * 5000}}}", "invalid YAML: Exceeds the limit (4300 digits) for integer string conversion"),
        (f"data: {{seed: {'9' * 30}}}", "data.seed: an integer of more than 64 bits cannot be meant: write a smaller one"),
        ("data: {seed: '${multiply:[1],1000000000}'}", "data.seed: ${multiply:[1],1000000000} cannot be resolved: ValueError raised"),
        ("data: ${data}", "data: ${data} cannot be resolved"),
        ("runner: {logger: '${runner}'}", "runner.logger: ${runner} cannot be resolved: Interpolation to parent node detected"),
        ("data: {seed: '${actor}'}\nactor: {model: '${data}'}", "data.seed.model.seed.model"),
        ("#" * 300_000, "longer than 200,000 characters: give a config"),
        ("defaults: 5", "defaults: 5: expected a list of names of files beside this one, such as [base]"),
        ("defaults: [5]", "defaults: [5]: expected a list of names of files beside this one, such as [base]"),
        ("defaults: ${nothing}", "defaults: ${nothing}: expected a list of names"),
        ("runner: {output_dir: [a, b]}", "runner.output_dir: expected text, got ['a', 'b']"),
        ('runner: {output_dir: "a\\0"}', "runner.output_dir: 'a\\x00' has a character that cannot be printed: remove it"),
        ("actor: {model: {model_path: ~nosuchuser/x}}", "actor.model.model_path: '~nosuchuser/x' there is no such user: write"),
        (f"data: {{train_data_paths: [{'x' * 300}]}}", f"data.train_data_paths.0: '{'x' * 300}' is too long for a path: shorten it"),
        ("runner: {experiment_name: ../x}", "runner.experiment_name: '../x' is no folder inside runner.output_dir: give a name"),
        ("runner: {experiment_name: /x}", "runner.experiment_name: '/x' is no folder inside runner.output_dir: give a name"),
        ("runner: {experiment_name: ''}", "runner.experiment_name: '' is no folder inside runner.output_dir: give a name"),
        ("actor: {optim: {lr: 1.0e+308}}", "actor.optim.lr: must be at most 1000, got 1e+308"),
        ("actor: {optim: {adam_eps: 1.0e-320}}", "actor.optim.adam_eps: 1e-320 cannot be meant: give a number between 1e-30 and 1e30"),
        ("algorithm: {clip_log_ratio_min: .nan}", "algorithm.clip_log_ratio_min: expected a finite number, got nan"),
        ("cluster: {num_nodes: 1000000000}", "cluster.num_nodes: must be at most 100000, got 1000000000"),
        ("actor: {model: {num_hidden_layers: 1000000000}}", "actor.model.num_hidden_layers: must be at most 10000, got"),
        ("cluster: {xla_flags: {'a:1': null}}", "cluster.xla_flags.a:1: None is no value of a flag: give text"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_an_error(tmp_path, text, expected):
    assert problems_of(tmp_path, text)[0].startswith(expected)


def test_overrides_are_read_like_the_file(tmp_path):
    problems = problems_of(
        tmp_path, "", "data.seed=010", "data.seed=5\nb: 3", "data.seed=!!int x", "data.seed=${multiply:x,2}"
    )
    assert [problem.split(": ", 1)[1][:40] for problem in problems[:3]] == [
        "line 1: 010 is octal in YAML 1.1: write ",
        "3': expected one value",
        "line 1: the tag tag:yaml.org,2002:int is",
    ]
    assert problems[3].startswith("data.seed: ${multiply:x,2} cannot be resolved")


def test_octal_and_base_60_may_be_text(tmp_path):
    text = "runner: {experiment_name: '0200'}\ndata: {text_key: \"1:30\", train_data_paths: [a:1, 0:30x, !!str 010]}"
    config = load_config(write(tmp_path, text))
    assert (config.runner.experiment_name, config.data.text_key) == ("0200", "1:30")
    assert config.data.train_data_paths == ["a:1", "0:30x", "010"]


def test_a_message_is_a_screen_long(tmp_path):
    keys = "\n".join(f"  {'k' * 200}{i}: 1" for i in range(500))
    problems = problems_of(tmp_path, f"runner:\n{keys}\n  output_dir: [{'x' * 9000}]")
    assert sum(len(problem) for problem in problems) < 4000 and problems[-1].endswith("more of these")
    (line,) = problems_of(tmp_path, f"runner: {{log_interval: {'x' * 9000}}}")
    assert (
        len(line) < MAX_LINE + 10
        and line.startswith("runner.log_interval: expected an integer, got 'xxx")
        and line[-1] == "'"
    )


@pytest.mark.parametrize(
    "settings",
    [
        ["cluster.num_nodes=100000", "cluster.num_gpus_per_node=4096", "actor.model.tensor_model_parallel_size=7"],
        ["cluster.num_nodes=99991", "cluster.num_gpus_per_node=7", "actor.model.tensor_model_parallel_size=1000000007"],
        ["actor.global_batch_size=2147483647", "actor.micro_batch_size=1"],
        ["actor.model.num_attention_heads=4194301", "actor.model.hidden_size=4194301"],
    ],
)
def test_large_sizes_are_answered_at_once(tmp_path, settings):
    start = time.process_time()
    config = load_config("configs/quickstart.yaml", settings)
    with pytest.raises(ConfigError):
        config.prepare_train(config.num_configured_devices())
    assert time.process_time() - start < 1


def test_the_schedules_table_is_bounded():
    large = dict(global_batch_size=2**20, micro_batch_size=1)
    assert train_problems(actor=large)[0].startswith(
        "actor.global_batch_size: 1048576 makes 1,048,576 microbatches on 1 stages with 1 chunks = 1,048,576 places"
    )


def test_a_warm_up_leaves_steps_for_the_decay():
    (problem,) = train_problems(lr_sched={"lr_decay_style": "cosine", "lr_warmup_fraction": 1})
    assert problem.startswith("actor.lr_sched.lr_warmup_fraction: 1.0 of 10 steps leaves no steps for the decay")
    assert not train_problems(lr_sched={"lr_warmup_fraction": 1})


@pytest.mark.parametrize(
    "stored,expected",
    [
        ({"layer_types": 5}, "layer_types: 5, expected one of full_attention, sliding_attention for each layer"),
        ({"layer_types": [[1]] * 4}, "layer_types: [[1], [1], [1], [1]], expected one of"),
        ({"max_window_layers": "x"}, "max_window_layers: 'x', expected a number of layers"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers: "),
        ({"rope_scaling": {"rope_type": "llama3", "factor": float("inf")}}, "rope_scaling: rope_type llama3 needs numbers for factor"),
    ],
)  # fmt: skip
def test_nonsense_in_config_json(tmp_path, stored, expected):
    values = dict(MODEL, model_type="qwen2", sliding_window=16, use_sliding_window=True) | stored
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        train_config(model={**dict.fromkeys(MODEL), "model_path": str(tmp_path)}).architecture()
    assert f"config.json.{expected}" in str(caught.value) or f"config.json: {expected}" in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "{", '"\ud800"', "9" * 5000])
def test_a_config_json_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError, match="actor.model.model_path: .*config.json cannot be read: "):
        train_config(model={**dict.fromkeys(MODEL), "model_path": str(tmp_path)}).architecture()


@pytest.mark.parametrize("key,value", [("r", 0), ("r", "x"), ("lora_alpha", float("inf")), ("target_modules", 5), ("target_modules", [5])])  # fmt: skip
def test_nonsense_in_adapter_config_json(tmp_path, key, value):
    stored = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]} | {key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=f"adapter_config.json: {key}: .*: correct it"):
        train_config(model=dict(is_lora=True, lora_path=str(tmp_path))).lora()


@pytest.mark.parametrize(
    "sections,note",
    [
        (
            dict(runner={"val_check_interval": 5, "limit_val_batches": 2}),
            "runner: val_check_interval, limit_val_batches have no effect without data.val_data_paths or eval_batches",
        ),
        (dict(runner={"max_tokens_per_mbs": 64}), "runner: max_tokens_per_mbs has no effect without enable_dynamic_batch_size"),
        (
            dict(model={"recompute_num_layers": 2}),
            "actor.model: recompute_num_layers has no effect without recompute_granularity: full",
        ),
        (
            dict(model={"recompute_granularity": "selective", "recompute_num_layers": 2}),
            "actor.model: recompute_num_layers has no effect with recompute_granularity selective",
        ),
        (
            dict(model={"precision": "fp32"}, optim={"loss_scale": 1024}),
            "actor.optim: loss_scale has no effect with actor.model.precision fp32",
        ),
        (
            dict(model={"precision": "fp16"}, optim={"loss_scale": 1024, "hysteresis": 1}),
            "actor.optim: hysteresis has no effect with a loss_scale, which never changes",
        ),
    ],
)  # fmt: skip
def test_settings_without_effect_are_noted(sections, note):
    assert train_config(**sections).notes == [note]


def test_deep_dicts_and_long_integers_from_python():
    deep: dict = {}
    for _ in range(3000):
        deep = {"a": deep}
    assert load_problems({"data": deep})
    assert load_problems({"data": {"seed": 10**5000}})[0].startswith("data.seed: an integer of more than 64 bits")
