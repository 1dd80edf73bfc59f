"""Pictures and traces of simulated steps: well-formed, true to the events, and small for long steps."""

import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from torch_sluice.plan import simulation
from torch_sluice.plan.picture import draw_pipeline
from torch_sluice.plan.simulation import SCHEDULES, Link, simulate
from torch_sluice.plan.trace import write_chrome_trace

SVG = "{http://www.w3.org/2000/svg}"


def step(schedule="1f1b", ranks=3, micro_batches=6, **changes):
    arguments = {
        "forward_s": 0.01,
        "backward_input_s": 0.01,
        "backward_weight_s": 0.01,
        "forward_bytes": 1e6,
        "backward_bytes": 1e6,
        "next_links": Link(1e-4, 1e9),
        "reduce_bytes": 1e6,
        "events": True,
    }
    return simulate(schedule, ranks=ranks, micro_batches=micro_batches, **arguments | changes)


def boxes(picture):
    """Left edges, widths and heights of all boxes, by fill."""
    found = {}
    for path in ElementTree.fromstring(picture).iter(f"{SVG}path"):
        if "fill" in path.attrib:
            sizes = re.findall(r"M([\d.]+) [\d.]+h([\d.]+)v([\d.]+)", path.get("d"))
            found.setdefault(path.get("fill"), []).extend(tuple(map(float, size)) for size in sizes)
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_picture_has_a_box_for_each_piece_of_work(schedule):
    result = step(schedule)
    picture = draw_pipeline(result)
    root = ElementTree.fromstring(picture)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert [text for text in texts if text.startswith("rank")] == ["rank 0", "rank 1", "rank 2"]
    stages = 3 * result.stages_per_rank
    kinds = 3 if schedule.startswith("zb") else 2
    found = boxes(picture)
    assert sum(map(len, found.values())) == stages * (6 * kinds + 1)
    assert len(found) == kinds + 1
    assert texts.count("5") == stages * kinds  # each piece of the last micro-batch is wide enough for its number
    assert root.find(f"{SVG}title").text.startswith(f"{schedule}: 3 ranks")
    assert re.findall(r'fill="(?!var)[^"]*"', picture) == []  # all colours are the page's


def test_boxes_lie_where_the_events_are():
    result = step(ranks=1, micro_batches=2, reduce_bytes=None)
    (forward, backward) = boxes(draw_pipeline(result)).values()
    whole = 1000 - 62 - 8
    assert [left for left, *_ in forward] == pytest.approx([62, 62 + whole / 2], abs=0.01)
    assert [left for left, *_ in backward] == pytest.approx([62 + whole / 6, 62 + whole * 4 / 6], abs=0.01)
    assert [width for _, width, _ in backward] == pytest.approx([whole / 3 - 0.6] * 2, abs=0.02)


def test_a_part_of_a_step_is_cut_out():
    result = step(ranks=1, micro_batches=2, reduce_bytes=None)
    found = boxes(draw_pipeline(result, begin_s=0.005, end_s=0.02))
    (forward, backward) = found.values()
    assert [left for left, *_ in forward] == [62]
    assert [left for left, *_ in backward] == pytest.approx([62 + 930 / 3], abs=0.01)
    assert backward[0][0] + backward[0][1] == pytest.approx(992, abs=1)


def test_a_long_step_has_a_small_picture_of_the_same_area():
    result = step("gpipe", micro_batches=5000, ranks=2, backward_input_s=[0.01, 0.03], reduce_bytes=None)
    picture = draw_pipeline(result)
    assert len(picture) < 40_000
    bar, scale = 22, 930 / result.makespan_s
    for (_, found), kind in zip(boxes(picture).items(), (simulation.FORWARD, simulation.BACKWARD), strict=True):
        work = result.events[result.events["kind"] == kind]
        area = sum(width * height for _, width, height in found)
        assert area == pytest.approx((work["end_s"] - work["begin_s"]).sum() * scale * bar, rel=0.02)
        assert all(height <= bar for *_, height in found)
    assert len(draw_pipeline(step(micro_batches=20000, ranks=2, forward_s=0, next_links=None))) < 5000


def test_a_step_that_takes_no_time_has_a_picture():
    nothing = {"forward_s": 0, "backward_input_s": 0, "backward_weight_s": 0, "next_links": None}
    ElementTree.fromstring(draw_pipeline(step(**nothing)))


def test_titles_are_escaped():
    picture = draw_pipeline(step(), title='<b> & "c"')
    assert ElementTree.fromstring(picture).find(f"{SVG}title").text == '<b> & "c"'


def test_bad_input_is_named(tmp_path):
    result = step()
    for bounds in ({"begin_s": 0.1, "end_s": 0.05}, {"begin_s": -1}, {"end_s": 100}, {"begin_s": float("nan")}):
        with pytest.raises(ValueError, match=r"begin_s is .* and end_s is .*, expected a part of the step's 0\.2"):
            draw_pipeline(result, **bounds)
    with pytest.raises(ValueError, match="width is 50, expected more than 162 pixels"):
        draw_pipeline(result, width=50)
    for function in (draw_pipeline, lambda simulated: write_chrome_trace(simulated, tmp_path / "none.json")):
        with pytest.raises(ValueError, match=r"simulation has 0 events, expected those of simulate\(..., events=True"):
            function(step(events=False))


def test_a_trace_has_all_events_in_microseconds(tmp_path):
    result = step("zbv")
    write_chrome_trace(result, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"rank 0", "rank 1", "rank 2"}
    work = [event for event in events if event["ph"] == "X"]
    begins = {event["id"]: event for event in events if event["ph"] == "b"}
    ends = {event["id"]: event for event in events if event["ph"] == "e"}
    assert len(work) + len(begins) == result.event_count
    assert begins.keys() == ends.keys()
    for number, begin in begins.items():
        end = ends[number]
        assert (begin["cat"], begin["name"], begin["pid"]) == (end["cat"], end["name"], end["pid"])
        assert begin["ts"] <= end["ts"]
    for kind, _, stage, micro_batch, begin, end in result.events.tolist():
        if kind == simulation.FORWARD and (stage, micro_batch) == (4, 3):
            expected = (begin * 1e6, (end - begin) * 1e6)
    (found,) = [event for event in work if event["name"] == "forward 3" and event["args"]["stage"] == 4]
    assert (found["ts"], found["dur"]) == expected
    for rank in range(3):  # work of a rank does not overlap
        lane = sorted((event["ts"], event["dur"]) for event in work if event["pid"] == rank)
        assert all(a + b <= c + 1e-6 for (a, b), (c, _) in pairwise(lane))
