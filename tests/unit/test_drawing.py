"""The output of `jaxpar schedule`: lines, words and the picture."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxpar.parallel.placement import LayerPlacement
from jaxpar.pipeline import drawing
from jaxpar.pipeline.check import IDLE
from jaxpar.pipeline.schedule import Schedule, build_schedule, forward_only

SVG = "{http://www.w3.org/2000/svg}"
TABLES = [("gpipe", 3, 4, 1), ("1f1b", 4, 8, 1), ("interleaved_1f1b", 4, 8, 2), ("zb1p", 3, 5, 3), ("zb1p", 1, 2, 1)]


def test_lines_are_cut_at_the_width():
    wide, narrow = (drawing.terminal_lines(build_schedule("1f1b", 2, 4), width) for width in (200, 20))
    assert [line.plain for line in wide] == [
        "stage 0 F0 F1 .. F2 B0 F3 B1 .. B2 B3",
        "stage 1 .. F0 B0 F1 B1 F2 B2 F3 B3 ..",
    ]
    assert [line.plain for line in narrow[:3]] == ["stage 0 F0 F1 .. F2", "stage 1 .. F0 B0 F1", ""]
    assert max(len(line) for line in narrow) <= 20 and len(narrow) == 3 * 3 - 1
    assert {span.style for line in wide for span in line.spans} == {"green", "blue", "dim"}


@pytest.mark.parametrize(("name", "stages", "microbatches", "chunks"), TABLES)
def test_lines_name_each_item_once(name, stages, microbatches, chunks):
    schedule = build_schedule(name, stages, microbatches, chunks)
    for stage, line in enumerate(drawing.terminal_lines(schedule, 10_000)):
        words = line.plain.split()[2:]
        assert len(words) == len(schedule.timeline)
        items = [
            f"{s}{m}{'abc'[c] if chunks > 1 else ''}"
            for s in schedule.slots
            for c in range(chunks)
            for m in range(microbatches)
        ]
        assert sorted(word for word in words if word.strip(".")) == sorted(items), stage


def boxes(root) -> list[tuple[str, float, float, float]]:
    """(title, x, y, width) of every slot in a picture."""
    found = [
        (e, next(e.iter(f"{SVG}rect")))
        for e in root.iter()
        if e.find(f"{SVG}title") is not None and e.tag != f"{SVG}svg"
    ]
    where = [(e.findtext(f"{SVG}title"), *(float(rect.get(key)) for key in ("x", "y", "width"))) for e, rect in found]
    return [box for box in where if box[0].startswith("tick ")]


@pytest.mark.parametrize(("name", "stages", "microbatches", "chunks"), TABLES)
def test_the_picture_is_the_table(name, stages, microbatches, chunks):
    schedule, costs = build_schedule(name, stages, microbatches, chunks), (2.0, 3.0, 1.0)
    root = ElementTree.fromstring(drawing.svg(schedule, costs))
    found = boxes(root)
    assert len(found) == stages * len(schedule.timeline)
    width_of = {title: width for title, _, _, width in found}
    scale = min(width_of.values()) / min(schedule.slot_costs(*costs).values())
    for slot, table in schedule.slots.items():
        for tick, stage in np.ndindex(table.shape):
            item = int(table[tick, stage])
            title = (
                f"tick {tick}, stage {stage}: {f'{slot} idle' if item == IDLE else schedule.tables.label(slot, item)}"
            )
            assert (title in width_of) == schedule.runs[slot][tick]
            if title in width_of:
                assert width_of[title] == pytest.approx(schedule.slot_costs(*costs)[slot] * scale, abs=0.02)
    # The boxes of a stage touch each other, and the last one ends at the total time.
    for stage in range(stages):
        mine = sorted((x, width, y) for title, x, y, width in found if f"stage {stage}:" in title)
        assert len({y for *_, y in mine}) == 1
        assert [x + width for x, width, _ in mine[:-1]] == pytest.approx([x for x, *_ in mine[1:]], abs=0.03)
        end = mine[0][0] + schedule.slot_time(*costs) * scale
        assert mine[-1][0] + mine[-1][1] == pytest.approx(end, abs=0.1 * scale)
    assert float(root.get("viewBox").split()[2]) >= end


def test_the_picture_has_a_shade_for_each_chunk_and_hatches_idle_slots():
    root = ElementTree.fromstring(drawing.svg(build_schedule("zb1p", 2, 4, 3), (1, 1, 1)))
    fills = {}
    for group in root.iter(f"{SVG}g"):
        if (title := group.findtext(f"{SVG}title")).startswith("tick"):
            label = title.split(": ")[1]
            fills.setdefault((label[0], label[-1]), set()).add(group.find(f"{SVG}rect").get("fill"))
    assert len(fills) == 9 and all(len(found) == 1 for found in fills.values())
    assert len(set.union(*fills.values())) == 9
    assert any(rect.get("class") == "idle" for rect in root.iter(f"{SVG}rect"))
    assert root.find(f"{SVG}defs/{SVG}pattern").get("id") == "idle"
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"gradient of the weights", "executed, idle", "chunk 2", "stage 1", "0"} <= set(texts)


def test_a_name_is_escaped():
    table = np.zeros((1, 1), int)
    root = ElementTree.fromstring(drawing.svg(Schedule("a<b>&'\"", 1, 1, table, table), (1, 1, 1)))
    assert root.findtext(f"{SVG}title").startswith("a<b>&'\"")


def test_extreme_costs_and_sizes_have_a_picture():
    for costs in ((1, 0, 0), (1e-9, 1, 1), (1e6, 1, 1)):
        ElementTree.fromstring(drawing.svg(build_schedule("zb1p", 3, 4), costs))
    root = ElementTree.fromstring(drawing.svg(build_schedule("1f1b", 2, 500), (1, 1, 100)))
    assert float(root.get("width")) < 21_000
    with pytest.raises(ValueError):
        drawing.svg(build_schedule("1f1b", 2, 2), (0, 0, 0))


def summary(name, *sizes, costs=(1, 1, 1)) -> str:
    return "\n".join(drawing.summary_lines(build_schedule(name, *sizes), costs))


def test_words():
    text = summary("zb1p", 4, 8, 2, costs=(1, 1.5, 0.5))
    assert "time: 26.75, with F 1, B 1.5, W 0.5 for a microbatch on a stage; work 24, bubble 3.75" not in text
    # (M V + P - 1)(F + B) + M V W = 19 x 2.5 + 16 x 0.5 = 55.5, in halves
    assert "time: 27.75, with F 1, B 1.5, W 0.5 for a microbatch on a stage; work 24, bubble 3.75" in text
    assert "bubble: 13.5% of the time" in text
    assert re.search(r"GPipe, 1F1B: +\(P-1\)\(F\+B\+W\) = 9, ours is 0\.42 of it \(Huang et al\. 2019", text)
    assert re.search(
        r"interleaved 1F1B: \(P-1\)\(F\+B\+W\)/V = 4\.5, ours is 0\.83 of it \(Narayanan et al\. 2021", text
    )
    assert re.search(r"ZB-H1: +\(P-1\)\(F\+B-W\) = 6, ours is 0\.62 of it \(Qi et al\. 2023", text)
    assert "in flight: 5.5, 5, 4.5, 4 microbatches (11, 10, 9, 8 items of 1/2 microbatch)" in text
    assert "((V+1)P-2s-1)/V: 5.5, 4.5, 3.5, 2.5" in text
    assert "messages: 56 activations up and 56 gradients down" in text and "19 + 19" in text

    text = summary("1f1b", 4, 8)
    assert "in flight: 7, 5, 3, 1 microbatches\n  Megatron-LM's 1F1B: P-s: 4, 3, 2, 1\n" in text
    assert "places: kept 7, from below 1, from above 1, outputs 1" in text
    assert "interleaved" not in text


def test_words_of_what_has_no_pipeline_or_no_backward():
    assert "gpipe: 1 stage, 2 microbatches, 1 chunk; 4 ticks, 4 slots, 2 loops" in summary("gpipe", 1, 2)
    text = "\n".join(drawing.summary_lines(forward_only(2, 3), (1, 1, 1)))
    assert "work 3, bubble 1" in text and "3 activations up and 0 gradients down" in text
    ElementTree.fromstring(drawing.svg(forward_only(2, 3), (1, 1, 1)))


def test_layers():
    assert drawing.placement_line(LayerPlacement(32, 4)) == "layers: 32 on 4 stages: 8, 8, 8, 8"
    assert drawing.placement_line(LayerPlacement(30, 4, 2)) == (
        "layers: 30 on 4 stages x 2 chunks: 4+4, 4+4, 4+3, 4+3; all parts compute as many as the largest, so 2 of 32 "
        "computed layers are padding: 6.7% more time in layers"
    )
