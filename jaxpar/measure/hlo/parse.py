"""XLA's HLO text → instructions by computation.

The grammar is in openxla/xla `hlo/parser/hlo_parser.cc`: one instruction per line,
`%name = shape opcode(%operand, …), attribute=value, …`. A use of an operand does not show its shape, which has to be
looked up.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

# Bits of one number where the dtype's name does not show them. Types of fewer than 8 bits are packed.
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) (?:\(.*-> .*)?\{$")  # not all printers write the signature
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<= ]*)\]")
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_METADATA = re.compile(rf'metadata=\{{(?:[^{{}}"]|{_QUOTED})*\}}')


class Array(NamedTuple):
    """A dtype in XLA's spelling (`bf16`, `f8e4m3fn`, `pred`) and a shape, without the memory layout."""

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
    arguments: str  # the text in parentheses, such as a constant's value or a parameter's number
    attributes: str  # without the metadata, whose op_name may contain any text
    op_name: str
    frame_id: int = 0  # of the source line, see `jaxpar.measure.hlo.source`; 0: not known

    def attribute(self, pattern: str) -> str | None:
        """First group of `pattern` where it follows ", "; None if it does not occur."""
        found = re.search(rf", {pattern}", self.attributes)
        return found[1] if found else None

    def computations(self, *keys: str) -> list[str]:
        """Names of the computations in `key=%name` or `key={%name, …}`, in the order of `keys`."""
        texts = [self.attribute(rf"{key}=(\{{[^}}]*\}}|[^\s,]+)") or "" for key in keys]
        return [name for text in texts for name in re.findall(r"[^\s,{}%]+", text)]

    def dims(self, key: str) -> list[int]:
        """Integers of `key={1,2}`; [] without the key."""
        return [int(n) for n in re.findall(r"\d+", self.attribute(rf"{key}=\{{([\d,]*)\}}") or "")]


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def operands(self, instruction: Instruction) -> list[Array]:
        """The arrays that an instruction reads, tuples flattened."""
        return [array for name in instruction.operands for array in self.instructions[name].result]


class Module:
    """A whole program.

    Attributes:
      num_replicas, num_partitions: their product is the number of devices. Under `jax.jit` there is one replica.
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
            raise ValueError("the text has no ENTRY computation: it is not the text of an HLO module")


def _header(head: str, key: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", head)
    return int(found[1]) if found else 1


def _instruction(name: str, text: str) -> Instruction:
    """Parses `shape opcode(arguments), attributes`. Tuples and memory layouts such as {1,0:T(8,128)} contain parentheses."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = opening + _closing(rest[opening:])
    attributes = rest[closing:]
    metadata = _METADATA.search(attributes)
    op_name = re.search(rf"op_name=({_QUOTED})", metadata[0]) if metadata else None
    frame = re.search(r"\bstack_frame_id=(\d+)", metadata[0]) if metadata else None
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
        frame_id=int(frame[1]) if frame else 0,
    )


def _closing(text: str) -> int:
    """Index after the parenthesis that closes the one at index 0."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"unclosed parenthesis in {text[:80]!r}")


def _operands(arguments: str) -> tuple[str, ...]:
    """Names of the operands. Some printers omit the percent signs, some write each operand's shape before its name."""
    if "%" in arguments:
        return tuple(re.findall(r"%([^\s,()]+)", arguments))
    return tuple(part.split()[-1] for part in re.sub(r"/\*.*?\*/", "", arguments).split(",") if part.strip())


def _arrays(shape: str) -> tuple[Array, ...]:
    # A dynamic dimension is written as its bound, `<=8`.
    return tuple(Array(d, tuple(int(n) for n in re.findall(r"\d+", dims))) for d, dims in _ARRAY.findall(shape))
