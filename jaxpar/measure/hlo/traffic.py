"""Bytes that one instruction reads from and writes to the device's memory."""

from collections import defaultdict

from jaxpar.measure.hlo.parse import Array, Computation, Instruction, Module

# They compute nothing and move nothing: names, constants, other views of the same bytes.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all", "partition-id", "replica-id",
    "add-dependency", "opt-barrier",
}  # fmt: skip
_VIEWS = ("bitcast", "copy", "reshape", "convert")
_SLICES = ("dynamic-slice", "slice", "gather")


def bytes_moved(module: Module, here: Computation, instruction: Instruction) -> int:
    """Bytes of operands and results. Of a large array that is only sliced or updated in place, the slice counts."""
    operands, opcode = here.operands(instruction), instruction.opcode.removesuffix("-start")
    if opcode == "fusion":
        return _fusion_bytes(module.computations[instruction.computations("calls")[0]])
    if opcode == "copy":  # the result of copy-start is a tuple with the operand in it
        return 2 * operands[0].nbytes
    if opcode in _SLICES:
        return 2 * _size(instruction.result)
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].nbytes
    if opcode == "custom-call" and len(instruction.result) > 1 and "cublas" in instruction.attributes:
        return _size(operands) + instruction.result[0].nbytes  # the second result is workspace
    return _size(operands) + _size(instruction.result)


def _size(arrays: tuple[Array, ...] | list[Array]) -> int:
    return sum(array.nbytes for array in arrays)


def _fusion_bytes(fused: Computation) -> int:
    users: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in fused.instructions.values():
        for operand in instruction.operands:
            users[operand].append(instruction)
    parameters = [i for i in fused.instructions.values() if i.opcode == "parameter"]
    read = sum(_read(fused, parameter, users) for parameter in parameters)
    return read + _written(fused, fused.instructions[fused.root])


def _read(fused: Computation, parameter: Instruction, users: dict[str, list[Instruction]]) -> int:
    """Bytes of a parameter that the fusion reads: the slices, if it does nothing else with it."""
    uses = list(_uses_through_views(parameter, users))
    if not uses:
        return _size(parameter.result)
    read = 0
    for use, name in uses:
        is_sliced = use.operands[0] == name  # and not the index of a slice
        if use.opcode in _SLICES and is_sliced:
            read += _size(use.result)
        elif not (use.opcode == "dynamic-update-slice" and is_sliced):  # which overwrites a part in place
            return _size(parameter.result)
    return read


def _uses_through_views(made: Instruction, users: dict[str, list[Instruction]]) -> list[tuple[Instruction, str]]:
    """(user, name of what it uses) for a value and for other views of it."""
    found = []
    for user in users[made.name]:
        found += _uses_through_views(user, users) if user.opcode in _VIEWS and users[user.name] else [(user, made.name)]
    return found


def _written(fused: Computation, root: Instruction) -> int:
    if root.opcode == "tuple":
        return sum(_written(fused, fused.instructions[name]) for name in root.operands)
    if root.opcode == "dynamic-update-slice":
        return _size(fused.instructions[root.operands[1]].result)
    if root.opcode in _VIEWS:
        made = fused.instructions[root.operands[0]]
        if made.opcode == "dynamic-update-slice":
            return min(_written(fused, made), _size(root.result))
    return _size(root.result)
