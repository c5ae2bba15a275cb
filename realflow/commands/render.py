"""A plan as tables in the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from planner import overfull
from realflow.commands.common import when
from realflow.commands.timeline import draw
from realflow.graph import describe
from realflow.layout import DeviceMesh, Layout
from realflow.models.card import Card
from realflow.models.layouts import is_cut
from realflow.models.partition import Partition, Stage, partition, with_head
from realflow.planfile import Plan
from realflow.planfile.check import ENGINES_OF
from realflow.planfile.flags import flag_words
from realflow.planfile.notes import after_notes, idle_notes
from realflow.planfile.ranks import format_ranks

_PLAIN_WIDTH = 120  # of a pipe or file, which has no width of its own
_WIDEST = 160  # of a drawn timeline
_SIDE_BY_SIDE = 4  # groups of ranks in one memory table: they fit into 80 columns


def render_plan(
    plan: Plan,
    console: Console | None = None,
    cards: Mapping[str, Card] | None = None,
    *,
    path: Sequence[str] = (),
    advice: Sequence[str] = (),
) -> None:
    """Print a plan: cluster, calls, how models are cut, reallocs, memory by cause, timeline and notes.

    How a model is cut is shown where its card is given. `path` and `advice` say what the step's length hangs
    on, and what would shorten it.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, _PLAIN_WIDTH)
    drawn = draw(plan, min(console.width, _WIDEST)) if plan.timeline else []
    for part in _parts(plan, cards or {}, drawn, path, advice):
        console.print(part)


def _parts(
    plan: Plan,
    cards: Mapping[str, Card],
    drawn: Sequence[RenderableType],
    path: Sequence[str],
    advice: Sequence[str],
) -> list[RenderableType]:
    parts: list[RenderableType] = [
        Text(f"{plan.graph.name}: {describe(plan.graph)}", style="bold"),
        Text(_cluster(plan)),
        _calls(plan),
        *_cuts(plan, cards),
    ]
    parts.append(
        _reallocs(plan) if plan.reallocs else Text("Reallocation: none, every call has its weights.")
    )
    if plan.memory:
        parts += _memory(plan)
    if plan.timeline:
        parts += [*drawn, _timeline(plan)]
    parts += [*_listed("Critical path", path), *_listed("What would shorten a step", advice)]
    parts.append(Text(_prediction(plan)))
    if (full := overfull(plan)) and not any("Memory:" in note for note in plan.notes):
        ranks = sorted(rank for group in full.values() for rank in group)
        parts.append(
            Text(f"note: memory is expected not to fit on ranks {format_ranks(ranks)}", style="yellow")
        )
    notes = dict.fromkeys([*plan.notes, *idle_notes(plan), *after_notes(plan)])
    parts += [Text(f"note: {note}", style="yellow") for note in notes]
    return parts


def _listed(title: str, lines: Sequence[str]) -> list[RenderableType]:
    """A title, and a line for each sentence."""
    if not lines:
        return []
    return [Text(title, style="bold"), *(Text(f"  {line}") for line in lines), Text("")]


def _cluster(plan: Plan) -> str:
    nodes = ", ".join(f"{node.name} ({node.devices} {node.kind})" for node in plan.cluster.nodes)
    return (
        f"Cluster: {nodes}; ranks 0-{plan.world_size - 1}"
        if plan.world_size > 1
        else f"Cluster: {nodes}; rank 0"
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[str]) -> Table:
    """Columns that say the same nothing in every row are left out."""
    silent = {index for index, _ in enumerate(columns) if all(row[index] in ("", "-") for row in rows)}
    columns = [column for index, column in enumerate(columns) if index not in silent]
    rows = [[cell for index, cell in enumerate(row) if index not in silent] for row in rows]
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        min_width=len(title) + 2,
    )
    for column in columns:
        words = [word for row in rows for word in row[columns.index(column)].split()]
        table.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column in right,
            overflow="fold",
            min_width=max(map(len, words), default=None) if column == "flags" else None,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _calls(plan: Plan) -> Table:
    """Engines are named where some call has another one than is usual for what it does."""
    usual = all(plan.calls[call.name].engine == ENGINES_OF[call.op][0] for call in plan.graph.calls)
    rows = []
    for call in plan.graph.calls:
        chosen = plan.calls[call.name]
        rows.append(
            (
                call.name,
                call.op,
                call.model or call.decl.name,
                format_ranks(chosen.ranks),
                str(chosen.layout),
                "" if usual else chosen.engine,
                "" if call.op == "function" else str(chosen.micro_batch_tokens),
                str(chosen.slots) if call.op == "generate" else "",
                " ".join(flag_words(chosen)),
                _seconds(chosen.predicted_seconds),
            )
        )
    columns = (
        "call",
        "op",
        "runs",
        "ranks",
        "layout",
        "engine",
        "tokens",
        "slots",
        "flags",
        "seconds",
    )
    return _table("Calls", columns, rows, frozenset({"tokens", "slots", "seconds"}))


