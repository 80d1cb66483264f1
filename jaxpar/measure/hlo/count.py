"""Walks through a program as one device executes it and counts FLOPs and collectives, including loop iterations."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from jaxpar.measure.hlo.flops import (
    KERNELS,
    KernelFlops,
    convolution_flops,
    cublas_flops,
    cudnn_attention_flops,
    custom_call_target,
    dot_flops,
    kernel_name,
    tokamax_attention_flops,
)
from jaxpar.measure.hlo.groups import MeshAxes, collective_groups, groups_text
from jaxpar.measure.hlo.loops import Loops
from jaxpar.measure.hlo.parse import Computation, Instruction, Module

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_UNCOUNTED_SENDS = ("send", "collective-broadcast", "ragged-all-to-all")
_UNCOUNTED_PRODUCTS = ("ragged-dot", "triangular-solve", "cholesky", "fft")
# Calls that only move or order data.
_CALLS_WITHOUT_FLOPS = re.compile(
    r"Sharding|SPMD\w+Shape|MoveTo(Host|Device)|AllocateBuffer|annotate_device_placement|nop|PinToDevice|"
    r".*(TopK|RadixSort|cub_sort|LayoutConstraint|AssumeGatherIndicesInBound|ConsumeBuffer|CreateBuffer).*|"
    r"AsyncCollective(Start|Done)"
)


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, over the same mesh axes, of the same dtype, all inside loops or all outside.

    Attributes:
      kind: one of `KINDS`, whatever the backend's spelling. `all-gather-start` and `async-start` count once, and `-done`
        does not count. A reduce-scatter that a backend writes as an all-reduce and a slice is an all-reduce.
      axes: the mesh axes of size above 1 that it runs over, in mesh order. () if its groups match no axes; in that case
        `uncounted` says so.
      count: executions by one device in one step. A call into which XLA combined several collectives counts as one.
      bytes: per step and device, the larger of a collective's operand and result: the gathered size of an all-gather,
        the size before reduction of a reduce-scatter, the operand of the others. This is the size of the data. The
        bytes on the wire, for a ring of n, are (n-1)/n of it (twice that for an all-reduce).
      dtype: in XLA's spelling; joined by + if one call carries several.
      in_loop: executed inside a `while`.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    dtype: str
    in_loop: bool


@dataclass(frozen=True)
class Count:
    """What one device does in one execution of a program.

    Attributes:
      flops: executed by matrix products, convolutions and kernel calls, including recomputed and masked work.
      collectives: most bytes first. Collectives over groups of one device are left out.
      uncounted: what is missing from the figures or had to be guessed, and why; one line each.
      kernel_flops: the part of `flops` in attention kernels (cuDNN, Pallas), without attention in plain products.
    """

    flops: float
    collectives: list[Collective]
    uncounted: list[str]
    kernel_flops: float = 0.0


def count(
    hlo_text: str,
    grid: np.ndarray | None = None,
    axes: Sequence[str] = ("dp", "pp", "tp", "sp", "cp"),
    *,
    kernels: Mapping[str, KernelFlops] = KERNELS,
    taken: Callable[[str], Fraction | None] = lambda op_name: None,
) -> Count:
    """Counts an optimized program, `jax.jit(f).lower(…).compile().as_text()`, for CPU, GPU or TPU.

    A loop's body is multiplied by its trip count; nested loops multiply. The most expensive branch of a conditional
    counts, because devices may take different ones; `uncounted` says where the collectives of the branches differ.

    Args:
      grid: the mesh's devices, as from `jaxpar.parallel.mesh.device_grid`, one dimension per axis. Only its shape is
        used, because HLO numbers devices by their index in `mesh.devices.flatten()` (see groups.py). None: no
        collective gets axes.
      axes: names of the grid's dimensions.
      kernels: FLOPs of a Pallas kernel from its operands and results, by the kernel's name.
      taken: op_name of a conditional → the fraction of its executions that take the expensive branch; None: not known,
        so all of them count.

    Raises:
      ValueError: the text is not an HLO module, or the program is for another number of devices than the grid has.
    """
    module = Module(hlo_text)
    mesh = None
    if grid is not None:
        devices = module.num_replicas * module.num_partitions
        if grid.size != devices or grid.ndim != len(axes):
            raise ValueError(
                f"grid: mesh {dict(zip(axes, grid.shape, strict=False))} has {grid.size} devices, but the program is for "
                f"{devices} devices: pass the grid of the program's own mesh"
            )
        mesh = MeshAxes(grid.shape, axes)
    total = _ProgramWalker(module, mesh, kernels, taken).computation(module.entry)
    collectives = [
        Collective(kind, found_axes, round(n), round(size), dtype, in_loop)
        for (kind, found_axes, dtype, in_loop), (n, size) in total.sent.items()
    ]
    return Count(
        flops=float(total.flops),
        collectives=sorted(collectives, key=lambda c: (-c.bytes, c.kind, c.axes, c.dtype, c.in_loop)),
        uncounted=[
            f"{note} ({float(n):g} time{'s' if n != 1 else ''} per step)" for note, n in total.notes.items() if n
        ],
        kernel_flops=float(total.kernel_flops),
    )


_Key = tuple[str, tuple[str, ...], str, bool]  # kind, axes, dtype, in_loop


@dataclass
class _Total:
    flops: float = 0
    kernel_flops: float = 0
    sent: dict[_Key, tuple[int | Fraction, int | Fraction]] = field(default_factory=lambda: defaultdict(lambda: (0, 0)))
    notes: dict[str, int | Fraction] = field(default_factory=lambda: defaultdict(int))

    def add(self, other: "_Total", times: int | Fraction = 1, in_loop: bool = False) -> None:
        self.flops += times * other.flops
        self.kernel_flops += times * other.kernel_flops
        for (kind, axes, dtype, looped), (n, size) in other.sent.items():
            if times:
                key = (kind, axes, dtype, looped or in_loop)
                self.sent[key] = (self.sent[key][0] + times * n, self.sent[key][1] + times * size)
        for note, n in other.notes.items():
            self.notes[note] += times * n

    def cost(self) -> tuple[float, int | Fraction]:
        return self.flops, sum(size for _, size in self.sent.values())


def _is_continuation(here: Computation, collective: Instruction) -> bool:
    """Whether this is a later piece of a collective that XLA for TPU spread over several fusions.

    Each of the fusions repeats the collective; only the first one passes it to AsyncCollectiveStart.
    """
    return "chain_id=" in collective.attributes and not any(
        custom_call_target(user) == "AsyncCollectiveStart" and collective.name in user.operands
        for user in here.instructions.values()
    )


class _ProgramWalker:
    def __init__(
        self,
        module: Module,
        mesh: MeshAxes | None,
        kernels: Mapping[str, KernelFlops],
        taken: Callable[[str], Fraction | None],
    ):
        self.module, self.mesh, self.kernels, self.taken = module, mesh, kernels, taken
        self.loops = Loops(module)
        self._done: dict[str, _Total] = {}
        # A text of groups has thousands of ids, but a program has few distinct texts.
        self._members_of_text: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {}

    def computation(self, name: str) -> _Total:
        """The total of one execution of a computation."""
        if name not in self._done:
            total, here = _Total(), self.module.computations[name]
            for instruction in here.instructions.values():
                self._instruction(total, here, instruction)
            self._done[name] = total
        return self._done[name]

    def _instruction(self, total: _Total, here: Computation, instruction: Instruction) -> None:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode.endswith(("-done", "-update")):
            return  # counted at -start
        if opcode in ("fusion", "call", "async"):
            for callee in instruction.computations("calls", "to_apply", "called_computations"):
                total.add(self.computation(callee))
        elif opcode == "while":
            self._while(total, here, instruction)
        elif opcode == "conditional":
            self._conditional(total, instruction)
        elif opcode in ("dot", "scaled-dot"):
            (lhs, *_) = here.operands(instruction)
            total.flops += dot_flops(instruction.result[0], lhs, instruction.dims("lhs_contracting_dims"))
        elif opcode == "convolution":
            lhs, kernel = here.operands(instruction)
            total.flops += convolution_flops(instruction, lhs, kernel, instruction.result[0])
        elif opcode == "custom-call":
            self._custom_call(total, here, instruction)
        elif opcode in KINDS and not _is_continuation(here, instruction):
            self._collective(total, here, instruction, opcode)
        elif opcode in _UNCOUNTED_SENDS or opcode in _UNCOUNTED_PRODUCTS:
            total.notes[f"{opcode}: not counted"] += 1

    def _while(self, total: _Total, here: Computation, loop: Instruction) -> None:
        condition, body = (self.computation(name) for name in loop.computations("condition", "body"))
        trips = self.loops.trip_count(here, loop)
        if trips is None:
            where = loop.op_name or loop.name
            total.notes[f"while {where}: its trip count depends on data; its body is counted once"] += 1
            trips = 1
        total.add(body, trips, in_loop=True)
        total.add(condition, trips + 1, in_loop=True)

    def _conditional(self, total: _Total, instruction: Instruction) -> None:
        keys = ("branch_computations", "true_computation", "false_computation")
        branches = [self.computation(name) for name in instruction.computations(*keys)]
        taken = self.taken(instruction.op_name)
        total.add(max(branches, key=_Total.cost), 1 if taken is None else taken)
        if taken is None and any(branch.sent != branches[0].sent for branch in branches):
            where = instruction.op_name or instruction.name
            total.notes[f"conditional {where}: branches differ in collectives; the most expensive one is counted"] += 1

    def _custom_call(self, total: _Total, here: Computation, instruction: Instruction) -> None:
        target, operands = custom_call_target(instruction) or "", here.operands(instruction)
        kernel, flops, note = kernel_name(instruction), None, f"custom call {target}"
        if target.startswith("__cublas$"):
            if (product := cublas_flops(instruction, operands)) is not None:
                total.flops += product
                return
        elif target.startswith("__cudnn$fmha"):
            flops = cudnn_attention_flops(instruction, operands)
        else:
            flops = tokamax_attention_flops(instruction, operands)
        if flops is None and kernel is not None:
            note = f"kernel {kernel} ({target})"
            if kernel in self.kernels:
                flops = self.kernels[kernel](operands, instruction.result)
                if self.kernels[kernel] is KERNELS.get(kernel) and flops:
                    total.notes[f"{note}: counted without a mask, because its call does not show one"] += 1
        # A Pallas kernel for TPU may carry an estimate by its author.
        if flops is None and (estimate := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)):
            flops = int(estimate[1])
        if flops is not None:
            total.flops += flops
            total.kernel_flops += flops
        elif not _CALLS_WITHOUT_FLOPS.fullmatch(target):
            total.notes[f"{note}: its FLOPs are not known"] += 1

    def _collective(self, total: _Total, here: Computation, instruction: Instruction, kind: str) -> None:
        members, axes = self._members(instruction, kind)
        if members == 0:
            total.notes[f"{kind} {instruction.name}: its groups are in an unknown notation; it is not counted"] += 1
        if members < 2:
            return
        arrays = here.operands(instruction)
        size = sum(array.nbytes for array in arrays) * (members if kind == "all-gather" else 1)
        key = (kind, axes, "+".join(sorted({array.dtype for array in arrays})), False)
        total.sent[key] = (total.sent[key][0] + 1, total.sent[key][1] + size)
        if self.mesh is not None and not axes:
            total.notes[f"{kind} in groups of {members} that match no axes of the mesh"] += 1

    def _members(self, instruction: Instruction, kind: str) -> tuple[int, tuple[str, ...]]:
        """Devices per group (1: nothing is sent; 0: unknown notation), and the mesh axes."""
        key = (kind, groups_text(instruction, kind))
        if key not in self._members_of_text:
            groups = collective_groups(self.module, instruction, kind)
            if groups is None:
                return 0, ()
            axes: tuple[str, ...] = ()
            if self.mesh:
                axes = self.mesh.of_pairs(groups) if kind == "collective-permute" else self.mesh.of_groups(groups)
            self._members_of_text[key] = max((len(group) for group in groups), default=1), axes
        return self._members_of_text[key]
