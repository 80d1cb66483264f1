"""tests/tools/same_programs.py, which shows that a refactor changes no program: what it ignores and what it finds."""

import re
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import pytest
from support import QUICK
from tools import same_programs
from tools.same_programs import difference, normalized

import jaxpar
from jaxpar.pipeline.schedule import SCHEDULES


@pytest.fixture(autouse=True)
def _source_lines():
    """Puts source lines into the metadata of programs, as in those that the tool compiles."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 10)
    yield
    jax.config.update("jax_traceback_in_locations_limit", limit)


def compiled(function) -> str:
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    return jax.jit(function).lower(x).compile(compiler_options=QUICK).as_text()


def before(x):
    with jax.named_scope("attention"):
        x = jnp.sin(x @ x)
    return x * 2.5 + 1.5


def after(y):
    """The same computation with other names and source lines."""

    def inner(product):
        return jnp.sin(product)

    with jax.named_scope("ring"):
        y = inner(y @ y)
    return y * 2.5 + 1.5


def changed(x):
    with jax.named_scope("attention"):
        x = jnp.sin(x @ x)
    return x * 2.5 + 1.625


def test_names_and_metadata_are_overlooked():
    one, other = compiled(before), compiled(after)
    assert "attention" in one and "ring" in other and "metadata={" in one and "before" in one and one != other
    assert normalized(one).lines == normalized(other).lines
    assert difference(one, other) is None
    text = "\n".join(normalized(one).lines)
    assert "metadata" not in text and "attention" not in text and "before" not in text
    assert "f32[4,4]" in text and "dot" in text and "2.5" in text  # what is computed remains


def test_a_changed_constant_is_found_with_its_line_and_origin():
    one, other = compiled(before), compiled(changed)
    found = difference(one, other)
    assert found is not None
    at = next(i for i, (a, b) in enumerate(zip(normalized(one).lines, normalized(other).lines, strict=True)) if a != b)
    assert f"the first difference is in line {at + 1}:" in found
    minus, plus = (next(line for line in found.splitlines() if line.lstrip().startswith(sign)) for sign in "-+")
    assert "constant(1.5)" in minus and "constant(1.625)" in plus
    assert "jit(before)" in found and "jit(changed)" in found  # op_name of the line, or of the one before it


def test_an_instruction_more_is_found():
    found = difference(compiled(before), compiled(lambda x: before(x) + jnp.cos(x)))
    assert found is not None and "the first difference is in line" in found
    ended = difference("ENTRY %a () -> f32[] {\n%b = f32[] parameter(0)\n}", "ENTRY %a () -> f32[] {")
    assert ended == (
        "3 and 1 lines; the first difference is in line 2:\n"
        "    - %1 = f32[] parameter(0)\n      from an unknown line\n"
        "    + the program has ended"
    )


def test_names_are_numbered_in_the_order_of_the_program():
    """Two swapped operands are a difference, although only names differ."""
    start = "ENTRY %f (p: f32[], q: f32[]) -> f32[] {\n%p = f32[] parameter(0)\n%q = f32[] parameter(1)\n"
    one, other = (start + f"ROOT %r = f32[] subtract({operands})\n}}" for operands in ("%p, %q", "%q, %p"))
    assert difference(one, re.sub(r"\bq\b", "right", re.sub(r"\bp\b", "left", one))) is None
    assert "subtract(%2, %1)" in difference(one, other)


def values(setting: str) -> set[str]:
    """The values of a setting in the list of programs."""
    lines = [line for spec in same_programs.programs().values() for line in spec.settings]
    return {line.partition("=")[2] for line in lines if line.startswith(f"{setting}=")}


def choices(setting: str) -> set[str]:
    """The values that the config allows for a setting."""
    kind: Any = jaxpar.Config
    for key in setting.split("."):
        kind = kind.model_fields[key].annotation
    literal = kind if get_origin(kind) is Literal else next(k for k in get_args(kind) if get_origin(k) is Literal)
    return set(map(str, get_args(literal)))


def test_the_programs_have_every_schedule_zero_stage_and_kind_of_context_parallelism():
    assert values("actor.model.pipeline_schedule") == set(SCHEDULES)
    for setting in ("actor.optim.zero_stage", "actor.model.cp_comm_type"):
        assert values(setting) == choices(setting) and len(choices(setting)) == 4


def test_each_program_is_kept_in_a_file_of_its_own(tmp_path):
    names = [*same_programs.programs(), *same_programs.CLUSTERS]
    assert len({same_programs._file(tmp_path, name) for name in names}) == len(names)