def _cuts(plan: Plan, cards: Mapping[str, Card]) -> list[RenderableType]:
    """For each way in which a model is cut: which ranks have which layers and heads."""
    users: dict[tuple[str, Layout, tuple[int, ...]], list[str]] = {}
    for call in plan.graph.calls:
        where = plan.calls[call.name]
        if call.model and is_cut(where.layout):
            users.setdefault((call.model, where.layout, where.ranks), []).append(call.name)
    rows, unknown = [], set()
    for (model, layout, ranks), calls in users.items():
        if model not in cards:
            unknown.add(model)
            continue
        whole = partition(with_head(cards[model], plan.graph.models[model].head), layout)
        mesh = DeviceMesh(ranks, layout)
        for stage in whole.stages:
            on = [rank for rank in ranks if mesh.coordinate(rank)["pp"] == stage.index]
            name = f"{model} ({', '.join(calls)})"
            rows.append((name, f"{stage.index}", format_ranks(on), _layers(stage), *_heads(whole)))
    parts: list[RenderableType] = []
    if rows:
        columns = ("model (calls)", "stage", "ranks", "layers", "heads", "kv heads")
        parts.append(_table("How models are cut", columns, rows, frozenset({"stage"})))
    if unknown:
        names = " and ".join(sorted(unknown))
        parts.append(Text(f"How {names} is cut: its card is not on this machine.", style="yellow"))
    return parts


def _layers(stage: Stage) -> str:
    ends = [*(["embedding"] if stage.embeds else []), f"{stage.first}-{stage.stop - 1}"]
    return ", ".join([*ends, *(["head"] if stage.ends else [])])


def _heads(cut: Partition) -> tuple[str, str]:
    """Attention heads, and key and value heads, of each tensor rank: `4+5`, or `2 each`."""
    texts = []
    for interval in (cut.query_heads, cut.kv_heads):
        sizes = [stop - start for start, stop in map(interval, range(cut.tp))]
        alike = len(set(sizes)) == 1
        texts.append(f"{sizes[0]}{' each' * (cut.tp > 1)}" if alike else "+".join(map(str, sizes)))
    return texts[0], texts[1]


def _reallocs(plan: Plan) -> Table:
    rows = [
        (
            realloc.model,
            f"{realloc.source} -> {realloc.destination or realloc.follower}"
            + when(plan.graph, realloc.destination, realloc.follower),
            _bytes(realloc.bytes),
            _bytes(realloc.lower_bound_bytes),
            _seconds(realloc.predicted_seconds),
        )
        for realloc in plan.reallocs
    ]
    columns = ("model", "from -> to", "bytes", "lower bound", "seconds")
    return _table("Reallocation", columns, rows, frozenset(columns[2:]))


def _memory(plan: Plan) -> list[Table]:
    """A row for each cause; ranks that hold the same share a column."""
    limits = [node.memory_bytes for node in plan.cluster.nodes for _ in range(node.devices)]
    causes = list(dict.fromkeys(cause for row in plan.memory.values() for cause in row))
    groups: dict[tuple[tuple[int, ...], int | None, str], list[int]] = {}
    for rank in sorted(plan.memory):
        row, moment = plan.memory[rank], plan.moments.get(rank, "")
        sizes = tuple(row.get(cause, 0) for cause in causes)
        groups.setdefault((sizes, limits[rank], moment), []).append(rank)
    heads, cells = [], []
    for (sizes, limit, moment), ranks in groups.items():
        heads.append(f"rank{'s' * (len(ranks) > 1)} {format_ranks(ranks)}")
        cells.append([moment, *map(_bytes, sizes), _bytes(sum(sizes)), _spare(limit, sum(sizes))])
    tables = []
    for first in range(0, len(heads), _SIDE_BY_SIDE):
        part = slice(first, first + _SIDE_BY_SIDE)
        rows = list(zip(("worst at", *causes, "total", "to spare"), *cells[part], strict=True))
        title = "Memory of each rank at the worst moment" if first == 0 else ""
        tables.append(_table(title, ["", *heads[part]], rows, frozenset(heads[part])))
    return tables


def _timeline(plan: Plan) -> Table:
    rows = [
        (entry.what, format_ranks(entry.ranks), f"{entry.start:.3f}", f"{entry.end:.3f}")
        for entry in plan.timeline
    ]
    return _table("Predicted timeline", ("what", "ranks", "start", "end"), rows, frozenset({"start", "end"}))


def _prediction(plan: Plan) -> str:
    if plan.step_seconds is None:
        return "Prediction: none; seconds were not estimated."
    bound = "" if plan.lower_bound_seconds is None else f", at least {plan.lower_bound_seconds:.3f} s"
    gap = "" if plan.gap is None else f" (gap {plan.gap:.1%})"
    return f"Prediction: {plan.step_seconds:.3f} s a step{bound}{gap}"


def _spare(limit: int | None, used: int) -> str:
    if limit is None:
        return "unknown"
    return _bytes(limit - used) if limit >= used else f"-{_bytes(used - limit)}"


def _bytes(size: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f}"
