"""Seconds of calls without a model: functions on the CPUs, which may run while samples still come."""

from __future__ import annotations

from planner.costs.values import CallCost, Tally
from planner.lengths import Lengths
from planner.loads import How
from planner.rates import Rates, Seconds
from realflow.graph.types import Call, Graph

SAMPLE_SECONDS = 1e-3
"""What a user's function is taken to need for a sample where nothing is known of it: text that is parsed, and
an answer compared, takes less; code that is run takes far more. (What built-in functions take is in the
constant `sample` of the rates, which the rollout pays.)"""

_LATE = 0.02
"""Samples whose response is at most so much shorter than the longest end together with it, or nearly so."""


def streams(graph: Graph, call: Call) -> bool:
    """Whether a function works on samples while others are still drawn: it takes them one by one, or
    group by group, and so does everything before it back to a rollout."""
    if call.op == "generate":
        return True
    if call.op != "function" or call.decl.scope == "batch":
        return False
    writers = [graph.writer(name) for name in call.reads.values()]
    return all(writer is None or streams(graph, writer) for writer in writers)


def function_cost(
    graph: Graph, lengths: Lengths, rates: Rates, call: Call, how: How, seconds: float | None
) -> CallCost:
    """Seconds after the last of its inputs is there. `seconds` is what a sample takes (None: assumed, or, of
    a built-in function, nothing that counts).

    A function that streams has done all but the samples that end last by then.
    """
    total, ranks = graph.prompts * graph.samples, how.layout.size
    count = total / ranks
    if streams(graph, call):
        unit = {"sample": 1, "group": graph.samples, "batch": total}[call.decl.scope]
        count = min(count, max(unit, late_samples(graph, lengths) / ranks))
    assumed = seconds is None and ":" in call.decl.name
    each = SAMPLE_SECONDS if assumed else seconds or 0.0
    tally = Tally()
    tally.add("dispatch", rates.constant("dispatch"))
    tally.add("samples", Seconds(each * count))
    return tally.cost(f"{call.name}: {each * 1e3:g} ms for each sample" if assumed else "")


def late_samples(graph: Graph, lengths: Lengths) -> float:
    """Samples of a step that end together with the last one."""
    most = max(pair.response for pair in lengths.pairs)
    share = sum(pair.weight for pair in lengths.pairs if pair.response >= (1 - _LATE) * most)
    return share * graph.prompts * graph.samples
