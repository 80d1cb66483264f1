"""Configs that nobody would write, from a seeded generator: each loads or is a `ConfigError`, soon and in few words.

A case is a valid file in which settings have other values, sections are lists, characters are missing, the model's
config.json holds nonsense, and so on. The seed of a case is its number, and a failure prints the whole case. To see one again:
`check_load(case(7), tmp_path)`.
"""

import contextlib
import copy
import gc
import io
import json
import os
import random
import resource
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pytest

from jaxpar import cli
from jaxpar.config import Config, ConfigError, load_config
from jaxpar.config.foreign import FOREIGN_KEYS, OPAQUE_SECTIONS
from jaxpar.config.keys import Section

SECONDS, BYTES = 2.0, 4096  # the most that a case may take, and the longest message

BASE = {
    "cluster": {"num_nodes": "1", "num_gpus_per_node": "8"},
    "runner": {"seq_length": "64", "max_steps": "10", "experiment_name": "fuzz"},
    "data": {"train_data_paths": "[a.txt]"},
    "algorithm": {},
    "actor": {
        "micro_batch_size": "2",
        "global_batch_size": "16",
        "model": {
            "tensor_model_parallel_size": "2",
            "hidden_size": "64",
            "intermediate_size": "96",
            "num_hidden_layers": "4",
            "num_attention_heads": "8",
            "num_key_value_heads": "4",
            "vocab_size": "256",
        },
        "optim": {"lr": "1.0e-3"},
        "lr_sched": {"lr_decay_style": "cosine"},
        "tokenizer": {},
    },
}
HUGGING_FACE = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "rope_parameters": None,
    "sliding_window": 16,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention"] * 4,
    "max_window_layers": 0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "peft_type": "LORA", "rank_pattern": {}}

LONG = "9" * 30
# YAML values that may stand anywhere.
VALUES = [
    *["0", "1", "2", "3", "4", "7", "8", "16", "64", "-1", "-2", "1.5", "0.0", "1.0e-3", "1e-3", "2e308", "1e308", "1.0e+308", "-1.0e+308", "1e-320", "1.0e-320", ".inf", "-.inf", ".nan"],
    *["1000000000", "999999999", "2147483647", "2147483648", "9223372036854775807", "9223372036854775808", "1000000007"],
    *f"{LONG} -{LONG} {'9' * 400} {'9' * 5000} 0x{'f' * 5000} 0200 010 1:30 1:30:00 190:20:30.15 0b11 0x1F 0o17 1_000 +5".split(),
    *["True", "False", "yes", "no", "on", "off", "null", "~", "~/x", "~nosuchuser", "~nosuchuser/x", "???", ".", "..", "/", "/x", "../x", "../../x", "a/../..", "a/b", "full", "selective"],
    *["uniform", "block", "cosine", "linear", "constant", "a2a", "a2a+p2p", "p2p", "fp16", "fp32", "bf16", "adam", "sgd", "muon", "lion", "auto", "dpo", "actor", "zb1p", "gpipe"],
    *["[]", "{}", "[1]", "[a,b]", "[[a]]", "[null]", "{a:1}", "{a:}", "{1:2}", "[{}]", "[1,2,3]", "{a:{b:{c:1}}}", "[0]", "[-1]", "[2,4]", "[2,2]", "[1000000000,1]"],
    *['""', '"\\0"', '"a\\0b"', '"a\\nb"', '"\\ud800"', '"\\e[31m"', '"1"', '"0200"', '"1:30"', '2001-01-01', '2001-01-01T00:00:00Z', '!!binary', '=', '<<'],
    *["${runner.seq_length}", "${runner}", "${nothing}", "${actor.model}", "${", "${}", "${a:}", "${multiply:2}", "${multiply:a,b}", "${int_div:1,0}"],
    *["${subtract:x,1}", "${not:1}", "${now:}", "${now:%}", "${oc.env:NOT_SET}", "${oc.env:HOME}", "${multiply:99999999,${runner.seq_length}}"],
    *["${multiply:[1],1000000000}", "${torch.dtype:bfloat16}", "${torch.dtype:[1]}", "${oc.select:x}", "${oc.create:[1]}", "${..seq_length}"],
    *["!!python/object:os.system", "!!int", "!!float", "!!set", "!x", "*a", "&a", "&a[*a]", "@", "`", "%", "|", ">", "-", "?", ":", "{", "}", "[", "]", "'", '"', "#", ",", "{?", "[", "${multiply:x,2"],
    "!!int x", "!!float x", "!!bool x", "!!null x", "!!timestamp x", "!!binary x", "!!int '1:30'", "!!set {a, b}", "!!omap [a: 1]",
    "{[1]: 2}", "{{a: 1}: 2}", "{true: 1}", "{null: 1}", "{1.5: 1}", "{.nan: 1}", "&x {a: *x}", "{<<: {a: 1}}", "{<<: 5}", "[1, a: 2]",
    "x" * 5000, "[" * 50 + "]" * 50, "[" * 400 + "]" * 400, "[" * 2000 + "]" * 2000, "{a: " * 300 + "1" + "}" * 300,
    "[" + "1, " * 3000 + "]", "{" + ", ".join(f"k{i}: {i}" for i in range(500)) + "}", "/" + "d/" * 3000, "é" * 2000, "${" * 300,
    "${multiply:" * 200 + "1" + ",1}" * 200, "{rope_type: llama3, factor: .inf}",
    "{rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: .inf}",
    "{rope_type: [a]}", "{rope_type: {a: 1}}", "[{match: '*'}]", "[{match: '[', lr_mult: 1e300}]", "[{}]", "[{match: 5, x: 1}]",
]  # fmt: skip
DEFAULTS = ["5", "a", "[5]", "[null]", "[[a]]", "[{}]", "[{a: b}]", "[{1: 2}]", "[_self_]", "[config]", "[missing]", "[a/b@c]",
    "{a: b}", "true", "1.5", "[true]", "['']", "['\\0']", '["a\\0b"]', "[model/qwen@actor.model]", "[{a@b: c}]", "???", "${runner}",
    "${nothing}", "[${nothing}]", "[???]", "[~nosuchuser]", "[" * 40 + "]" * 40, f"[{'x' * 5000}]", f"[{LONG}]", "[../config]", "[.]",
]  # fmt: skip
# Values in config.json; a string that starts with RAW is written as it is.
RAW = "raw:"
JSON = [
    0, 1, -1, 5, 64, 7, 1.5, -0.0, 10**9, 10**30, 10**400, float("inf"), float("nan"), 1e308, True, False, None, "", "x", "x" * 5000,
    "\0", "4", [], {}, [1], ["full_attention"], ["full_attention"] * 3 + ["sliding_attention"], [None] * 4, [[1]] * 4, [{}] * 4,
    {"a": 1}, {"rope_type": "llama3"}, {"rope_type": ["x"]}, {"rope_type": "default", "rope_theta": "x"}, "sliding_attention",
    dict(rope_type="llama3", factor=float("nan"), low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=float("inf")),
    dict(rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=1, original_max_position_embeddings=10**400),
    dict(rope_type="llama3", factor=0, low_freq_factor=0, high_freq_factor=0, original_max_position_embeddings=0),
    RAW + "9" * 5000, RAW + "[" * 3000 + "]" * 3000, RAW + "{", RAW + '"\\ud800"', RAW + "1e999",
]  # fmt: skip


