"""What the planner says of a plan that was run, from a profile and the lengths that a run had."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.decoder import read_decoder
from planner.estimate import estimate
from planner.profile import Profile
from planner.search import MOVE
from realflow.graph.types import Graph, LengthsSpec
from realflow.models.paths import resolve_model
from realflow.planfile import Plan


def predict(plan: Plan, profile: Profile, lengths: Sequence[Sequence[int]], common: int) -> dict[str, Any]:
    """Seconds of each call, of each move, and of a step; `lengths` are (prompt, response) of samples of a
    run of the same workload, whose prompts all begin with `common` tokens."""
    decoders = {
        name: read_decoder(json.loads((resolve_model(spec.path) / "config.json").read_text()), spec.head)
        for name, spec in plan.graph.models.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        graph = _with_lengths(plan.graph, lengths, common, Path(folder) / "samples.jsonl")
        found = estimate(replace(plan, graph=graph), decoders, profile=profile)
    return {
        "step": found.step_seconds,
        "bookkeeping": found.bookkeeping,
        "calls": {name: cost.seconds for name, cost in found.costs.items()},
        "parts": {name: dict(cost.parts) for name, cost in found.costs.items()},
        "uncertain": {name: dict(cost.uncertain) for name, cost in found.costs.items() if cost.uncertain},
        "moves": {
            entry.what.removeprefix(MOVE): entry.end - entry.start
            for entry in found.timeline.entries
            if entry.what.startswith(MOVE)
        },
    }


def _with_lengths(graph: Graph, lengths: Sequence[Sequence[int]], common: int, trace: Path) -> Graph:
    rows = [json.dumps({"prompt_length": prompt, "length": response}) for prompt, response in lengths]
    trace.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return replace(graph, lengths=LengthsSpec(trace=str(trace), common=common))
