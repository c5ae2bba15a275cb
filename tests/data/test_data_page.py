"""The sections of docs/data.md are read and opened as they stand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from realflow.data.source import open_source
from realflow.graph import load_graph

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
REST = """\
name: page
models: {actor: {path: some-model}}
calls:
  rollout: {model: actor, op: generate, batch: 8 prompts, samples: 2, max_new_tokens: 16}
  reward: {op: function, use: rewards.last_number}
steps: 2
"""


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_its_sections(tmp_path: Path, block: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"question": f"{i}?", "answer": f"{i}", "extra": {"answer": "4"}} for i in range(9)]
    for name in ("math.jsonl", "gsm.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part in (1, 2):
        table = arrow.table({"question": ["a", "b"], "solution": ["1", "2"]})
        parquet.write_table(table, tmp_path / f"math-{part}.parquet")
    (tmp_path / "page.yaml").write_text(block + REST)
    graph = load_graph(tmp_path / "page.yaml")
    source = open_source(replace(graph.data), seed=1, base=tmp_path)
    found = [source.row(g) for g in range(40)]
    assert all(row.keys() == graph.data.fields.keys() for row in found)
    if graph.data.sources:
        assert {row["source"] for row in found} == {"gsm", "math", "chain_sum"}
        assert sum(row["source"] == "gsm" for row in found) == 24
