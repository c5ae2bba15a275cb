"""The calls that the runtime adds to a plan: what decides which groups stay in a step, the record, and those
of the evaluation inside a run."""

from __future__ import annotations

from dataclasses import replace

from realflow.graph.evaluate import EVAL, SCORE, evaluated
from realflow.graph.refill import refilled
from realflow.planfile import Plan
from realflow.runtime.record import with_record


def completed(plan: Plan) -> Plan:
    """The plan as it is run."""
    return with_evaluation(with_record(with_refill(plan)))


def with_evaluation(plan: Plan) -> Plan:
    """The plan with the calls of its evaluation, which run where the rollout does. No step runs them."""
    graph = plan.graph
    rollout = evaluated(graph.calls)
    if graph.evaluate is None or rollout is None:
        return plan
    where = plan.calls[rollout.name]
    return replace(
        plan,
        graph=replace(graph, calls=(*graph.calls, *graph.evaluate.graph.calls)),
        calls={**plan.calls, EVAL: where, SCORE: replace(where, engine="python")},
    )


def with_refill(plan: Plan) -> Plan:
    """The plan with the call that decides which groups stay, where groups are replaced.

    It runs where the samples are drawn. What it says goes to the master, so it writes no field.
    """
    graph, rollout = plan.graph, refilled(plan.graph.calls)
    if rollout is None or rollout.refill is None:
        return plan
    call = replace(rollout.refill.call, writes={})
    return replace(
        plan,
        graph=replace(graph, calls=(*graph.calls, call)),
        calls={**plan.calls, call.name: replace(plan.calls[rollout.name], engine="python")},
    )
