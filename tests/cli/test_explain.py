"""`realflow explain`: a plan estimated anew, its timeline drawn, what its step hangs on, and a page of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from realflow.cli import main
from realflow.planfile import read_plan

pytestmark = pytest.mark.usefixtures("model_cache")


def ok(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    argv = ["plan", "grpo", "model=small-llama", "--devices", "4", *words, "-o", "p.yaml"]
    ok(capsys, *argv)


def told(out: str) -> str:
    return " ".join(out.split())


def test_the_timeline_is_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = ["d1@3", "rollout=d2@0-1", "train=d2@2-3"]
    planned(capsys, *[word for layout in layouts for word in ("--layout", layout)])
    monkeypatch.setenv("COLUMNS", "100")
    lines = ok(capsys, "explain", "p.yaml").splitlines()
    start = lines.index("Timeline of a step, as predicted")
    drawn = {}
    for line in lines[start + 1 :]:
        if not line.startswith(("rank", "CPUs")):
            break
        name = re.match(r"ranks? [\d,-]+|CPUs", line)
        assert name and len(line) <= 100
        drawn[name[0]] = line[name.end() :]
    assert "▕rollout━" in drawn["ranks 0-1"] and "train" not in drawn["ranks 0-1"]
    assert "▕train━" in drawn["rank 2"] and "▕ref━" in drawn["rank 3"]
    assert drawn["rank 2"].index("train") > drawn["ranks 0-1"].index("rollout")
    shown = told("\n".join(lines))
    assert "Critical path rollout on 0-1:" in shown or "Critical path moving weights to rollout" in shown
    assert "train on 2-3" in shown and "waited for results of" in shown
    assert "What would shorten a step If " in shown
    assert re.search(r"Ranks 0-1 are idle for \d+% of a step", shown)
    step = read_plan("p.yaml").step_seconds
    assert step and f"Prediction: {step:.3f} s a step" in shown


def test_a_plan_that_was_edited_is_estimated_anew(capsys: pytest.CaptureFixture[str]) -> None:
    planned(capsys)
    first = told(ok(capsys, "explain", "p.yaml"))
    assert "estimated anew" not in first and "gap" in first
    text, before = Path("p.yaml").read_text(), read_plan("p.yaml")
    assert before.step_seconds is not None
    old = f"micro_batch_tokens: {before.calls['ref'].micro_batch_tokens}\n"
    head, ref, rest = text.partition("  ref:\n")
    Path("p.yaml").write_text(head + ref + rest.replace(old, "micro_batch_tokens: 32\n", 1))
    then = told(ok(capsys, "explain", "p.yaml"))
    assert "note: Seconds are estimated anew:" in then and "in the file (ref " in then
    assert "gap" not in then, "what was proven holds no more"
    found = re.search(r"Prediction: ([\d.]+) s a step", then)
    assert found and float(found[1]) > before.step_seconds


class Page(HTMLParser):
    """Tags of a page, all closed in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        assert not any("//" in (value or "") for name, value in attrs if name in ("src", "href"))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    planned(capsys, "--layout", "d4", "--layout", "rollout=t3@0-2")
    assert "p.html: the timeline as a page" in ok(capsys, "explain", "p.yaml", "--html", "p.html")
    source = Path("p.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "default-src 'none'" in source and "prefers-color-scheme: dark" in source
    for words in ("Timeline of a step", "Critical path", "What would shorten a step", "Notes of the plan"):
        assert words in page.text
    assert source.count('<g class="bar">') >= 5 and "moving weights to rollout" in page.text
    assert re.search(r"train\nranks 0-2\n[\d.e-]+ s, from", page.text) or "train\nrank" in page.text


def test_without_the_profile_seconds_are_those_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    planned(capsys)
    text = Path("p.yaml").read_text()
    Path("p.yaml").write_text(text.replace("hashes:\n", 'hashes:\n  profile: "0123456789abcdef"\n'))
    shown = told(ok(capsys, "explain", "p.yaml"))
    assert "Seconds are those of the file: the profile 0123456789abcdef" in shown and "--profile" in shown
    assert "Timeline of a step, as predicted" in shown and "Critical path" not in shown
