"""Draws a schedule in the terminal or as SVG, and compares its figures with those that papers publish. Needs no jax."""

import colorsys
from collections.abc import Iterator
from html import escape

from rich.text import Text

from jaxpar.parallel.placement import LayerPlacement
from jaxpar.pipeline.check import IDLE
from jaxpar.pipeline.schedule import Schedule

Costs = tuple[float, float, float]  # times of F, B and W of a microbatch on a whole stage, in any unit
STYLES = {"F": "green", "B": "blue", "W": "yellow"}

# Pixels. The narrowest slot is SLOT wide, which leaves room for its label, unless the picture became wider than WIDEST.
SLOT, WIDEST, ROW, BOX, LEFT, TOP, MARGIN = 32, 20_000, 34, 28, 76, 76, 16
HUES = {"F": 135, "B": 212, "W": 35}
# Boxes are light and their text is dark on any page. The rest follows the reader's colour scheme.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 } .title { font-size: 15px; font-weight: 600 }
.page { fill: #ffffff } .line { stroke: #8c959f } .idle { fill: url(#idle); stroke: #8c959f; stroke-opacity: 0.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .page { fill: #0d1117 } .line { stroke: #59636e } .idle { stroke: #59636e }
}
.box text { font-size: 11px; fill: #111111 } .box rect { stroke: #000000; stroke-opacity: 0.3 }
""".strip()


def terminal_lines(schedule: Schedule, width: int) -> list[Text]:
    """A line for each stage and a column for each slot that the program executes, in blocks of `width` characters."""
    columns = [
        [
            (schedule.tables.label(slot, item) if item != IDLE else "", slot)
            for item in schedule.slots[slot][tick].tolist()
        ]
        for tick, slot in schedule.timeline
    ]
    cell = max(len(label) for column in columns for label, _ in column)
    name = len(f"stage {schedule.num_stages - 1} ")
    per_block = max(1, (width - name) // (cell + 1))
    lines = []
    for start in range(0, len(columns), per_block):
        for stage in range(schedule.num_stages):
            line = Text(f"stage {stage}".ljust(name))
            for column in columns[start : start + per_block]:
                label, slot = column[stage]
                line.append((label or "." * cell).ljust(cell + 1), STYLES[slot] if label else "dim")
            line.rstrip()
            lines.append(line)
        lines.append(Text())
    return lines[:-1]


def summary_lines(schedule: Schedule, costs: Costs) -> list[str]:
    """Time, bubble, memory and messages of a schedule, beside the published formulas."""
    num_stages, microbatches, chunks = schedule.num_stages, schedule.num_microbatches, schedule.num_chunks
    time, fraction = schedule.slot_time(*costs), schedule.bubble_fraction(*costs)
    up = microbatches * (num_stages * chunks - 1)
    sends = {slot: int(schedule.runs[slot].sum()) for slot in schedule.slots if slot != "W"}
    sizes = {kind.replace("_", " "): size for kind, size in schedule.buffers.sizes.items()}
    lines = [
        f"{_sizes(schedule)}; {_count(schedule.num_ticks, 'tick')}, {_count(len(schedule.timeline), 'slot')}, "
        f"{_count(len(schedule.segments), 'loop')} in the program",
        f"time: {time:g}, with F {costs[0]:g}, B {costs[1]:g}, W {costs[2]:g} for a microbatch on a stage; "
        f"work {time * (1 - fraction):g}, bubble {time * fraction:g}",
        f"bubble: {fraction:.1%} of the time; published:",
        *(f"  {line}" for line in _published_bubbles(schedule, costs)),
        f"in flight: {_per_stage([n / chunks for n in schedule.in_flight])} microbatches"
        + (f" ({_per_stage(schedule.in_flight)} items of 1/{chunks} microbatch)" if chunks > 1 else ""),
        f"  Megatron-LM's 1F1B: {_megatron_in_flight(schedule)}",
        "places: "
        + ", ".join(f"{kind} {size}" for kind, size in sizes.items())
        + " (each holds one item, on every stage)",
        f"messages: {up} activations up and {up if 'B' in sends else 0} gradients down, M(PV-1) each; a stage sends in every "
        f"executed slot, {' + '.join(map(str, sends.values()))} times",
    ]
    return lines


def placement_line(placement: LayerPlacement) -> str:
    """The layers on each stage, and what padding costs if their numbers differ."""
    counts = ["+".join(map(str, stage)) for stage in placement.counts.tolist()]
    chunks = f" x {placement.num_chunks} chunks" if placement.num_chunks > 1 else ""
    parts = _count(placement.num_stages, "stage") + chunks
    line = f"layers: {placement.num_layers} on {parts}: {', '.join(counts)}"
    if not placement.is_padded:
        return line
    padded = placement.table.size
    return (
        f"{line}; all parts compute as many as the largest, so {padded - placement.num_layers} of {padded} computed layers are "
        f"padding: {padded / placement.num_layers - 1:.1%} more time in layers"
    )


def svg(schedule: Schedule, costs: Costs) -> str:
    """An SVG document with a row for each stage and a box for each slot, as wide as its cost. It can be read on light and
    dark pages.

    Raises:
      ValueError: all costs are zero.
    """
    time, widths = schedule.slot_time(*costs), schedule.slot_costs(*costs)
    if not time:
        raise ValueError("a schedule cannot be drawn if all its slots cost nothing")
    scale = min(SLOT / min(width for width in widths.values() if width), WIDEST / time)
    width, bottom = LEFT + time * scale + MARGIN, TOP + schedule.num_stages * ROW
    title = f"{_sizes(schedule)}; bubble {schedule.bubble_fraction(*costs):.1%}"
    legend = list(_legend(schedule))
    size = f"{max(width, 2 * LEFT + sum(w for _, w in legend)):.0f} {bottom + 48}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{size.split()[0]}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            '<defs><pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            '<line y2="6" class="line"/></pattern></defs>',
            '<rect class="page" width="100%" height="100%"/>',
            f'<text x="{MARGIN}" y="26" class="title">{escape(title)}</text>',
            *_placed_legend(legend),
            *(
                f'<text x="{MARGIN}" y="{TOP + stage * ROW + BOX * 0.68:.1f}">stage {stage}</text>'
                for stage in range(schedule.num_stages)
            ),
            *_boxes(schedule, widths, scale),
            *_axis(time, costs, scale, bottom),
            "</svg>",
            "",
        ]
    )


def _boxes(schedule: Schedule, widths: dict[str, float], scale: float) -> Iterator[str]:
    x = float(LEFT)
    for tick, slot in schedule.timeline:
        width = widths[slot] * scale
        for stage, item in enumerate(schedule.slots[slot][tick].tolist()):
            chunk = item // schedule.num_microbatches
            label = "" if item == IDLE else schedule.tables.label(slot, item)
            yield _box(
                x, TOP + stage * ROW, width, slot, chunk / schedule.num_chunks, label, f"tick {tick}, stage {stage}"
            )
        x += width


def _box(x: float, y: float, width: float, slot: str, shade: float, label: str, about: str) -> str:
    """A box of a shade from 0, light, to 1, dark. Without a label it is an idle slot."""
    where = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{BOX}" rx="2"'
    if not label:
        return f'<rect {where} class="idle"><title>{about}: {slot} idle</title></rect>'
    color = "#" + "".join(
        f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(HUES[slot] / 360, 0.84 - 0.3 * shade, 0.65)
    )
    box = f'<rect {where} fill="{color}"/>'
    if width > 6 * len(label):
        box += f'<text x="{x + width / 2:.2f}" y="{y + BOX * 0.64:.2f}" text-anchor="middle">{label}</text>'
    return f'<g class="box"><title>{about}: {label}</title>{box}</g>'


def _legend(schedule: Schedule) -> Iterator[tuple[tuple[str, float, str, str], int]]:
    """((slot, shade, label, text), width in pixels) of each entry."""
    split = schedule.weight is not None
    words = {
        "F": "forward",
        "B": "gradient of the activations" + ("" if split else " and the weights"),
        "W": "gradient of the weights",
    }
    entries = [(slot, 0.0, slot, words[slot]) for slot in schedule.slots]
    entries.append(("F", 0.0, "", "executed, idle"))
    if schedule.num_chunks > 1:
        for chunk in range(schedule.num_chunks):
            label = schedule.tables.label("F", chunk * schedule.num_microbatches)
            entries.append(("F", chunk / schedule.num_chunks, label, f"chunk {chunk}"))
    for entry in entries:
        yield entry, SLOT + 20 + 7 * len(entry[3])


def _placed_legend(legend: list[tuple[tuple[str, float, str, str], int]]) -> Iterator[str]:
    x = MARGIN
    for (slot, shade, label, text), width in legend:
        yield _box(x, 38, SLOT, slot, shade, label, "legend")
        yield f'<text x="{x + SLOT + 6}" y="57">{text}</text>'
        x += width


def _axis(time: float, costs: Costs, scale: float, bottom: float) -> Iterator[str]:
    """The time axis, with a number about every 80 pixels, in steps of 1, 2 or 5 times a power of ten."""
    exponents = (10.0**power for power in range(-12, 13))
    step = next((s for ten in exponents for s in (ten, 2 * ten, 5 * ten) if s * scale >= 80), time)
    yield f'<line class="line" x1="{LEFT}" x2="{LEFT + time * scale:.2f}" y1="{bottom}" y2="{bottom}"/>'
    for i in range(int(time / step + 1e-9) + 1):
        x = LEFT + i * step * scale
        yield f'<line class="line" x1="{x:.2f}" x2="{x:.2f}" y1="{bottom}" y2="{bottom + 5}"/>'
        yield f'<text x="{x:.2f}" y="{bottom + 18}" text-anchor="middle">{i * step:g}</text>'
    words = f"time; on a whole stage a microbatch takes F {costs[0]:g}, B {costs[1]:g}, W {costs[2]:g}"
    yield f'<text x="{LEFT}" y="{bottom + 38}">{words}</text>'


def _published_bubbles(schedule: Schedule, costs: Costs) -> Iterator[str]:
    """The time of the bubble by the papers' formulas, for the same costs. B is the gradient of the activations alone."""
    time, fraction = schedule.slot_time(*costs), schedule.bubble_fraction(*costs)
    (forward, backward, weight), chunks = costs, schedule.num_chunks
    others = schedule.num_stages - 1
    one = others * (forward + backward + weight)
    rows = [
        (
            "GPipe, 1F1B",
            "(P-1)(F+B+W)",
            one,
            "Huang et al. 2019, arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473",
        ),
        ("interleaved 1F1B", "(P-1)(F+B+W)/V", one / chunks, "Narayanan et al. 2021, section 2.2"),
        (
            "ZB-H1",
            "(P-1)(F+B-W)",
            others * (forward + backward - weight),
            "Qi et al. 2023, arXiv:2401.10241, section 2",
        ),
    ]
    for name, formula, published, source in rows:
        if name.startswith("interleaved") and chunks == 1:
            continue
        share = f", ours is {time * fraction / published:.2f} of it" if published > 0 else ""
        yield f"{name + ':':17} {formula} = {published:g}{share} ({source})"


def _megatron_in_flight(schedule: Schedule) -> str:
    """The microbatches that Megatron-LM's schedule with as many chunks holds on each stage: its warm-up microbatches
    (core/pipeline_parallel/schedules.py) and the one in work."""
    stages, chunks, items = schedule.num_stages, schedule.num_chunks, schedule.num_chunks * schedule.num_microbatches
    if chunks == 1:
        return f"P-s: {_per_stage([min(items, stages - s) for s in range(stages)])}"
    held = [min(items, (chunks + 1) * stages - 2 * s - 1) for s in range(stages)]
    return f"((V+1)P-2s-1)/V: {_per_stage([n / chunks for n in held])}"


def _per_stage(numbers: list[float] | list[int]) -> str:
    return ", ".join(f"{n:.3g}" for n in numbers)


def _sizes(schedule: Schedule) -> str:
    return (
        f"{schedule.name}: {_count(schedule.num_stages, 'stage')}, {_count(schedule.num_microbatches, 'microbatch', 'es')}, "
        f"{_count(schedule.num_chunks, 'chunk')}"
    )


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural * (number != 1)}"
