"""Whether a model is right where each cp rank has only a part of the sequence.

`jaxpar.attention` knows of the other ranks. All else that mixes tokens, counts them or cuts a table to their number sees a
part for the whole, and gives wrong numbers without a word. So the model is traced at two lengths. What differs between the two
programs are the dimensions of tokens, and every operation along them is looked at.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.attention.names import CORE_ATTENTION
from jaxpar.config import ConfigError
from jaxpar.models.functional import FunctionalModel
from jaxpar.models.protocol import ACROSS_SEQUENCE, TokenInfo
from jaxpar.parallel.randomness import TokenKey

ALONG_AXIS = {"cumsum": "axis", "cumprod": "axis", "cummax": "axis", "cummin": "axis", "cumlogsumexp": "axis"}
ALONG_AXES = {"argmax": "axes", "argmin": "axes", "rev": "dimensions"}
POSITIONS = "take positions from info.positions"
ATTEND = "attend with jaxpar.attention.attention"
MEAN = "for a mean over the sequence, use info.mean_over_sequence"


def check_split_sequence(model: FunctionalModel, cp: int, seq_length: int) -> None:
    """Raises ConfigError if the model would be wrong with `cp` ranks, as far as its program shows."""
    if model.explicit or model.mixes_tokens_itself:
        return
    programs = [_program(model, seq_length), _program(model, seq_length // 2)]
    found = list(dict.fromkeys(_findings(*programs)))[:3]
    if found:
        raise ConfigError(
            [
                f"actor.model.context_parallel_size: {cp}, so a block sees {seq_length} / {cp} = {seq_length // cp} tokens, but "
                f"{problem}. If this is right on a part of the sequence, say so: mixes_tokens_itself = True on the model"
                for problem in found
            ]
        )
    if not any(_scopes(eqn, {CORE_ATTENTION}) for eqn in _all_equations(programs[0])):
        raise ConfigError(
            f"actor.model.context_parallel_size: {cp}, but the model never calls jaxpar.attention.attention, so tokens of "
            f"different ranks would not see each other: {ATTEND}, or say that it is right so: mixes_tokens_itself = True on the "
            f"model"
        )


def _program(model: FunctionalModel, seq: int) -> Any:
    """The traced forward pass of one row of `seq` tokens."""

    def run(params: Any, tokens: jax.Array, inputs: Any, words: jax.Array, layer: jax.Array) -> Any:
        info = TokenInfo(tokens, tokens, layer, inputs, TokenKey(words, 1, seq))
        x = model.embed(params, tokens, info)
        auxiliary: Any = {}
        if model.num_blocks:
            x, auxiliary = model.block_and_auxiliary(params["layers"], x, info)
        return model.head(params, x), auxiliary

    shape = jax.ShapeDtypeStruct
    one_layer = jax.tree.map(lambda x: shape(x.shape[1:], x.dtype), model.shapes["layers"])
    inputs = {name: shape((1, seq, *x.shape), x.dtype) for name, x in model.inputs.items()}
    scalars = shape((5,), jnp.uint32), shape((), jnp.int32)
    params = {**model.shapes, "layers": one_layer}
    return jax.make_jaxpr(run)(params, shape((1, seq), jnp.int32), inputs, *scalars).jaxpr


def _findings(a: Any, b: Any, caller: str = "in a library") -> Iterator[str]:
    """What is wrong along the dimensions in which the two programs differ. Nothing, if they differ in their operations.

    Args:
      caller: the line that calls the programs.
    """
    if len(a.eqns) != len(b.eqns):
        return
    for one, other in zip(a.eqns, b.eqns, strict=True):
        if one.primitive is not other.primitive or _scopes(one, {CORE_ATTENTION, ACROSS_SEQUENCE}):
            continue
        place = _place(one) or caller
        if problem := _problem(one, other):
            yield f"{problem} ({place})"
        for one_inner, other_inner in zip(_inner(one), _inner(other), strict=False):
            yield from _findings(one_inner, other_inner, place)


def _problem(one: Any, other: Any) -> str | None:
    name, params = one.primitive.name, one.params
    inputs = [_token_dimensions(x, y) for x, y in zip(one.invars, other.invars, strict=False)]
    outputs = [_token_dimensions(x, y) for x, y in zip(one.outvars, other.outvars, strict=False)]
    mixes = f"{name} mixes them: {ATTEND}; {MEAN}"
    if name == "iota" and outputs[0]:
        return f"it counts them itself, by an arange of their number: {POSITIONS}, and {ATTEND}, which needs no mask"
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return mixes if inputs[0] & set(contracted) else None
    if name.startswith("reduce_") and name != "reduce_precision" and "axes" in params:
        return mixes if inputs[0] & set(params["axes"]) else None
    if name in ALONG_AXIS:
        return mixes if params[ALONG_AXIS[name]] in inputs[0] else None
    if name in ALONG_AXES:
        return mixes if inputs[0] & set(params[ALONG_AXES[name]]) else None
    if name in ("slice", "dynamic_slice"):
        if outputs[0] - inputs[0]:
            return f"{name} cuts a table to their number: index the table with info.positions"
        x, y = one.invars[0].aval.shape, one.outvars[0].aval.shape
        return mixes if any(x[i] != y[i] for i in inputs[0]) else None
    if name in ("concatenate", "pad") and outputs[0]:
        x, y = one.invars[0].aval.shape, one.outvars[0].aval.shape
        return mixes if any(x[i] != y[i] for i in outputs[0]) else None
    if name == "scan" and params["length"] != other.params["length"]:
        return mixes
    if name == "conv_general_dilated":
        return mixes if inputs[0] & set(params["dimension_numbers"].lhs_spec[2:]) else None
    return None


def _token_dimensions(x: Any, y: Any) -> set[int]:
    """Dimensions that have another size at the other length."""
    shapes = [getattr(getattr(v, "aval", None), "shape", ()) for v in (x, y)]
    return {i for i, (a, b) in enumerate(zip(*shapes, strict=False)) if a != b}


def _scopes(eqn: Any, names: set[str]) -> bool:
    return any(name in str(eqn.source_info.name_stack) for name in names)


def _inner(eqn: Any) -> Iterator[Any]:
    """The programs that an equation calls."""
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _all_equations(program: Any) -> Iterator[Any]:
    for eqn in program.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from _all_equations(inner)


def _place(eqn: Any) -> str | None:
    """The line of the user's that made an equation."""
    for frame in eqn.source_info.traceback.frames if eqn.source_info.traceback else ():
        if not any(part in frame.file_name for part in ("/jax/", "/flax/", "/jaxpar/models/", "/jaxpar/parallel/")):
            return f"{frame.file_name}:{frame.line_num}"
    return None
