"""Checks of `refill:`: what its function reads is there, and hangs on what is drawn, not on a whole step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from realflow.graph.check import Column, mismatch, missing_hint
from realflow.graph.refill import judges
from realflow.graph.schema import Report
from realflow.graph.types import Call


def wire_refill(
    given: Sequence[Call], columns: Mapping[str, Column], report: Report, *, complete: bool
) -> tuple[Call, ...]:
    """The calls, with what `refill` reads found among the fields, and checked.

    `complete`: every field is known, so that one that is missing is missed.
    """
    calls = {call.name: call for call in given}
    with_refill = [call for call in given if call.refill is not None]
    for other in with_refill[1:]:
        message = f"call {with_refill[0].name} has 'refill' already; one call decides on the groups of a step"
        report.add(("calls", other.name, "refill"), message)
    for call in with_refill[:1]:
        assert call.refill is not None
        inner = call.refill.call
        missing = {use.name for use in inner.decl.reads if inner.reads[use.name] not in columns}
        optional = {use.name for use in inner.decl.reads if use.optional}
        if complete:
            _check_reads(call, columns, missing - optional, report)
        reads = {name: field for name, field in inner.reads.items() if name not in missing & optional}
        refill = replace(call.refill, call=replace(inner, reads=reads))
        if complete and not missing - optional:
            _check_judges(call, judges(given, refill), calls, report)
        calls[call.name] = replace(call, refill=refill)
    return tuple(calls.values())


def _check_reads(call: Call, columns: Mapping[str, Column], missing: set[str], report: Report) -> None:
    assert call.refill is not None
    inner, path = call.refill.call, ("calls", call.name, "refill")
    for use in inner.decl.reads:
        name = inner.reads[use.name]
        if use.name in missing:
            hint = missing_hint(name, call, columns)
            report.add(path, f"reads the field {name!r}, which nothing writes; {hint}")
        elif name in columns and (message := mismatch(use, columns[name])):
            report.add(path, f"reads the field {name!r} {message} (written by {columns[name].writer})")


def _check_judges(call: Call, names: frozenset[str], calls: Mapping[str, Call], report: Report) -> None:
    """Rounds have no end that is known before: nothing that sees a whole step can come before them."""
    path = ("calls", call.name, "refill")
    if call.name not in names:
        report.add(path, "reads nothing that hangs on what this call draws; expected it to, such as rewards")
    if call.every is not None:
        report.add(path, f"the call runs every {call.every} steps; groups are replaced in every step")
    for name in sorted(names):
        judge = calls[name]
        if judge.op == "function" and judge.decl.scope == "batch":
            report.add(
                path,
                f"what it reads hangs on call {name}, whose function {judge.decl.name} sees a whole batch: "
                "there is none before it is decided which groups stay",
            )
