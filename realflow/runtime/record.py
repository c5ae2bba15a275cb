"""The call that the core adds to a plan: it records finished samples for samples.jsonl."""

from __future__ import annotations

from dataclasses import replace

from realflow.graph.types import Call, FieldUse, FunctionDecl
from realflow.planfile import Plan
from realflow.runtime.readiness import main_rollout

RECORD = ":record"
"""Name of the call that the core adds to write samples.jsonl; no user's call can be named so."""

MASK = ":loss_mask"
"""Its name for the rollout's loss mask, which is read for the lengths of prompt and response alone."""


def with_record(plan: Plan) -> Plan:
    """The plan with the call that records the main rollout's samples, if something is generated.

    It runs whenever that call does, and reads what the calls that then run too write for each sample.
    What the rollout writes it records under the names that every rollout's fields have.
    """
    graph = plan.graph
    rollout = main_rollout(graph)
    if rollout is None:
        return plan
    there = [call for call in graph.calls if (rollout.every or 1) % (call.every or 1) == 0]
    hidden = {call.writes.get("group_id") for call in there if call.op == "generate"}
    wanted = [
        field
        for writer in there
        for field in writer.writes.values()
        if graph.extents.get(field) == "sample" and field not in hidden
    ]
    own = {field: name for name, field in rollout.writes.items() if name not in wanted}
    uses = [FieldUse(own.get(field, field), field, "sample", graph.dtypes[field]) for field in wanted]
    mask = rollout.writes["loss_mask"]
    reads = (*uses, FieldUse(MASK, mask, "token", "bool"))
    decl = FunctionDecl(RECORD, "function", reads=reads, scope="group")
    names = {use.name: use.field for use in reads}
    call = Call(RECORD, "function", decl, reads=names, every=rollout.every)
    where = plan.calls[rollout.name]
    return replace(
        plan,
        graph=replace(graph, calls=(*graph.calls, call)),
        calls={**plan.calls, RECORD: replace(where, engine="python")},
    )