@dataclass
class Case:
    """A config file, its overrides, and the files beside it: {name: text}."""

    text: str
    overrides: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def keys_of(section: type[Section] = Config, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[str]]:
    """The path of every section and setting, with values of its type."""
    found = {}
    for name, key in section.model_fields.items():
        types, below = str(key), key.annotation
        numbers = [
            "1",
            "2",
            "3",
            "4",
            "8",
            "12",
            "16",
            "64",
            "100",
            "1000",
            "65536",
            "1000000",
            "999999937",
            "1000000000",
            "2147483647",
        ] * ("int" in types)
        choices = get_args(below) if "Literal" in types else ()
        choices += ("0", "1.0e-8", "0.1", "0.5", "0.9", "1", "100.0") * ("float" in types) + ("True", "False") * (
            "bool" in types
        )
        found[*path, name] = [*numbers, *map(str, choices)] or ["a", "b/c", "[a, b]"]
        if isinstance(below, type) and issubclass(below, Section):
            found |= keys_of(below, (*path, name))
    return found


MEANT = keys_of()
KEYS = list(MEANT)
SIZES = [key for key in KEYS if key[-1].endswith(("_size", "_sizes", "_length", "_steps", "_iters", "_layers", "_heads", "nodes", "node"))]  # fmt: skip


def case(seed: int) -> Case:
    """The case of a number."""
    rng = random.Random(seed)
    values, overrides, files = copy.deepcopy(BASE), [], {}
    likely = rng.choice([0.2, 0.9, 1.0])  # how many of the values are of the right type
    for _ in range(rng.randint(1, 4)):
        path = rng.choice(SIZES if rng.random() < 0.3 else KEYS)
        value, what = rng.choice(VALUES), rng.random()
        if rng.random() < likely:
            value, what = rng.choice(MEANT[path]), rng.choice([0.1, 0.5])
        if what < 0.25:
            overrides.append(
                rng.choice([""] * 20 + ["+", "~", "a b"]) + ".".join(path) + rng.choice(["="] * 20 + [""]) + value
            )
        elif what < 0.85:
            _put(values, path, value)
        elif what < 0.90:
            section = rng.choice(["", *FOREIGN_KEYS])
            name = rng.choice(sorted(FOREIGN_KEYS.get(section, OPAQUE_SECTIONS)))
            _put(values, (*section.split("."), name) if section else (name,), value)
        elif what < 0.93:
            _put(values, ("defaults",), rng.choice(DEFAULTS))
        else:
            _put(values, (*path[:-1], path[-1] + rng.choice(["s", "x" * 300, ".a", " b", "\0"])), value)
    if rng.random() < 0.25:
        actor, stored = values.get("actor"), copy.deepcopy(HUGGING_FACE)
        model = actor.get("model") if isinstance(actor, dict) else None
        for key in rng.sample(sorted(stored), rng.randint(0, 3)):
            stored[key] = rng.choice(JSON)
        adapters = LORA | {key: rng.choice(JSON) for key in rng.sample(sorted(LORA), rng.randint(0, 2))}
        files = {"model/config.json": _json(stored, rng), "lora/adapter_config.json": _json(adapters, rng)}
        if isinstance(model, dict):
            if rng.random() < 0.8:
                for name in HUGGING_FACE:
                    model.pop(name, None)
            model["model_path"] = "FOLDER/model"
            if rng.random() < 0.3:
                model |= {"is_lora": "True", "lora_path": "FOLDER/lora"}
    text = "\n".join(_lines(values, 0))
    if rng.random() < 0.1:
        text = _edited(text, rng)
    return Case(text, overrides, files)


