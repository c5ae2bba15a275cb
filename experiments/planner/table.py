"""What is recorded of the scenarios, as a table for people, and a summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import Case
from record import record

_EQUAL = 1e-6
"""Makespans that differ by less, as a part of them, are equal."""


def write_table(results: Path, cases: Sequence[Case], seconds: float) -> str:
    """Write `table.md` and `summary.json` of what is there; returns the table."""
    rows = [row for case in cases if (row := _row(results / case.name, case, seconds)) is not None]
    if not rows:
        return "nothing is recorded yet"
    text = _markdown(rows, seconds)
    (results / "table.md").write_text(text, encoding="utf-8")
    record(results / "summary.json", {"annealing_seconds": seconds, "scenarios": rows})
    return text


def _row(folder: Path, case: Case, seconds: float) -> dict[str, Any] | None:
    searches = {
        meshes: [_read(path) for path in sorted(folder.glob(f"search-{meshes}-[0-9].json"))]
        for meshes in ("any", "powers")
    }
    if not searches["any"]:
        return None
    worst = max(one["makespan"] for one in searches["any"])
    rivals = {
        "uniform": [_read(path) for path in folder.glob("uniform.json")],
        "megatron": [_read(path) for path in folder.glob("megatron.json")],
        "anneal": [_read(path) for path in sorted(folder.glob(f"anneal-*-{seconds:g}s.json"))],
    }
    against = {name: _against(found, worst) for name, found in rivals.items()}
    return {
        "scenario": case.name,
        "devices": case.devices,
        **{meshes: _searched(case, meshes, found) for meshes, found in searches.items() if found},
        "rivals": against,
        "never_above": all(one["never_above"] for one in against.values() if one),
    }


def _searched(case: Case, meshes: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst of several seeds, held against what is asked."""
    gap, took = max(one["gap"] for one in found), max(one["seconds"] for one in found)
    used = max(one["cpu_seconds"] for one in found)
    return {
        "options": found[0]["options"],
        "considered": found[0]["considered"],
        "seconds": took,
        "cpu_seconds": used,
        "makespan": max(one["makespan"] for one in found),
        "bound": min(one["bound"] for one in found),
        "gap": gap,
        "asked": {"gap": case.gap(meshes), "seconds": case.seconds},
        "met": gap <= case.gap(meshes) and used <= case.seconds,
        "plan": found[0]["plan"],
    }


def _against(found: Sequence[dict[str, Any]], worst: float) -> dict[str, Any] | None:
    """A rival's plans against the worst that a search found: how much longer a step is."""
    if not found:
        return None
    known = [one["makespan"] for one in found if one["makespan"] is not None]
    return {
        "runs": len(found),
        "fitting": len(known),
        "best": min(known, default=None),
        "longer": min(known) / worst - 1 if known else None,
        "longer_mean": sum(known) / len(known) / worst - 1 if known else None,
        "never_above": all(worst <= other * (1 + _EQUAL) for other in known),
    }


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert isinstance(found, dict)
    return found


def _markdown(rows: Sequence[dict[str, Any]], seconds: float) -> str:
    head = (
        "scenario", "options considered", "search s", "step s", "bound s", "gap", "gap (powers of 2)",
        "one layout", "Megatron rule", f"annealing {seconds:g} s: best, mean", "as asked",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        one, powers = row["any"], row.get("powers")
        met = [meshes for meshes in ("any", "powers") if meshes in row and not row[meshes]["met"]]
        cells = [
            row["scenario"],
            f"{one['considered']:,}",
            _seconds(one) + (f" / {_seconds(powers)}" if powers else ""),
            f"{one['makespan']:.4g}",
            f"{one['bound']:.4g}",
            f"{one['gap']:.2%}",
            f"{powers['gap']:.2%}" if powers else "",
            _longer(row["rivals"]["uniform"]),
            _longer(row["rivals"]["megatron"]),
            _longer(row["rivals"]["anneal"], mean=True),
            (f"no: {', '.join(met)}" if met else "yes") + ("" if row["never_above"] else "; above a rival"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        "Seconds of the search are those of one core (in brackets those of the clock), for meshes of any "
        "length / of powers of two, from the graph file to the plan. Rivals: how much longer a step is with "
        "their plan."
    )
    return "\n".join([*lines, "", note, ""])


def _seconds(found: dict[str, Any]) -> str:
    return f"{found['cpu_seconds']:.1f} ({found['seconds']:.1f})"


def _longer(found: dict[str, Any] | None, *, mean: bool = False) -> str:
    if found is None:
        return ""
    if found["longer"] is None:
        return "fits not"
    return f"{found['longer']:+.1%}" + (f", {found['longer_mean']:+.1%} ({found['runs']})" if mean else "")
