"""The report's plan: where and how each call ran, and the memory that was planned."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from realflow.graph import to_svg
from realflow.graph.types import Graph
from realflow.observe.rundata import RunData
from realflow.planfile import Plan
from realflow.planfile.flags import flag_words

_MOST_RANKS = 16


def section(run: RunData) -> str:
    """Calls, memory, reallocations and notes of the plan; the graph as text."""
    parts = []
    if run.plan:
        plan = run.plan
        parts = [_drawing(plan.graph), tables(plan, "Calls and where they ran")]
    if run.graph_text:
        parts.append(
            '<div class="card below"><details><summary>graph.yaml</summary>'
            f"<pre>{escape(run.graph_text)}</pre></details></div>"
        )
    return "".join(part for part in parts if part)


def tables(plan: Plan, title: str = "Calls") -> str:
    """Calls (under a title), memory, reallocations and notes of a plan."""
    return "".join([_calls(plan, title), _reallocs(plan), _memory(plan), _notes(plan)])


def _drawing(graph: Graph) -> str:
    """The graph, drawn; as an image, so that its styles and the page's stay apart."""
    data = base64.b64encode(to_svg(graph).encode("utf-8", errors="replace")).decode("ascii")
    return (
        '<div class="card below"><details open><summary>The graph</summary><div class="drawing">'
        f'<img alt="Calls of {escape(graph.name)}" src="data:image/svg+xml;base64,{data}"></div>'
        "</details></div>"
    )


def ranges(ranks: Sequence[int]) -> str:
    """Ranks in short: `ranges([0, 1, 2, 5]) == "0-2, 5"`; the order given is kept."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A card with a table; cells are text and escaped here."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card scroll below"><h3>{escape(title)}</h3><table><tr>{top}</tr>{body}</table></div>'


def _calls(plan: Plan, title: str) -> str:
    rows = []
    for call in plan.graph.calls:
        how = plan.calls.get(call.name)
        if how is None:
            continue
        model = how.engine in ("train", "infer", "native", "vllm")
        batch = f"{how.slots} slots" if call.op == "generate" else f"{how.micro_batch_tokens} tokens"
        rows.append(
            (
                call.name,
                call.op,
                call.model or "",
                call.decl.name,
                ranges(how.ranks),
                str(how.layout),
                how.engine,
                batch if model else "",
                " ".join(flag_words(how)),
                *([] if how.predicted_seconds is None else [f"{how.predicted_seconds:.4g}"]),
            )
        )
    head = ("call", "op", "model", "function", "ranks", "layout", "engine", "at once", "flags")
    known = any(how.predicted_seconds is not None for how in plan.calls.values())
    return _table(title, (*head, "predicted s") if known else head, rows)


def _reallocs(plan: Plan) -> str:
    rows = [
        (
            entry.model,
            f"{entry.source} → {entry.destination or entry.follower}",
            _size(entry.bytes),
            _size(entry.lower_bound_bytes),
        )
        for entry in plan.reallocs
    ]
    return _table("Weights moved between calls", ("model", "from → to", "bytes", "lower bound"), rows)


def _memory(plan: Plan) -> str:
    ranks = sorted(plan.memory)[:_MOST_RANKS]
    causes = list(dict.fromkeys(cause for rank in ranks for cause in plan.memory[rank]))
    rows = [
        (
            str(rank),
            plan.moments.get(rank, ""),
            *(_size(plan.memory[rank].get(cause, 0)) for cause in causes),
            _size(sum(plan.memory[rank].values())),
        )
        for rank in ranks
    ]
    left = len(plan.memory) - len(ranks)
    title = "Planned memory of each rank" + (f" (the first {len(ranks)}; {left} more)" if left > 0 else "")
    return _table(title, ("rank", "worst at", *causes, "sum"), rows)


def _notes(plan: Plan) -> str:
    if not plan.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in plan.notes)
    return f'<div class="card below"><h3>Notes of the plan</h3><ul>{items}</ul></div>'


def _size(count: int) -> str:
    """Bytes for people: `269.0 MB`."""
    for limit, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count} B"
