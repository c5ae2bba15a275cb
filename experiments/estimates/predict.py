"""What the planner says of a plan that was run, from a profile and the lengths that the run had."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.costs import Costs
from planner.decoder import read_decoder
from planner.lengths import read_lengths
from planner.profile import Profile
from planner.rates import make_rates
from planner.search import Call, Move, Option, Placed, Problem, Slot, evaluate
from realflow.graph.types import Graph, LengthsSpec
from realflow.models.paths import resolve_model
from realflow.planfile import Plan


def predict(
    plan: Plan, profile: Profile | None, lengths: Sequence[Sequence[int]], common: int
) -> dict[str, Any]:
    """Seconds of each call, of each move, and of a step; `lengths` are (prompt, response) of samples of a
    run of the same workload, whose prompts all begin with `common` tokens."""
    graph = _with_lengths(plan.graph, lengths, common)
    node = plan.cluster.nodes[0]
    decoders = {
        name: read_decoder(json.loads((resolve_model(spec.path) / "config.json").read_text()), spec.head)
        for name, spec in graph.models.items()
    }
    costs = Costs(graph, decoders, read_lengths(graph), make_rates(node, profile), per_node=node.devices)
    found = {call.name: costs.call(call.name, plan.calls[call.name]) for call in graph.calls}
    problem = _problem(plan, costs, {name: cost.seconds for name, cost in found.items()})
    choice = {call.name: Placed(0, call.options[0].places[0]) for call in problem.calls}
    timeline = evaluate(problem, choice, tuple(Slot(call.name) for call in problem.calls))
    bookkeeping = costs.rates.constant("step").value
    return {
        "step": timeline.makespan + bookkeeping,
        "calls": {name: cost.seconds for name, cost in found.items()},
        "parts": {name: dict(cost.parts) for name, cost in found.items()},
        "uncertain": {name: dict(cost.uncertain) for name, cost in found.items() if cost.uncertain},
        "moves": {
            entry.what: entry.end - entry.start
            for entry in timeline.entries
            if entry.what.startswith("move:")
        },
    }


def _with_lengths(graph: Graph, lengths: Sequence[Sequence[int]], common: int) -> Graph:
    folder = Path(tempfile.mkdtemp(prefix="lengths-"))
    rows = [json.dumps({"prompt_length": prompt, "length": response}) for prompt, response in lengths]
    trace = folder / "samples.jsonl"
    trace.write_text("\n".join(rows) + "\n")
    return replace(graph, lengths=LengthsSpec(trace=str(trace), common=common))


def _problem(plan: Plan, costs: Costs, seconds: Mapping[str, float]) -> Problem:
    """The step of a plan: one option for each call, where the plan puts it."""
    graph, trained = plan.graph, plan.graph.trained()
    calls, moves = [], {}
    for call in graph.calls:
        where = plan.calls[call.name]
        after = {writer.name for name in call.reads.values() if (writer := graph.writer(name))}
        if call.op == "train":
            after |= {other.name for other in graph.calls if other.model == call.model} - {call.name}
        places = (range(min(where.ranks), max(where.ranks) + 1) if call.model else range(0),)
        option = Option(
            places,
            seconds[call.name] / (call.every or 1),
            layout=f"t{where.layout.tp}p{where.layout.pp}",
            keeps=where.after != "free",
            offload_seconds=costs.offload(call.name, where).value,
        )
        calls.append(Call(call.name, (option,), tuple(sorted(after)), call.model, call.op == "train"))
        if call.model in trained and call.op != "train":
            home = plan.calls[trained[call.model].name]
            found = costs.move(call.model, call.model, home.layout, where.layout, plan.world_size)
            key = call.model, f"t{home.layout.tp}p{home.layout.pp}", option.layout
            moves[key] = Move(found.inside, found.apart)
    return Problem((0,) * plan.world_size, tuple(calls), moves)
