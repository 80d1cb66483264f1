"""The least time of a step, read from the compiled program (Williams et al., 2009, "Roofline", CACM 52(4)).

The program is walked as a device executes it. A product takes its FLOPs at the peak of its dtype or its bytes at the
bandwidth of the memory, whichever is longer; every other kernel takes its bytes; a collective takes the bytes that a
device receives, on NVLink or on the network. Kernels run one after the other, and transfers beside those that are scheduled
between their start and their done (`exposed.py`). So this is a lower bound on time, exact on work, and it ranks programs.
It knows nothing of efficiency, latency or launches.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from jaxpar.hardware import Gpu
from jaxpar.measure.exposed import LINKS, Flight, Timeline, Transfers
from jaxpar.measure.hlo.count import KINDS
from jaxpar.measure.hlo.flops import (
    KERNELS,
    convolution_flops,
    cublas_flops,
    cudnn_attention_flops,
    custom_call_target,
    dot_flops,
    kernel_name,
    tokamax_attention_flops,
)
from jaxpar.measure.hlo.groups import Groups, MeshAxes, collective_groups, groups_text
from jaxpar.measure.hlo.loops import Loops
from jaxpar.measure.hlo.parse import Computation, Instruction, Module
from jaxpar.measure.hlo.source import Sources
from jaxpar.measure.hlo.traffic import FREE, bytes_moved

# What only moves data. A fusion of nothing else is a copy.
_MOVES = {
    "copy", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "broadcast",
    "reverse", "convert", "gather", "select", "compare", "add", "clamp",
}  # fmt: skip
_INDEX_ARITHMETIC = {"select", "compare", "add", "clamp"}  # moves only where the numbers are whole: places, not values
_CONTROL = {"while", "conditional", "call", "async"}  # cost nothing beside what they run
_BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclass(frozen=True)
class Work:
    """All work of one kind in a step of one device: seconds at least, FLOPs, bytes of memory, and kernels launched."""

    kind: str
    seconds: float
    flops: float
    bytes: float
    count: float


@dataclass(frozen=True)
class Operation:
    """One instruction of the program, with all its executions in a step.

    Attributes:
      name: XLA's name of the operation, which is the path of scopes in the model.
      source: the source line that made it, "" if unknown.
    """

    kind: str
    name: str
    source: str
    seconds: float
    flops: float
    bytes: float
    count: float


@dataclass(frozen=True)
class Roofline:
    """The least time of a step, and where it goes. All figures are those of one device.

    Attributes:
      seconds: of the chip and of exposed transfers. No step of this program is shorter, and neither link takes longer.
      chip_seconds: of products and other kernels, one after the other.
      links: {"nvlink", "network"}: seconds of transfers inside a node, and of those that leave it.
      exposed: {"nvlink", "network"}: the seconds that the chip waits for transfers; those on both links count where they
        take longer.
      transfers: the same by kind of collective and mesh axes, the longest first.
      mfu_at_most: useful FLOPs over `seconds` at the bf16 peak; None if useful FLOPs are not known.
      launches: kernels and collectives that are launched.
      hbm_bytes: read and written in the device's memory.
      product_flops: FLOPs of matrix products and attention kernels, by dtype.
      by_kind: the longest first.
      operations: the longest first.
    """

    seconds: float
    chip_seconds: float
    links: dict[str, float]
    exposed: dict[str, float]
    transfers: list[Transfers]
    mfu_at_most: float | None
    launches: float
    hbm_bytes: float
    product_flops: dict[str, float]
    by_kind: list[Work]
    operations: list[Operation]

    def to_json(self) -> dict[str, Any]:
        """All but the single operations."""
        return {key: value for key, value in asdict(self).items() if key != "operations"}


def roofline(
    hlo_text: str,
    gpu: Gpu,
    devices: Sequence[int],
    devices_per_node: int,
    *,
    mesh: MeshAxes | None = None,
    model_flops: float | None = None,
    taken: Callable[[str], Fraction | None] = lambda op_name: None,
) -> Roofline:
    """Reads an optimized program, `jax.jit(f).lower(…).compile().as_text()`, compiled for GPUs.

    Args:
      devices: for each place in the program's device assignment (`mesh.devices.flatten()`), the number of the device in the
        order of hosts. It tells which transfers leave a node.
      mesh: tells the axes of each collective.
      model_flops: useful FLOPs of a step on one device.
      taken: op_name of a conditional → how often it is taken, as in `jaxpar.measure.hlo.count`.
    """
    module = Module(hlo_text)
    walker = _Walker(module, gpu, devices, devices_per_node, mesh, taken)
    sources, operations = Sources(hlo_text), []
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    product_flops: dict[str, float] = defaultdict(float)
    for cost, instruction, times in walker.executions(module.entry, 1.0):
        figures = cost.seconds * times, cost.flops * times, cost.bytes * times, times
        kinds[cost.kind] = [a + b for a, b in zip(kinds[cost.kind], figures, strict=True)]
        if cost.flops:
            product_flops[cost.dtype] += cost.flops * times
        source = sources.line(instruction.frame_id)
        operations.append(Operation(cost.kind, instruction.op_name or instruction.name, source, *figures))
    by_kind = sorted((Work(kind, *figures) for kind, figures in kinds.items()), key=lambda work: -work.seconds)
    chip = sum(work.seconds for work in by_kind if work.kind not in KINDS)
    timeline = walker.timeline(module.entry)
    transfers = timeline.transfers()
    exposed = {link: sum(one.exposed_seconds for one in transfers if one.link == link) for link in LINKS}
    seconds = chip + sum(exposed.values())
    return Roofline(
        seconds=seconds,
        chip_seconds=chip,
        links=timeline.busy,
        exposed=exposed,
        transfers=transfers,
        mfu_at_most=model_flops / (seconds * gpu.peak_flops) if model_flops and seconds else None,
        launches=sum(work.count for work in by_kind),
        hbm_bytes=sum(work.bytes for work in by_kind if work.kind not in KINDS),
        product_flops=dict(product_flops),
        by_kind=by_kind,
        operations=sorted(operations, key=lambda operation: -operation.seconds),
    )


@dataclass(frozen=True)
class _Cost:
    """One execution of an instruction. A collective has its seconds by link, and its mesh axes, as well."""

    kind: str
    seconds: float
    flops: float
    bytes: float
    dtype: str
    links: dict[str, float]
    axes: tuple[str, ...] = ()


class _Walker:
    def __init__(
        self,
        module: Module,
        gpu: Gpu,
        devices: Sequence[int],
        devices_per_node: int,
        mesh: MeshAxes | None,
        taken: Callable[[str], Fraction | None],
    ):
        self.module, self.gpu, self.mesh, self.taken = module, gpu, mesh, taken
        self.loops = Loops(module)
        self._node = [device // devices_per_node for device in devices]
        self._costs: dict[tuple[str, str], _Cost | None] = {}
        self._shares: dict[tuple[str, str], tuple[int, float, float, tuple[str, ...]]] = {}
        self._timelines: dict[str, Timeline] = {}

    def executions(self, name: str, times: float) -> Iterator[tuple[_Cost, Instruction, float]]:
        """(cost, instruction, how often) of everything that runs in `times` executions of a computation."""
        here = self.module.computations[name]
        for instruction in here.instructions.values():
            for callee, repeats in self._callees(here, instruction):
                yield from self.executions(callee, times * repeats)
            for cost, what, repeats in self._own(here, instruction):
                yield cost, what, times * repeats

    def timeline(self, name: str) -> Timeline:
        """One execution of a computation: its instructions are in the order in which the device executes them."""
        if name in self._timelines:
            return self._timelines[name]
        here, timeline = self.module.computations[name], Timeline()
        started: dict[str, list[Flight]] = {}
        for instruction in here.instructions.values():
            ends = instruction.opcode.endswith(("-done", "-update"))
            flights = started.pop(instruction.operands[0], []) if ends else []
            for callee, times in self._callees(here, instruction):
                timeline.repeat(self.timeline(callee), times)
            for cost, _, times in self._own(here, instruction):
                if cost.links:
                    links = {link: times * seconds for link, seconds in cost.links.items()}
                    flights.append(timeline.start(cost.kind, cost.axes, links))
                else:
                    timeline.work(times * cost.seconds)
            if instruction.opcode.endswith(("-start", "-update")):
                started[instruction.name] = flights
            else:
                for flight in flights:
                    timeline.wait(flight)
        self._timelines[name] = timeline
        return timeline

    def _callees(self, here: Computation, instruction: Instruction) -> list[tuple[str, float]]:
        """The computations that a loop, a conditional or a call runs, and how often each."""
        if instruction.opcode == "while":
            (body,) = instruction.computations("body")
            return [(body, self.loops.trip_count(here, instruction) or 1)]
        if instruction.opcode == "conditional":
            share = self.taken(instruction.op_name)
            longest = max(instruction.computations(*_BRANCHES), key=lambda branch: self.timeline(branch).seconds)
            return [(longest, float(1 if share is None else share))]
        return [(callee, 1.0) for callee in instruction.computations("to_apply") if instruction.opcode == "call"]

    def _own(self, here: Computation, instruction: Instruction) -> list[tuple[_Cost, Instruction, float]]:
        """(cost, instruction, how often) of what an instruction does itself or, as `async-start`, starts."""
        if instruction.opcode == "async-start":
            callees = instruction.computations("calls", "called_computations")
            return [one for callee in callees for one in self.executions(callee, 1.0)]
        cost = self._cost(here, instruction)
        return [(cost, instruction, 1.0)] if cost else []

    def _cost(self, here: Computation, instruction: Instruction) -> _Cost | None:
        key = here.name, instruction.name
        if key not in self._costs:
            self._costs[key] = self._find_cost(here, instruction, instruction.opcode.removesuffix("-start"))
        return self._costs[key]

    def _find_cost(self, here: Computation, instruction: Instruction, opcode: str) -> _Cost | None:
        if opcode in FREE or opcode in _CONTROL or opcode.endswith(("-done", "-update")):
            return None
        if opcode in KINDS:
            return self._collective(here, instruction, opcode)
        kind, flops, dtype = self._kind(here, instruction, opcode)
        moved = bytes_moved(self.module, here, instruction)
        seconds = max(flops / self.gpu.peak(dtype), moved / self.gpu.memory_bandwidth)
        return _Cost(kind, seconds, flops, moved, dtype, {})

    def _kind(self, here: Computation, instruction: Instruction, opcode: str) -> tuple[str, float, str]:
        """(kind, FLOPs, dtype of a product)."""
        operands = here.operands(instruction)
        dtype = operands[0].dtype if operands else ""
        if opcode == "custom-call":
            target, kernel = custom_call_target(instruction) or "", kernel_name(instruction)
            if target.startswith("__cublas$") and (product := cublas_flops(instruction, operands)) is not None:
                return f"products {dtype}", product, dtype
            if target.startswith("__cudnn$fmha"):
                return "attention kernels", cudnn_attention_flops(instruction, operands) or 0, dtype
            if (flops := tokamax_attention_flops(instruction, operands)) is not None:
                return "attention kernels", flops, dtype
            if kernel is not None and (find := KERNELS.get(kernel)):
                return "attention kernels", find(operands, instruction.result) or 0, dtype
            return "other kernels", 0, dtype
        inside = self.module.computations[instruction.computations("calls")[0]] if opcode == "fusion" else None
        if inside is not None:
            for call in inside.instructions.values():
                if call.opcode == "custom-call":  # a kernel that reads or writes slices where they lie
                    return self._kind(inside, call, "custom-call")
        products = list(_products(inside.instructions.values(), inside) if inside else _products([instruction], here))
        if products:
            return f"products {products[0][1]}", sum(one[0] for one in products), products[0][1]
        return ("copies" if _only_moves(instruction, inside) else "other kernels"), 0, dtype

    def _collective(self, here: Computation, instruction: Instruction, kind: str) -> _Cost | None:
        members, inside, outside, axes = self._share(instruction, kind)
        if members < 2:
            return None
        size = sum(array.nbytes for array in here.operands(instruction)) * (members if kind == "all-gather" else 1)
        rounds = 2 if kind == "all-reduce" else 1
        gpu = self.gpu
        links = {
            "nvlink": rounds * inside * size / gpu.nvlink_bandwidth,
            "network": rounds * outside * size / gpu.network_bandwidth,
        }
        dtype = here.operands(instruction)[0].dtype
        return _Cost(kind, max(links.values()), 0, 0, dtype, {link: s for link, s in links.items() if s}, axes)

    def _share(self, instruction: Instruction, kind: str) -> tuple[int, float, float, tuple[str, ...]]:
        """(devices in a group, share of the data that a device receives inside its node, and from other nodes, axes)."""
        key = kind, groups_text(instruction, kind)
        if key not in self._shares:
            groups = collective_groups(self.module, instruction, kind) or []
            axes: tuple[str, ...] = ()
            if self.mesh:
                axes = self.mesh.of_pairs(groups) if kind == "collective-permute" else self.mesh.of_groups(groups)
            self._shares[key] = *self._find_share(groups, kind), axes
        return self._shares[key]

    def _find_share(self, groups: Groups, kind: str) -> tuple[int, float, float]:
        if not groups or max(map(len, groups)) < 2:
            return 1, 0.0, 0.0
        if kind == "collective-permute":
            leaves = any(self._node[a] != self._node[b] for a, b in groups)
            return 2, float(not leaves), float(leaves)
        members = max(map(len, groups))
        nodes = max(len({self._node[place] for place in group}) for group in groups)
        # A part of the data for each node must come from outside, and the group's devices in a node share that work.
        outside = (nodes - 1) / nodes / (members / nodes)
        return members, (members - 1) / members - outside, outside


def _products(instructions: Sequence[Instruction] | Any, here: Computation) -> Iterator[tuple[float, str]]:
    """(FLOPs, dtype) of the products among instructions."""
    for instruction in instructions:
        operands = here.operands(instruction) if instruction.opcode in ("dot", "scaled-dot", "convolution") else []
        if instruction.opcode in ("dot", "scaled-dot"):
            contracting = instruction.dims("lhs_contracting_dims")
            yield dot_flops(instruction.result[0], operands[0], contracting), operands[0].dtype
        elif instruction.opcode == "convolution":
            yield convolution_flops(instruction, operands[0], operands[1], instruction.result[0]), operands[0].dtype


def _only_moves(instruction: Instruction, inside: Computation | None) -> bool:
    if inside is None:
        return instruction.opcode.removesuffix("-start") in _MOVES - {"convert"} - _INDEX_ARITHMETIC
    for one in inside.instructions.values():
        whole = bool(re.match(r"[su]\d|pred", one.result[0].dtype)) if one.result else True
        if one.opcode not in _MOVES | FREE or (one.opcode in _INDEX_ARITHMETIC and not whole):
            return False
    return True
