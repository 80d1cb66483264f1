"""XLA's HLO text → instructions by computation.

The grammar is that of openxla/xla `hlo/parser/hlo_parser.cc`: one instruction a line,
`%name = shape opcode(%operand, …), attribute=value, …`. An operand's shape is not written at its use; it is looked up.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

# Bytes of one number, `pred` included; types of fewer than 8 bits are packed.
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) (?:\(.*-> .*)?\{$")  # the signature is not always printed
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<= ]*)\]")
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_METADATA = re.compile(rf'metadata=\{{(?:[^{{}}"]|{_QUOTED})*\}}')


class Array(NamedTuple):
    """A dtype in XLA's spelling (`bf16`, `f8e4m3fn`, `pred`) and a shape; the layout is left out."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits[0]) if digits else 0
        return self.size * bits // 8


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    result: tuple[Array, ...]  # the leaves of a tuple, in order
    operands: tuple[str, ...]
    arguments: str  # what stands in the parentheses: a constant's value, a parameter's number
    attributes: str  # without metadata, whose op_name may hold anything
    op_name: str

    def attribute(self, pattern: str) -> str | None:
        """First group of `pattern` where it follows ", "; None without it."""
        found = re.search(rf", {pattern}", self.attributes)
        return found[1] if found else None

    def computations(self, *keys: str) -> list[str]:
        """Names of computations in `key=%name` or `key={%name, …}`, keys in the order given."""
        texts = [self.attribute(rf"{key}=(\{{[^}}]*\}}|[^\s,]+)") or "" for key in keys]
        return [name for text in texts for name in re.findall(r"[^\s,{}%]+", text)]

    def dims(self, key: str) -> list[int]:
        """Integers of `key={1,2}`; none without the key."""
        return [int(n) for n in re.findall(r"\d+", self.attribute(rf"{key}=\{{([\d,]*)\}}") or "")]


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def operands(self, instruction: Instruction) -> list[Array]:
        """The arrays that an instruction reads, tuples taken apart."""
        return [array for name in instruction.operands for array in self.instructions[name].result]


class Module:
    """A whole program.

    Attributes:
      num_replicas, num_partitions: devices are their product; under `jax.jit` all are partitions.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        head = text[: text.find("\n")]
        self.num_partitions = _header(head, "num_partitions")
        self.num_replicas = _header(head, "replica_count")
        here: Computation | None = None
        for line in text.splitlines():
            if here is None:
                if found := _COMPUTATION.match(line):
                    here = Computation(found[2])
                    self.computations[here.name] = here
                    self.entry = here.name if found[1] else self.entry
            elif line.startswith("}"):
                here = None
            elif found := _INSTRUCTION.match(line):
                instruction = _instruction(found[2], found[3])
                here.instructions[instruction.name] = instruction
                here.root = instruction.name if found[1] else here.root
        if not self.entry:
            raise ValueError("no ENTRY computation: not the text of an HLO module")


def _header(head: str, key: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", head)
    return int(found[1]) if found else 1


def _instruction(name: str, text: str) -> Instruction:
    """`shape opcode(arguments), attributes`: shapes of tuples and layouts such as {1,0:T(8,128)} hold parentheses."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = opening + _closing(rest[opening:])
    attributes = rest[closing:]
    metadata = _METADATA.search(attributes)
    op_name = re.search(rf"op_name=({_QUOTED})", metadata[0]) if metadata else None
    arguments = rest[opening + 1 : closing - 1]
    opcode = rest[:opening]
    return Instruction(
        name=name,
        opcode=opcode,
        result=_arrays(shape),
        operands=() if opcode in ("constant", "parameter", "iota") else _operands(arguments),
        arguments=arguments,
        attributes=_METADATA.sub("", attributes),
        op_name=op_name[1].strip('"') if op_name else "",
    )


def _closing(text: str) -> int:
    """Index after the parenthesis that closes the one at index 0."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _operands(arguments: str) -> tuple[str, ...]:
    """Names only. Some printers leave out the percent signs, some write each operand's shape before it."""
    if "%" in arguments:
        return tuple(re.findall(r"%([^\s,()]+)", arguments))
    return tuple(part.split()[-1] for part in re.sub(r"/\*.*?\*/", "", arguments).split(",") if part.strip())


def _arrays(shape: str) -> tuple[Array, ...]:
    # A dynamic dimension is written with its bound, `<=8`.
    return tuple(Array(d, tuple(int(n) for n in re.findall(r"\d+", dims))) for d, dims in _ARRAY.findall(shape))
