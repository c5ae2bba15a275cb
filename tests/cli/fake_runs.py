"""A launcher that starts nothing: it answers problems by a rule, and records that as a run does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realflow.data.source import open_source
from realflow.errors import RunError
from realflow.graph.types import Graph
from realflow.planfile import Plan
from realflow.runtime.directory import prepare
from realflow.runtime.readiness import main_rollout


def completion(graph: Graph, row: Mapping[str, Any], number: int) -> str:
    """An answer that hangs, as a real one does, on seed, draw id and temperature."""
    call = main_rollout(graph)
    assert call is not None and call.sampling is not None
    heat = call.sampling.temperature
    key = f"{graph.seed} {row['draw_id'] + number} {heat}" if heat else f"greedy {row['prompt']}"
    luck = hashlib.sha256(key.encode()).digest()[0] / 255
    answer = row.get("answer")
    return f"The answer is \\boxed{{{answer if luck < 0.6 else 'unknown'}}}."


def reward(text: str, row: Mapping[str, Any]) -> float | None:
    """1 where the answer stands in the text; None for problems that say `unjudged`."""
    if "unjudged" in str(row["prompt"]):
        return None
    return float(f"{{{row.get('answer')}}}" in text)


@dataclass
class Launcher:
    """Stands in for `realflow.launch.local.supervise`. `stop_after` problems it fails, once."""

    plans: list[Plan] = field(default_factory=list)
    stop_after: int | None = None
    drawn: int = 0

    def supervise(self, plan: Plan, run_dir: Path, *, quiet: bool = False) -> None:
        """Draw, and write samples.jsonl."""
        self.plans.append(plan)
        prepare(plan, run_dir)
        graph = plan.graph
        base = Path(graph.folder) if graph.folder else None
        source = open_source(graph.data, seed=graph.seed, base=base)
        with (run_dir / "samples.jsonl").open("w") as file:
            for group in range(graph.steps * graph.prompts):
                if self.stop_after is not None and group == self.stop_after:
                    self.stop_after = None
                    file.write('{"step": 0, "sam')  # a line that was cut off
                    raise RunError("rank 0 has died during rollout@0")
                row = source.row(group)
                for number in range(graph.samples):
                    self.drawn += 1
                    file.write(json.dumps(record(graph, row, group, number)) + "\n")


def record(graph: Graph, row: Mapping[str, Any], group: int, number: int) -> dict[str, Any]:
    """A line of a run's samples.jsonl."""
    text = completion(graph, row, number)
    return {
        "step": group // graph.prompts,
        "sample_id": group * graph.samples + number,
        "group_id": group,
        **{name: value for name, value in row.items() if isinstance(value, str | int | float | list)},
        "completion": text,
        "finish_reason": "stop",
        "rewards": reward(text, row),
        "length": len(text),
        "prompt_length": len(str(row["prompt"])),
    }
