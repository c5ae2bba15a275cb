"""report.html: whole runs, dead runs, hostile text, and the parts it is drawn with."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import NASTY, SECONDS, make_plan, make_trace, whole_run, write_metrics, write_samples

from realflow.errors import InputError
from realflow.observe.metrics import SamplesLog
from realflow.observe.plantable import ranges
from realflow.observe.report import render, write_report
from realflow.observe.rundata import load_run
from realflow.observe.svg import Interval, Series, line_chart, thin_out, ticks, timeline_chart, trailing_mean

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Strict(HTMLParser):
    """Collects tags and text, and fails where tags do not close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return dataclasses.replace(whole_run(tmp_path_factory.mktemp("runs")), plan=make_plan(), troubles=())


def test_a_whole_run_has_all_sections(run):
    page = Strict(render(run))
    text = "\n".join(page.text)
    for expected in (
        "complete: 45 of 45 steps",
        "Reward",
        "Loss",
        "Entropy",
        "Timeline of a step",
        "Seconds of each call",
        "At the start",
        "At the end",
        "Calls and where they ran",
        "d2t1p1",
        "step-000045",
    ):
        assert expected in text, expected
    assert all(name in text for name in SECONDS)
    assert "Not everything is here" not in text


def test_the_page_needs_no_network_and_runs_no_script(run):
    page = Strict(render(run))
    assert not {"script", "iframe", "object", "link"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        if tag == "img":
            assert attributes["src"].startswith("data:image/svg+xml;base64,")
            continue
        for name in ("src", "href", "xlink:href", "action"):
            assert "//" not in (attributes.get(name) or "")
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy and "default-src 'none'" in policy and "script-src" not in policy


def test_what_models_write_is_shown_and_never_markup(run):
    html = render(run)
    assert "<script" not in html and "<b>markup" not in html and "<i>comment" not in html
    text = "".join(Strict(html).text)
    assert NASTY.replace("\x1b", "\\x1b") in text


HOSTILE = st.text(st.sampled_from("<>&\"'/ \x00\ud800abc\n"), max_size=40)


@given(HOSTILE, HOSTILE, HOSTILE)
def test_any_text_gives_a_page_that_parses(tmp_path_factory, prompt, completion, call):
    folder = tmp_path_factory.mktemp("run")
    with SamplesLog(folder) as log:
        log.write([{"step": 0, "prompt": prompt, "completion": completion, "answer": {prompt: [completion]}}])
    trace = make_trace(0)
    trace.span(0, f"{call}@0", 0.0, 1.0, note=completion)
    trace.write(folder / "trace.json")
    page = Strict(write_report(folder).read_text(encoding="utf-8"))
    assert {attributes["href"] for tag, attributes in page.tags if tag == "a"} == {
        "trace.json",
        "samples.jsonl",
    }


@pytest.mark.parametrize("kept", ["graph.yaml", "plan.yaml", "metrics.jsonl", "samples.jsonl", "trace.json"])
def test_a_run_of_which_one_file_is_left(tmp_path, kept):
    source = whole_run(tmp_path, steps=3).run_dir
    left = tmp_path / "left"
    left.mkdir()
    content = b"not: [a plan" if kept == "plan.yaml" else (source / kept).read_bytes()
    (left / kept).write_bytes(content[: len(content) * 2 // 3])  # and it is cut off
    text = "".join(Strict(write_report(left).read_text(encoding="utf-8")).text)
    assert "Not everything is here" in text
    assert "checkpoints is missing" in text
    if kept in ("plan.yaml", "trace.json"):
        assert f"{kept} cannot be read" in text


def test_a_run_that_died_says_how_far_it_came(tmp_path):
    write_metrics(tmp_path, 4)
    write_samples(tmp_path, 5)
    html = render(dataclasses.replace(load_run(tmp_path), plan=make_plan(predictions=False)))
    assert "4 of 45 steps" in html and "stopped early" in html and "predicted" not in html


def test_a_failed_run_says_why(tmp_path):
    write_metrics(tmp_path, 2)
    (tmp_path / "error.txt").write_text("rank 1 died in train@2 <kill -9>", encoding="utf-8")
    text = "".join(Strict(write_report(tmp_path).read_text(encoding="utf-8")).text)
    assert "failed after 2 steps" in text and "rank 1 died in train@2 <kill -9>" in text


def test_no_run_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        write_report(tmp_path / "nothing")
    with pytest.raises(InputError, match="not a run's directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samples_are_of_the_first_two_and_last_two_steps_in_any_order(tmp_path):
    with SamplesLog(tmp_path) as log:
        for step in (3, 0, 9, 5, 1, 7, 2, 8, 4, 6):
            log.write([{"step": step, "sample_id": k, "rewards": k % 2} for k in range(1000)])
            log.write([{"step": step, "sample_id": 1, "rewards": 0, "again": True}])
    run = load_run(tmp_path)
    assert [step.step for step in run.samples] == [0, 1, 8, 9]
    assert all(step.count == 1000 and len(step.rows) == 512 for step in run.samples)
    assert run.samples[0].mean_reward == pytest.approx(499 / 1000)
    assert run.samples[0].rows[1]["again"]


def test_long_runs_and_many_ranks_stay_small(tmp_path):
    write_metrics(tmp_path, 3000)
    make_trace(6, ranks=300).write(tmp_path / "trace.json")
    path = write_report(tmp_path)
    assert path.stat().st_size < 6_000_000
    assert "128 of 300 ranks shown" in path.read_text(encoding="utf-8")


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(3, 12))
def test_ticks_are_round_few_and_inside(low, span, about):
    high = low + span
    found = ticks(low, high, about)
    assert 1 <= len(found) <= 2 * about + 2
    assert all(low - span * 1e-6 <= tick <= high + span * 1e-6 for tick in found)
    assert found == sorted(set(found))


FLOATS = st.none() | st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(FLOATS, max_size=400))
def test_charts_are_well_formed_and_inside_their_frame(values):
    points = list(enumerate(values))
    chart = line_chart([Series("a & b", points), Series("<c>", trailing_mean(points, 5), 1)], label='"x"')
    if all(value is None for value in values):
        assert chart == ""
        return
    svg = ElementTree.fromstring(chart)
    for line in svg.iter("polyline"):
        for x, y in (map(float, pair.split(",")) for pair in line.attrib["points"].split()):
            assert 0 <= x <= 560 and 0 <= y <= 240
            assert math.isfinite(x) and math.isfinite(y)


@given(st.lists(st.tuples(st.integers(), st.floats(-1e6, 1e6)), min_size=1, max_size=900))
def test_thinning_keeps_the_mean(points):
    few, share = thin_out(points, 100)
    assert len(few) <= 100
    weights = [min(share, len(points) - index * share) for index in range(len(few))]
    mean = sum(y * weight for (_, y), weight in zip(few, weights, strict=True)) / len(points)
    assert mean == pytest.approx(sum(y for _, y in points) / len(points), abs=1e-6)


def test_a_timeline_draws_each_bar_in_its_row():
    bars = [Interval(1, 0.5, 1.0, 3, "train", "a\n<b>"), Interval(0, 0.0, 2.0, 0, "rollout", "t", thin=True)]
    svg = ElementTree.fromstring(timeline_chart(["rank 0", "rank 1"], bars, 2.0, width=1084))
    drawn = [rect for rect in svg.iter("rect") if rect.attrib["class"].startswith("fill")]
    assert [(rect.attrib["x"], rect.attrib["width"]) for rect in drawn] == [
        ("320.00", "250.00"),
        ("70.00", "1000.00"),
    ]
    assert [title.text for title in svg.iter("title")] == ["a\n<b>", "t"]


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([3, 2]) == "3, 2"


def test_colours_of_the_style_exist():
    from realflow.observe.style import CSS
    from realflow.observe.svg import COLOURS

    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", CSS))
    assert used <= set(re.findall(r"--([a-z0-9-]+):", CSS))
    assert {f"c{index}" for index in range(COLOURS)} <= used
