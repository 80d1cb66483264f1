"""How often the loops of a program run."""

import re
from collections import defaultdict

from jaxpar.measure.hlo.parse import Computation, Instruction, Module

_Site = tuple[Computation, Instruction]


class Loops:
    """Trip counts of a module's `while` instructions."""

    def __init__(self, module: Module):
        self._computations = module.computations
        self._call_sites: dict[str, list[_Site]] = defaultdict(list)
        for computation in module.computations.values():
            for instruction in computation.instructions.values():
                for callee in instruction.computations("calls", "to_apply", "body", "condition"):
                    self._call_sites[callee].append((computation, instruction))

    def trip_count(self, here: Computation, loop: Instruction) -> int | None:
        """How often the body of a `while` in computation `here` runs; None if that depends on data.

        XLA states it (`known_trip_count`) if its own analysis finds it. Otherwise it is known if the condition compares
        two scalars that start at constants and to which each iteration adds a constant (0 in the case of a bound).
        """
        if known := re.search(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)', loop.attributes):
            return int(known[1])
        (condition,) = loop.computations("condition")
        where, compare = self._source(self._computations[condition], self._computations[condition].root)
        if compare.opcode != "compare":
            return None
        left, right = (self._progression(here, loop, self._source(where, name)) for name in compare.operands)
        if left is None or right is None:
            return None
        # left[0] + i·left[1] < right[0] + i·right[1] holds for i < gap / closing.
        gap, closing = right[0] - left[0], left[1] - right[1]
        direction = compare.attribute(r"direction=(\w+)") or ""
        if direction in ("GT", "GE"):
            gap, closing = -gap, -closing
        if direction == "NE":
            return gap // closing if closing and gap % closing == 0 and gap // closing >= 0 else None
        if direction not in ("LT", "LE", "GT", "GE"):
            return None
        gap += direction in ("LE", "GE")
        if gap <= 0:
            return 0
        return -(-gap // closing) if closing > 0 else None

    def _progression(self, here: Computation, loop: Instruction, scalar: _Site) -> tuple[int, int] | None:
        """A scalar of the condition as (value before the first iteration, what each iteration adds)."""
        condition, body = (self._computations[name] for name in loop.computations("condition", "body"))
        if (value := _constant(scalar[1])) is not None:
            return value, 0
        index = _index_in_tuple(scalar, condition)
        before, after = self._source(here, loop.operands[0]), self._source(body, body.root)
        if index is None or before[1].opcode != "tuple" or after[1].opcode != "tuple":
            return None
        start = _constant(self._source(before[0], before[1].operands[index])[1])
        step = self._step(body, index, self._source(after[0], after[1].operands[index]))
        return None if start is None or step is None else (start, step)

    def _step(self, body: Computation, index: int, update: _Site) -> int | None:
        """What an iteration adds to the loop's value number `index`, whose next value is `update`."""
        if _index_in_tuple(update, body) == index:
            return 0
        if update[1].opcode not in ("add", "subtract"):
            return None
        first, second = (self._source(update[0], name) for name in update[1].operands)
        if update[1].opcode == "add" and _constant(first[1]) is not None:
            first, second = second, first
        step = _constant(second[1])
        if step is None or _index_in_tuple(first, body) != index:
            return None
        return step if update[1].opcode == "add" else -step

    def _source(self, here: Computation, name: str) -> _Site:
        """The origin of a value, traced back through copies, tuples, and computations that have a single caller.

        XLA's CPU compiler puts loops into calls of their own, and a comparison or an addition into a fusion.
        """
        while True:
            instruction = here.instructions[name]
            sites = self._call_sites[here.name]
            if instruction.opcode in ("copy", "bitcast", "convert"):
                name = instruction.operands[0]
            elif instruction.opcode in ("fusion", "call"):
                here = self._computations[instruction.computations("calls", "to_apply")[0]]
                name = here.root
            elif instruction.opcode == "parameter" and len(sites) == 1 and sites[0][1].opcode in ("fusion", "call"):
                here, caller = sites[0]
                name = caller.operands[int(instruction.arguments)]
            elif instruction.opcode == "get-tuple-element":
                above, source = self._source(here, instruction.operands[0])
                if source.opcode != "tuple":
                    return here, instruction
                here, name = above, source.operands[_index(instruction)]
            else:
                return here, instruction


def _constant(instruction: Instruction) -> int | None:
    whole = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments)
    return int(instruction.arguments) if whole else None


def _index(instruction: Instruction) -> int:
    return int(instruction.attribute(r"index=(\d+)") or 0)


def _index_in_tuple(value: _Site, computation: Computation) -> int | None:
    """Index of a value that `computation`, a loop's body or condition, reads from the loop's tuple; otherwise None."""
    here, instruction = value
    return _index(instruction) if here is computation and instruction.opcode == "get-tuple-element" else None
