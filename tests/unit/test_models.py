"""What a user may give as a model, and what is said about the rest: each a silent failure, or an error deep inside jax, before."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import user_models
from flax import nnx
from user_models import EMBED, VOCAB, Block, NormAndLogits, TokenAndPosition

import jaxpar
from jaxpar.attention import reference_attention
from jaxpar.config import ConfigError
from jaxpar.models import FunctionalModel
from jaxpar.models.split_check import check_split_sequence
from jaxpar.parallel.randomness import TokenKey, token_keys


def stack(block=Block, embed=TokenAndPosition, head=NormAndLogits, **more):
    return jaxpar.Stack(embed, block, head, 4, **more)


def problem(model, check=lambda model: None) -> str:
    """The one line that is said about a model."""
    with pytest.raises(ConfigError) as caught:
        functional = FunctionalModel(model)
        run_block(functional)
        check(functional)
    (line,) = caught.value.problems
    return line


def run_block(model):
    tokens = jnp.zeros((2, 8), jnp.int32)
    info = jaxpar.TokenInfo(tokens, tokens, jnp.int32(0))
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), model.shapes["layers"])

    def run(params):
        x = model.embed(params, tokens, info)
        auxiliary = {}
        if model.num_blocks:
            x, auxiliary = model.block_and_auxiliary(params["layers"], x, info)
        return model.head(params, x), auxiliary

    return jax.eval_shape(run, {**model.shapes, "layers": layer})


class With(nnx.Module):
    """A block with something more, which `use` may change its output by."""

    def __init__(self, rngs, make, use):
        self.block, self.use = Block(rngs), nnx.static(use)
        self.extra = make(rngs)

    def __call__(self, x, info):
        return self.use(self, self.block(x, info), info)


def with_extra(make=lambda rngs: None, use=lambda self, x, info: x):
    return lambda rngs: With(rngs, make, use)


# --- state --------------------------------------------------------------------------------------------------------------


def test_running_statistics_are_refused_by_name():
    line = problem(stack(with_extra(lambda rngs: nnx.BatchNorm(EMBED, rngs=rngs))))
    assert "layers holds running statistics: extra/mean (BatchStat), extra/var (BatchStat)" in line

    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x, info):
            return nn.BatchNorm(use_running_average=True)(x)

    assert "layers holds running statistics: batch_stats" in problem(stack(Normalized()))


def test_constants_of_every_sort_are_taken():
    def use(self, x, info):
        return x * self.extra["array"] + self.extra["numpy"] + self.extra["variable"][...]

    def make(rngs):
        return nnx.Dict(array=jnp.arange(1.0, 1 + EMBED), numpy=np.ones(EMBED), variable=nnx.Cache(jnp.ones(EMBED)))

    run_block(FunctionalModel(stack(with_extra(make, use))))


def test_a_constant_that_changes_is_refused():
    def use(self, x, info):
        self.extra[...] = self.extra[...] + 1
        return x

    line = problem(stack(with_extra(lambda rngs: nnx.Cache(jnp.zeros(3)), use)))
    assert "layers changes extra (Cache) when it is called, and the change would be lost" in line


def test_a_random_constant_is_refused():
    line = problem(stack(with_extra(lambda rngs: nnx.Variable(jax.random.normal(rngs.params(), (3,))))))
    assert "layers/extra is random, and no nnx.Param" in line


# --- what is given ------------------------------------------------------------------------------------------------------


def test_an_nnx_module_with_its_weights():
    with nnx.use_eager_sharding(False):
        module = user_models.NoStack(nnx.Rngs(0))
    model = FunctionalModel(module)
    expected = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    assert all(map(jnp.array_equal, jax.tree.leaves(model.own_params), expected))
    assert jax.tree.structure(model.own_params) == jax.tree.structure(model.shapes)


def test_what_is_no_model():
    class Linen(nn.Module):
        pass

    assert "Linen is a class of flax.linen: give an instance, Linen(…)" in problem(Linen)
    assert "a str is no model" in problem("GPT")
    assert "layers is the class Linen: give an instance" in problem(stack(lambda rngs: Linen))
    assert "head is a list, and no module" in problem(stack(head=lambda rngs: []))
    lazy = lambda rngs: nnx.bridge.ToNNX(user_models.LinenBlock(), rngs=rngs)  # noqa: E731
    assert "ToNNX without weights: give the Linen module itself, LinenBlock(…)" in problem(stack(lazy))


def test_a_block_that_changes_the_shape():
    line = problem(stack(with_extra(use=lambda self, x, info: x[..., :3])))
    assert "a block maps activations float32[2, 8, 64] to float32[2, 8, 3]" in line


@pytest.mark.parametrize("count", [5, 6, 7])
def test_the_shortest_pattern_of_blocks_is_found(count):
    def block(rngs, layer):
        return Block(rngs, (reference_attention, user_models.ring_attention)[layer % 3 == 2])

    model = FunctionalModel(jaxpar.Stack(TokenAndPosition, block, NormAndLogits, count))
    assert (model.period, model.num_layers) == (3, -(-count // 3))


def test_blocks_that_differ_without_a_pattern_cannot_be_pipelined():
    def block(rngs, layer):
        return with_extra(lambda rngs: nnx.Variable(jnp.full(3, 1.0 * layer)))(rngs)

    model = FunctionalModel(jaxpar.Stack(TokenAndPosition, block, NormAndLogits, 4))
    assert (model.period, model.num_layers) == (4, 1)
    config = jaxpar.config_from_dict({
        "cluster": {"num_gpus_per_node": 2},
        "runner": {"seq_length": 32, "max_steps": 1},
        "actor": {"micro_batch_size": 1, "global_batch_size": 4, "optim": {"lr": 1e-3},
                  "model": {"pipeline_model_parallel_size": 2, "precision": "fp32"}},
    })  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"has 4 blocks that repeat a pattern of 4 \(blocks 0 and 1 differ in the constant extra\)"
    ):
        jaxpar.Trainer(config, jaxpar.Stack(TokenAndPosition, block, NormAndLogits, 4))


# --- names of dimensions ------------------------------------------------------------------------------------------------


def linear(rngs):
    return with_extra(lambda rngs: nnx.Linear(EMBED, 96, use_bias=False, rngs=rngs))(rngs)


def test_dimensions_by_path_win_over_those_on_the_parameter():
    model = FunctionalModel(stack(linear, dims={"*extra/kernel": ("embed", "mlp"), "head/logits/*": (None, "vocab")}))
    assert model.dims["layers"]["extra"]["kernel"] == ("layers", "embed", "mlp")
    assert model.dims["head"]["logits"]["kernel"] == (None, "vocab")


def test_dimensions_by_path_that_are_wrong():
    assert "'*extras/kernel': no parameter has such a path" in problem(
        stack(linear, dims={"*extras/kernel": ("embed",)})
    )
    line = problem(stack(linear, dims={"*extra/*": ("embed",)}))
    assert "layers/extra/kernel [64, 96] has 2 dimensions (blocks leave out the dimension of layers)" in line
    line = problem(stack(linear, dims={"*extra/*": ("embed", "mlp"), "layers/extra/kernel": (None, None)}))
    assert "'layers/extra/kernel': all that it fits is taken by '*extra/*' before it" in line


def test_a_table_of_other_names():
    def block(rngs):
        initializer = nnx.with_partitioning(nnx.initializers.ones, ("model", "wide"))
        return with_extra(lambda rngs: nnx.Linear(EMBED, 96, use_bias=False, kernel_init=initializer, rngs=rngs))(rngs)

    model = FunctionalModel(stack(block, names={"wide": "mlp", "model": None}))
    assert model.dims["layers"]["extra"]["kernel"] == ("layers", None, "mlp")
    assert "names: 'wider' stands on no parameter" in problem(stack(block, names={"wider": "mlp"}))


def test_suggestions_are_printed_and_fit(capsys):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, info):
            q, k, v = (nn.DenseGeneral((8, 8), name=name)(x) for name in ("query", "key", "value"))
            y = nn.DenseGeneral(EMBED, axis=(-2, -1), name="out")(q + k + v)
            return nn.Dense(EMBED, name="down_proj")(nn.Dense(96, name="up_proj")(y))

    found = jaxpar.suggest_dims(stack(Plain()))
    assert "'layers/query/kernel': ('embed', 'heads', 'head_dim')," in capsys.readouterr().out
    assert found["layers/out/kernel"] == ("heads", "head_dim", "embed")
    assert found["layers/up_proj/kernel"] == ("embed", "mlp") and found["layers/down_proj/kernel"] == ("mlp", "embed")
    assert FunctionalModel(stack(Plain(), dims=found)).dims["layers"]["key"]["kernel"][2] == "kv_heads"


# --- auxiliary outputs --------------------------------------------------------------------------------------------------


def test_auxiliary_outputs_that_nothing_takes():
    returned = with_extra(use=lambda self, x, info: (x, {"load": x.mean(-1)}))
    assert "gives the auxiliary output 'load', and nothing takes it" in problem(stack(returned))

    def sow(self, x, info):
        self.sow(nnx.Intermediate, "load", x.mean(-1))
        return x

    assert "gives the auxiliary output 'load', and nothing takes it" in problem(stack(with_extra(use=sow)))
    assert run_block(FunctionalModel(stack(with_extra(use=sow), auxiliary={"load": None})))[1] == {}


def test_auxiliary_outputs_of_a_shape_or_place_or_name_that_cannot_be():
    scalar = with_extra(use=lambda self, x, info: (x, {"load": x.mean()}))
    assert "'load' has the shape []" in problem(stack(scalar, auxiliary={"load": 1.0}))
    assert "auxiliary: 'loss' is the name of another metric" in problem(stack(auxiliary={"loss": 1.0}))

    class Sowing(TokenAndPosition):
        def __call__(self, tokens, info):
            self.sow(nnx.Intermediate, "load", tokens)
            return super().__call__(tokens, info)

    assert "the embed sows 'load', which nothing takes" in problem(stack(embed=Sowing))


# --- randomness ---------------------------------------------------------------------------------------------------------


def test_random_numbers_that_would_depend_on_the_layout():
    key = TokenKey(token_keys(jnp.zeros(2, jnp.uint32), 1, 4, 8)[0], 4, 8).key
    for shape in ((), (4, 8), (4, 8, 3), (4, 1, 3), (32, 5)):
        assert jax.random.normal(key, shape).shape == shape
    with pytest.raises(ValueError, match=r"shape \[4, 3\]: they would depend on the layout"):
        jax.random.normal(key, (4, 3))


def test_a_head_with_dropout():
    class Dropping(NormAndLogits):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    assert "the head holds a stream of random numbers, dropout/rngs" in problem(stack(head=Dropping))


def test_documents_that_a_model_does_not_know():
    def alone(rngs):
        return Block(rngs, lambda *qkv, segment_ids: user_models.ring_attention(*qkv))

    assert FunctionalModel(stack()).knows_documents and not FunctionalModel(stack(alone)).knows_documents
    config = {
        "cluster": {"num_gpus_per_node": 1},
        "runner": {"seq_length": 32, "max_steps": 1},
        "actor": {"micro_batch_size": 1, "global_batch_size": 4, "optim": {"lr": 1e-3}, "model": {"precision": "fp32"}},
    }
    (warning,) = jaxpar.Trainer(jaxpar.config_from_dict(config), stack(alone)).warnings
    assert "does not use info.segment_ids" in warning and "data.reset_attention_mask: False" in warning
    for kept in (stack(), config | {"data": {"reset_attention_mask": False}}):
        known = isinstance(kept, jaxpar.Stack)
        trainer = jaxpar.Trainer(jaxpar.config_from_dict(config if known else kept), kept if known else stack(alone))
        assert not trainer.warnings


def test_a_parameter_that_changes_is_refused():
    def use(self, x, info):
        self.extra.kernel[...] = self.extra.kernel[...] * 2
        return x

    make = lambda rngs: nnx.Linear(2, 2, use_bias=False, rngs=rngs)  # noqa: E731
    assert "layers changes extra/kernel (Param) when it is called" in problem(stack(with_extra(make, use)))


# --- a part of the sequence ---------------------------------------------------------------------------------------------


def embed_with(positions):
    class Embed(TokenAndPosition):
        def __call__(self, tokens, info):
            return self.tokens(tokens) + positions(self, tokens)

    return Embed


SPLIT = {
    "plain attention": (user_models.GPT(reference_attention), "an arange of their number"),
    "positions": (
        stack(embed=embed_with(lambda self, tokens: self.positions(jnp.arange(tokens.shape[1])))),
        "take positions from info.positions",
    ),
    "a table": (
        stack(embed=embed_with(lambda self, tokens: self.positions.embedding[...][: tokens.shape[1]])),
        "slice cuts a table to their number",
    ),
    "a mean": (stack(with_extra(use=lambda self, x, info: x + x.mean(1, keepdims=True))), "info.mean_over_sequence"),
    "a shift": (
        stack(with_extra(use=lambda self, x, info: x + jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1])),
        "pad mixes them",
    ),
    "no attention": (user_models.GPT(lambda q, k, v, **_: q), "never calls jaxpar.attention.attention"),
}


@pytest.mark.parametrize("name", SPLIT)
def test_models_that_would_be_wrong_on_a_part_of_the_sequence(name):
    model, expected = SPLIT[name]
    with pytest.raises(ConfigError) as caught:
        check_split_sequence(FunctionalModel(model), 2, 32)
    assert expected in caught.value.problems[0] and "context_parallel_size: 2" in caught.value.problems[0]
    if name != "no attention":
        assert ".py:" in caught.value.problems[0]
    functional = FunctionalModel(model)
    functional.mixes_tokens_itself = True
    check_split_sequence(functional, 2, 32)


def test_models_that_are_right_on_a_part_of_the_sequence():
    mean = with_extra(use=lambda self, x, info: x + info.mean_over_sequence(x)[:, None])
    for model in (user_models.GPT(), user_models.LinenGPT(), stack(mean), lambda rngs: user_models.NoStack(rngs)):
        check_split_sequence(FunctionalModel(model), 2, 32)
        assert FunctionalModel(model).vocab_size == VOCAB
