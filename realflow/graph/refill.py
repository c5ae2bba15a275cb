"""`refill:` of a generate call: groups that a function drops leave the step, others are drawn in their place.

rollout: {op: generate, ..., refill: {use: select.mixed, most: 3}}

A round draws prompts, and what the function reads is computed for all of them; then it decides. This is the
dynamic sampling of DAPO (arXiv 2503.14476).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from realflow.graph.schema import Section
from realflow.graph.types import Call, FunctionDecl, Refill

REFILL = ":refill"
"""Name of the call that decides, which the runtime adds; no user's call can be named so."""


def check_decider(section: Section, decl: FunctionDecl) -> None:
    """The function must say of each sample of a group whether it stays."""
    written = [(use.extent, use.dtype) for use in decl.writes]
    if decl.scope != "group" or written != [("sample", "bool")] or decl.state:
        section.problem(
            f"{decl.name} cannot decide which groups stay: expected a function of scope group, without "
            "state, that writes one field, a bool for each sample, such as select.mixed",
            "use",
        )


def refilled(calls: Sequence[Call]) -> Call | None:
    """The generate call whose groups are replaced, if there is one."""
    return next((call for call in calls if call.refill is not None), None)


def judges(calls: Sequence[Call], refill: Refill) -> frozenset[str]:
    """The calls that run before it is decided which groups stay: all that the decision hangs on."""
    writers = {name: call for call in calls for name in call.writes.values()}
    found: dict[str, Call] = {}
    waiting = [writers[name] for name in refill.call.reads.values() if name in writers]
    while waiting:
        call = waiting.pop()
        if call.name not in found:
            found[call.name] = call
            waiting += [writers[name] for name in call.reads.values() if name in writers]
    return frozenset(found)


def refill_to_mapping(refill: Refill) -> dict[str, Any]:
    """Plain values that are read back as the same."""
    call = refill.call
    fields = {use.name: use.field for use in call.decl.reads}
    renamed = {name: field for name, field in call.reads.items() if fields[name] != field}
    options = {name: value for name, value in call.options.items() if value != call.decl.options[name]}
    found: dict[str, Any] = {"use": call.decl.name, "most": refill.most}
    return found | ({"options": options} if options else {}) | ({"reads": renamed} if renamed else {})
