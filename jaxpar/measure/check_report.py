"""What `jaxpar check` and `Trainer.check` found: a layout beside one device."""

from dataclasses import dataclass, field

import numpy as np

from jaxpar.config import MeshSizes

TOLERANCE = 1e-5  # relative, of the norm of a parameter's gradient, and of each of its layers


class LayoutError(Exception):
    """The layout does not compute what one device computes. `report` has the figures."""

    def __init__(self, report: "CheckReport"):
        self.report = report
        super().__init__("\n".join(report.lines()))


@dataclass(frozen=True)
class Difference:
    """How far the gradient of one parameter is from that of one device.

    Attributes:
      name: path of the parameter, such as "layers/mlp/up".
      error: norm of the difference over norm of the gradient: of the whole parameter, or of the worst layer if that is more.
      layer: index of the worst layer; None if the parameter is not stacked.
      largest_difference, largest_gradient: absolute values of single numbers.
      vanishing: the gradient is zero but for rounding, and `error` is relative to the largest gradient of the model.
    """

    name: str
    error: float
    layer: int | None
    largest_difference: float
    largest_gradient: float
    vanishing: bool

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", worst in layer {self.layer}"
        return (
            f"{self.name}: relative {self.error:.1e}{layer}; a number differs by up to {self.largest_difference:.1e}, where the "
            f"largest is {self.largest_gradient:.1e}"
        )


@dataclass(frozen=True)
class CheckReport:
    """A layout beside one device.

    Attributes:
      num_microbatches, shape: of the batch, (rows, tokens of a row).
      loss, expected_loss: on the layout and on one device, nats a token.
      differences: one for each parameter: the embedding's, the layers', the head's.
      notes: what is not as in the config.
      alone: for a layout that is wrong, whether each axis of the mesh is right by itself; empty if that was not asked.
    """

    sizes: MeshSizes
    num_microbatches: int
    shape: tuple[int, int]
    loss: float
    expected_loss: float
    differences: list[Difference]
    notes: list[str]
    own_model: bool
    alone: dict[str, bool] = field(default_factory=dict)

    @property
    def loss_error(self) -> float:
        return abs(self.loss - self.expected_loss) / max(abs(self.expected_loss), float(np.finfo(np.float32).tiny))

    @property
    def wrong(self) -> list[Difference]:
        """The parameters whose gradients differ, in the order of the model. A NaN differs."""
        return [one for one in self.differences if not one.error <= TOLERANCE]

    @property
    def passed(self) -> bool:
        return self.loss_error <= TOLERANCE and not self.wrong

    def lines(self) -> list[str]:
        """A short table for the user."""
        axes = "  ".join(f"{axis} {size}" for axis, size in self.sizes.as_dict().items())
        count, wrong = len(self.differences), self.wrong
        worst = max(
            self.differences, key=lambda one: (not one.error <= TOLERANCE, np.nan_to_num(one.error, nan=np.inf))
        )
        lines = [
            f"layout     {axes}  = {self.sizes.num_devices} devices, beside one device",
            f"compared   the loss and {count} gradients in float32; {self.shape[0]} rows of {self.shape[1]} tokens, "
            f"{self.num_microbatches} microbatches",
            *[f"reduced    {note}" for note in self.notes],
            f"loss       {self.loss:.6f}, one device {self.expected_loss:.6f}: relative {self.loss_error:.1e}",
            f"gradients  largest difference: {worst}",
        ]
        if self.passed:
            return [*lines, f"verdict    the same, within {TOLERANCE:g}"]
        if wrong:
            lines.append(f"first      {wrong[0]}")
        if self.alone:
            lines.append(
                "alone      " + ", ".join(f"{axis}: {'the same' if ok else 'WRONG'}" for axis, ok in self.alone.items())
            )
        what = f"{len(wrong)} of {count} gradients" + ("" if self.loss_error <= TOLERANCE else " and the loss")
        return [*lines, f"verdict    WRONG: {what} differ by more than {TOLERANCE:g}", *self._hints()]

    def _hints(self) -> list[str]:
        cp_is_right = self.alone.get(f"cp {self.sizes.cp}", False)
        if not self.own_model or self.sizes.cp == 1 or cp_is_right:
            return []
        return [
            "hint       with cp, a device holds an early and a late part of the sequence: call jaxpar.attention.attention with "
            "segment_ids=info.segment_ids, take positions from info.positions, and mix tokens nowhere else"
        ]
