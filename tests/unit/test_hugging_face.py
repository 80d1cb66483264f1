"""Hugging Face folders: weights are read correctly on every mesh, and transformers can read what is written."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jaxpar.config import Architecture, ConfigError, MeshSizes, RopeScaling, config_from_dict
from jaxpar.models import Decoder, FunctionalModel, TokenInfo, hugging_face
from jaxpar.models.hugging_face import has_weights, load_params, save_params
from jaxpar.parallel.mesh import build_mesh
from jaxpar.parallel.sharding import layout_tree

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, LAYERS = 32, 8, 4, 6, 48, 50, 4


def architecture(**changes: Any) -> Architecture:
    """By default a llama with 4 layers and a vocabulary of 50, padded to 64."""
    sizes = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "padded_vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
    }
    return Architecture(**{**sizes, **changes})


def stored_tensors(arch: Architecture, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights with Hugging Face's names and shapes."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not arch.tie_word_embeddings:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        block = {
            "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN), "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj.weight": (MLP, HIDDEN), "mlp.up_proj.weight": (MLP, HIDDEN), "mlp.down_proj.weight": (HIDDEN, MLP),
        }  # fmt: skip
        if arch.attention_bias:
            block |= {
                f"self_attn.{name}_proj.bias": (heads * HEAD_DIM,)
                for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
            }
        if arch.qk_norm:
            block |= {f"self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def one_device(model: FunctionalModel) -> Any:
    return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), model.shapes)


def on_mesh(model: FunctionalModel, sizes: dict[str, int], zero_stage: int = 1) -> Any:
    mesh_sizes = MeshSizes(**{**dict.fromkeys(("dp", "pp", "tp", "sp", "cp"), 1), **sizes})
    mesh = build_mesh(mesh_sizes, jax.devices()[: mesh_sizes.num_devices])
    layouts = layout_tree(model.shapes, model.dims, mesh, explicit=True, zero_stage=zero_stage)
    return jax.tree.map(lambda layout: NamedSharding(mesh, layout.rest_spec), layouts)


def load(folder: Path, arch: Architecture, shardings: Any = None) -> Any:
    model = FunctionalModel(Decoder(arch))
    return load_params(folder, arch, model.shapes, shardings or one_device(model))


def load_problems(folder: Path, arch: Architecture) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, arch)
    return [problem.replace(str(folder), "FOLDER") for problem in caught.value.problems]


def assert_same(left: Any, right: Any) -> None:
    """Checks that the weights are bitwise equal and float32."""
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, left, right))
    for (path, a), b in zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(
            np.asarray(a).view(np.int32), np.asarray(b).view(np.int32), jax.tree_util.keystr(path)
        )


# --- Reading


def test_every_weight_lies_where_the_decoder_reads_it(tmp_path: Path) -> None:
    arch = architecture(attention_bias=True, qk_norm=True)
    tensors = stored_tensors(arch)
    save_file(tensors, tmp_path / "model.safetensors")
    params = jax.tree.map(np.asarray, load(tmp_path, arch))

    x = np.random.default_rng(1).standard_normal(HIDDEN).astype(np.float32)
    for layer in range(LAYERS):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        stored = {name.removeprefix(f"model.layers.{layer}."): value for name, value in tensors.items()}
        attention, mlp = block["attention"], block["mlp"]
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):  # torch's Linear: weight @ x + bias
            expected = stored[f"self_attn.{theirs}_proj.weight"] @ x + stored[f"self_attn.{theirs}_proj.bias"]
            got = np.einsum("e,ehd->hd", x, attention[ours]) + attention[f"{ours}_bias"]
            np.testing.assert_allclose(got.reshape(-1), expected, rtol=1e-4, atol=1e-4)
        heads = np.random.default_rng(2).standard_normal((HEADS, HEAD_DIM)).astype(np.float32)
        np.testing.assert_allclose(
            np.einsum("hd,hde->e", heads, attention["output"]),
            stored["self_attn.o_proj.weight"] @ heads.reshape(-1),
            rtol=1e-4,
            atol=1e-4,
        )
        for ours in ("gate", "up", "down"):
            np.testing.assert_array_equal(mlp[ours], stored[f"mlp.{ours}_proj.weight"].T)
        for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            np.testing.assert_array_equal(block[ours]["scale"], stored[f"{theirs}.weight"])
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            np.testing.assert_array_equal(attention[ours]["scale"], stored[f"self_attn.{theirs}.weight"])
    np.testing.assert_array_equal(params["head"]["norm"]["scale"], tensors["model.norm.weight"])


def test_padding_of_the_vocabulary_is_zero(tmp_path: Path) -> None:
    tensors = stored_tensors(architecture())
    save_file(tensors, tmp_path / "model.safetensors")
    params = jax.tree.map(np.asarray, load(tmp_path, architecture()))
    np.testing.assert_array_equal(params["embed"]["table"][:VOCAB], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"]["weight"][:, :VOCAB], tensors["lm_head.weight"].T)
    assert params["embed"]["table"].shape == (64, HIDDEN) and not params["embed"]["table"][VOCAB:].any()
    assert params["head"]["weight"].shape == (HIDDEN, 64) and not params["head"]["weight"][:, VOCAB:].any()


MESHES = [
    {"tp": 2, "pp": 2, "dp": 2, "cp": 2},
    {"sp": 4, "pp": 4},  # the last rank's 4 vocabulary rows are all padding
    {"tp": 8},  # more ranks than kv heads
    {"dp": 16},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_holds_the_same_bits(tmp_path: Path, sizes: dict[str, int]) -> None:
    arch = architecture(attention_bias=True, qk_norm=True)
    save_file(stored_tensors(arch), tmp_path / "model.safetensors")
    shardings = on_mesh(FunctionalModel(Decoder(arch)), sizes)
    params = load(tmp_path, arch, shardings)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    assert_same(params, load(tmp_path, arch))


def test_a_split_inside_heads_is_cut_right(tmp_path: Path) -> None:
    arch = architecture()
    save_file(stored_tensors(arch), tmp_path / "model.safetensors")
    model = FunctionalModel(Decoder(arch))
    shardings = on_mesh(model, {"dp": 2, "tp": 2}, zero_stage=0)
    mesh = shardings["embed"]["table"].mesh
    shardings["layers"]["attention"]["query"] = NamedSharding(mesh, P(None, None, "tp", "dp"))
    shardings["layers"]["attention"]["output"] = NamedSharding(mesh, P(None, "tp", "dp", None))
    assert_same(load(tmp_path, arch, shardings), load(tmp_path, arch))


def test_a_device_reads_its_own_slice_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(stored_tensors(architecture()), tmp_path / "model.safetensors")
    reads: dict[str, list[int]] = {}

    class View:
        def __init__(self, name: str, view: Any):
            self.name, self.view = name, view
            self.get_shape, self.get_dtype = view.get_shape, view.get_dtype

        def __getitem__(self, index: Any) -> np.ndarray:
            part = self.view[index]
            reads.setdefault(self.name, []).append(part.size)
            return part

    open_tensors = hugging_face.open_tensors
    monkeypatch.setattr(
        hugging_face,
        "open_tensors",
        lambda folder, where: {name: View(name, view) for name, view in open_tensors(folder, where).items()},
    )
    load(tmp_path, architecture(), on_mesh(FunctionalModel(Decoder(architecture())), {"dp": 2, "pp": 2, "tp": 2}))
    # Each of the 8 devices has a quarter of the layers (pp 2, dp 2), and half of each of their weights (tp 2).
    assert reads["model.layers.3.mlp.gate_proj.weight"] == [MLP * HIDDEN // 2] * 2
    assert reads["model.layers.3.self_attn.q_proj.weight"] == [HEADS * HEAD_DIM * HIDDEN // 2] * 2
    assert reads["model.layers.3.self_attn.o_proj.weight"] == [HEADS * HEAD_DIM * HIDDEN // 2] * 2


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_dtypes_become_float32(tmp_path: Path, dtype: Any) -> None:
    tensors = stored_tensors(architecture(), dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    params = load(tmp_path, architecture())
    assert params["layers"]["mlp"]["up"].dtype == jnp.float32
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["up"][1], tensors["model.layers.1.mlp.up_proj.weight"].T.astype(np.float32)
    )


def test_several_files_with_an_index(tmp_path: Path) -> None:
    tensors = stored_tensors(architecture())
    save_file(tensors, tmp_path / "model.safetensors")
    whole = load(tmp_path, architecture())
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert has_weights(tmp_path)
    assert_same(load(tmp_path, architecture()), whole)


def test_tied_embeddings(tmp_path: Path) -> None:
    arch = architecture(tie_word_embeddings=True)
    tensors = stored_tensors(arch)
    save_file(tensors, tmp_path / "model.safetensors")
    params = load(tmp_path, arch)
    assert set(params["head"]) == {"norm"}

    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    assert_same(load(tmp_path, arch), params)

    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    assert load_problems(tmp_path, arch) == [
        "actor.model.model_path: FOLDER: lm_head.weight differs from model.embed_tokens.weight: set actor.model.tie_word_embeddings: False"
    ]


# --- Errors


def test_all_wrong_tensors_are_named_at_once(tmp_path: Path) -> None:
    tensors = stored_tensors(architecture())
    for layer in range(LAYERS):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        tensors[f"model.layers.{layer}.self_attn.q_norm.weight"] = np.ones(HEAD_DIM, np.float32)
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)  # harmless
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.ones((HIDDEN, KV_HEADS * HEAD_DIM), np.float32)
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.int8)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    where = "actor.model.model_path: FOLDER: "
    assert sorted(load_problems(tmp_path, architecture())) == sorted(
        [
            where
            + "model.layers.0.mlp.up_proj.weight (and 3 more layers) [48, 32] is missing: it is needed for layers/mlp/up",
            where + "model.layers.2.self_attn.k_proj.weight is [32, 24], expected [24, 32] for layers/attention/key",
            where + "model.norm.weight is I8, which is not supported: choose one of F64, F32, F16, BF16",
            where + "lm_head.weight [50, 32] is missing: it is needed for head/weight",
            where
            + "model.layers.0.self_attn.q_norm.weight (and 3 more layers) [6] is unexpected: the architecture in config.json has no such weight",
        ]
    )


def test_folders_without_readable_weights(tmp_path: Path) -> None:
    assert not has_weights(tmp_path)
    where = "actor.model.model_path: FOLDER: "
    none = where + "has neither model.safetensors nor model.safetensors.index.json"
    assert load_problems(tmp_path, architecture()) == [none]
    (tmp_path / "pytorch_model.bin").touch()
    assert has_weights(tmp_path)
    assert load_problems(tmp_path, architecture()) == [
        none + ": convert pytorch_model.bin with transformers' from_pretrained and save_pretrained"
    ]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "lost.safetensors"}}')
    assert load_problems(tmp_path, architecture())[0].startswith(
        where + "FOLDER/lost.safetensors cannot be read: FileNotFoundError"
    )
    index = "FOLDER/model.safetensors.index.json"
    for text, problem in {
        "{}": ": weight_map: None, expected the file of each tensor",
        '{"weight_map": ["a"]}': ": weight_map: ['a'], expected the file of each tensor",
        '{"weight_map": {"a": 5}}': ": weight_map: 5 is no file in this folder",
        '{"weight_map": {"a": "x\\u0000"}}': ": weight_map: 'x\\x00' is no file in this folder",
        '{"weight_map": {"a": "../other"}}': ": weight_map: '../other' is no file in this folder",
        "[]": " cannot be read: it holds no object: []",
        "[" * 100_000: " cannot be read: it is nested too deep",
        "{": " cannot be read: ",
    }.items():
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert load_problems(tmp_path, architecture())[0].startswith(where + index + problem)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    assert load_problems(tmp_path, architecture())[0].startswith(
        where + "FOLDER/model.safetensors cannot be read: SafetensorError"
    )


def test_a_model_of_ones_own_has_no_names(tmp_path: Path) -> None:
    shapes = {"embed": {"wte": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, "layers": {}, "head": {}}
    with pytest.raises(ConfigError, match=r"only supported for the built-in decoder, which has no embed/wte"):
        load_params(tmp_path, architecture(), shapes, shapes)


# --- Writing

FEATURES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32), "rope_theta": 5e5},
    "mistral": {"model_type": "mistral", "sliding_window": 16, "rms_norm_eps": 1e-5},
    "qwen2": {"model_type": "qwen2", "attention_bias": True, "sliding_window": 16},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", FEATURES)
def test_round_trip_keeps_every_bit_and_the_architecture(tmp_path: Path, family: str) -> None:
    arch, new = architecture(**FEATURES[family]), tmp_path / "new" / "folder"
    tensors = stored_tensors(arch)
    for value in tensors.values():
        value[0] = -0.0
    save_file(tensors, tmp_path / "model.safetensors")
    shardings = on_mesh(FunctionalModel(Decoder(arch)), {"dp": 2, "pp": 2, "tp": 2, "cp": 2})
    params = load(tmp_path, arch, shardings)
    save_params(new, params, arch, "float32")

    assert_same(load_file(new / "model.safetensors"), tensors)
    assert_same(load(new, arch, shardings), params)
    model = {"model_path": str(new), "make_vocab_size_divisible_by": 64}
    assert config_from_dict({"actor": {"model": model}}).architecture() == arch


def test_large_models_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = architecture()
    save_file(stored_tensors(arch), tmp_path / "model.safetensors")
    params = load(tmp_path, arch)
    save_params(tmp_path, params, arch)
    whole = load(tmp_path, arch)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == ml_dtypes.bfloat16
    monkeypatch.setattr(hugging_face, "MAX_FILE_BYTES", 20_000)
    save_params(tmp_path, params, arch)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"  # the single file is gone
    assert all(sum(x.nbytes for x in load_file(tmp_path / file).values()) <= 20_000 for file in files)
    assert_same(load(tmp_path, arch), whole)


def test_what_transformers_cannot_hold_is_refused(tmp_path: Path) -> None:
    arch = architecture(qk_norm=True, attention_bias=True)
    with pytest.raises(ConfigError, match=r"actor\.model\.add_qkv_bias"):
        save_params(tmp_path / "new", {}, arch)
    assert not (tmp_path / "new").exists()


# --- Against transformers itself

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 100.0}),
    "llama, plain rope": ("Llama", {"head_dim": None, "hidden_size": 64}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied, window": (
        "Qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {"rope_theta": 1e6}),
    "qwen3, tied": ("Qwen3", {"tie_word_embeddings": True}),
}


def decoder_logits(arch: Architecture, params: Any, tokens: np.ndarray) -> np.ndarray:
    model = FunctionalModel(Decoder(arch))
    info = TokenInfo(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), None)

    @jax.jit
    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        x = model.embed(params, tokens, info)
        x, _ = jax.lax.scan(lambda x, layer: (model.block(layer, x, info), None), x, params["layers"])
        return model.head(params, x)

    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(params, tokens))[..., : arch.vocab_size]


@pytest.mark.parametrize("reference", REFERENCES)
def test_logits_are_those_of_transformers(tmp_path: Path, reference: str) -> None:
    for name in ("torch", "transformers"):
        pytest.importorskip(
            name, reason=f"{name} is not installed: logits are not compared with transformers' {reference}"
        )
    import torch
    import transformers

    family, changes = REFERENCES[reference]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
    }
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    torch.manual_seed(0)
    with torch.no_grad():  # large enough for every part to matter, biases and scales too
        for name, parameter in theirs.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(VOCAB, size=(2, 64))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.std(expected) > 1

    model = {"model_path": str(tmp_path / "theirs"), "make_vocab_size_divisible_by": 64}
    arch = config_from_dict({"actor": {"model": model}}).architecture()
    assert arch is not None
    params = load(tmp_path / "theirs", arch)
    error = np.abs(decoder_logits(arch, params, tokens) - expected).max()
    print(f"{reference}: logits differ by {error:.1e} of {np.std(expected):.1f}")
    assert error < 1e-4

    save_params(tmp_path / "ours", params, arch, "float32")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert type(again) is type(theirs)
    assert not any(report.values()), report
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(tokens)).logits.numpy(), expected)
