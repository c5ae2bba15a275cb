"""Rewards of several kinds in one small real run: their fields, and their metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import execute, write_graph

CALLS = """\
  program: {op: function, use: rewards.code, reads: {tests: answer}, writes: {rewards: program}}
  form: {op: function, use: rewards.format, options: {pattern: "[a-z]*"}, writes: {rewards: form}}
  long: {op: function, use: rewards.overlong, options: {limit: 8, buffer: 4}, writes: {rewards: long}}
  letters: {op: function, use: my_rewards:letters, writes: {rewards: letters}}
  reward:
    op: function
    use: rewards.weighted
    reads: {first: letters, second: program, third: long}
    options: {weights: [1.0, 0.5, 0.1], names: [letters, program, long]}
"""


@pytest.mark.full
def test_each_part_is_reported_under_its_name(tmp_path: Path) -> None:
    path = write_graph(tmp_path)
    text = path.read_text()
    start = text.index("  reward:")
    end = text.index("  ref:\n    model: ref")
    path.write_text(text[:start] + CALLS + text[end:])
    data = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text(
        "".join(json.dumps({**row, "answer": f"assert f() == {i}"}) + "\n" for i, row in enumerate(rows))
    )
    execute(path, tmp_path / "run", 2, ("steps=1",))
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert step["reward/code/no_program"] == 1.0 and step["program/program/mean"] == 0.0
    assert step["reward/format/timeout"] == 0.0
    assert -1 <= step["long/long/mean"] <= 0 == step["reward/long/missing"]
    total = step["reward/letters"] + 0.5 * step["reward/program"] + 0.1 * step["reward/long"]
    assert step["critic/rewards/mean"] == pytest.approx(total, abs=1e-6)