def _put(values, path, value):
    for name in path[:-1]:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[path[-1]] = value


def _lines(values, indent):
    for name, value in values.items():
        yield f"{'  ' * indent}{name}:" + ("" if isinstance(value, dict) else f" {value}")
        if isinstance(value, dict):
            yield from _lines(value, indent + 1)


def _json(values, rng):
    parts = [
        f"{json.dumps(key)}: {value.removeprefix(RAW) if str(value).startswith(RAW) else json.dumps(value)}"
        for key, value in values.items()
    ]
    text = "{" + ", ".join(parts) + "}"
    whole = ["", "5", "[]", "null", "[" * 100_000, "\0", "\ud800", '{"model_type": 5}', '{"model_type": ["llama"]}']
    return rng.choice(whole) if rng.random() < 0.1 else text


def _edited(text, rng):
    """A few characters more or less, lines doubled, moved or indented."""
    for _ in range(rng.randint(1, 3)):
        at, lines = rng.randrange(len(text) or 1), text.split("\n")
        line = rng.randrange(len(lines))
        edits = [
            lambda: text[:at] + text[at + 1 :],  # noqa: B023
            lambda: text[:at] + rng.choice("\t :-[]{}&*!|>'\"%@`#,?\0\x85\ufeff\ud800$é0") + text[at:],  # noqa: B023
            lambda: "\n".join([*lines[:line], lines[line], *lines[line:]]),  # noqa: B023
            lambda: "\n".join([*lines[:line], "  " + lines[line], *lines[line + 1 :]]),  # noqa: B023
            lambda: text[:at],  # noqa: B023
            lambda: text + "\n---\n" + text,  # noqa: B023
        ]
        text = rng.choice(edits)()
    return text


def check_load(one: Case, folder) -> bool:
    """Loads a case, with its notes and the checks of training; True if it is a valid config."""
    return _check(one, folder, _load)


def check_mesh(one: Case, folder) -> bool:
    """Shows the mesh of a case, as `jaxpar mesh` does."""
    return _check(one, folder, cli.mesh)


def _load(path, overrides):
    config = load_config(path, overrides)
    print("\n".join(config.notes), config.output_path)
    config.prepare_train(config.num_configured_devices() or 8)


def _check(one, folder, function):
    path = _write(one, folder)
    overrides = [text.replace("FOLDER", str(folder)) for text in one.overrides]
    output, start, valid = io.StringIO(), time.thread_time(), True
    try:
        with contextlib.redirect_stdout(output):
            function(path, overrides)
    except ConfigError as error:
        valid, message = False, str(error)
        assert message.strip(), f"an empty message\n{one}"
        assert len(message.encode(errors="replace")) <= BYTES, f"{len(message)} characters\n{one}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        pytest.fail(
            f"{type(error).__name__}: {str(error)[:300]} at {last.filename}:{last.lineno}\n{one}", pytrace=False
        )
    seconds = time.thread_time() - start
    assert seconds < SECONDS, f"{seconds:.1f} s\n{one}"
    for line in output.getvalue().splitlines():
        assert len(line.encode(errors="replace")) <= BYTES, f"a line of {len(line)} characters\n{one}"
    return valid


def _write(one, folder):
    for name, text in {**one.files, "config.yaml": one.text}.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text.replace("FOLDER", str(folder)).encode(errors="surrogatepass"))
    return folder / "config.yaml"


def check_all(check, seeds, folder):
    """Checks the cases of these numbers. Some must be valid and some not, or the generator has gone wrong."""
    valid = sum(check(case(seed), folder) for seed in seeds)
    assert 0.02 < valid / len(seeds) < 0.6


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # `mesh` sets XLA's flags
    gc.freeze()  # what other tests have left: collecting it takes seconds, which are not the config's
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def little_memory():
    """A size of 10^9 must not become an array: with 2 GiB more than the process has, that is a MemoryError."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("seeds", [range(300), pytest.param(range(300, 20_000), marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])  # fmt: skip
def test_every_config_loads_or_says_why_not(seeds, tmp_path):
    check_all(check_load, seeds, tmp_path)


@pytest.mark.parametrize("seeds", [[*range(20), 168], pytest.param(range(20, 600), marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])  # fmt: skip
def test_the_mesh_of_every_config_is_shown_or_says_why_not(seeds, tmp_path):
    check_all(check_mesh, seeds, tmp_path)
