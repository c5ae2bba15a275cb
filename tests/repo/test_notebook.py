"""RealFlow in a notebook: plan and run a tiny graph for one step."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest
from tiny import tiny_model

CELLS = [
    "from realflow import Graph, plan, run",
    """graph = Graph.load("grpo", [
    "model={model}", "steps=1", "prompts=2", "samples=2", "max_new_tokens=8",
])
graph.name""",
    "layout = plan(graph, devices=2)\nlen(layout.cluster.devices)",
    "result = run(layout, name='notebook')\nsorted(path.name for path in result.run_dir.iterdir())",
    "result.metrics[-1]['critic/rewards/mean']",
]


@pytest.mark.timeout(240)
def test_a_notebook_plans_and_runs(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", vocab=128)
    cells = [nbformat.v4.new_code_cell(source.replace("{model}", str(model))) for source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = [cell["outputs"][-1]["data"]["text/plain"] for cell in notebook.cells[1:]]
    assert shown[0] == "'grpo'"
    assert shown[1] == "2"
    assert "metrics.jsonl" in shown[2] and "checkpoints" in shown[2]
    assert 0.0 <= float(shown[3]) <= 1.0
