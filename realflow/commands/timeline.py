"""A plan's predicted timeline, drawn: in the terminal, and as a page of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from rich.console import RenderableType
from rich.text import Text

from realflow.observe import plantable
from realflow.observe.style import CSS
from realflow.observe.svg import COLOURS, Interval, short, timeline_chart
from realflow.planfile import Plan
from realflow.planfile.lanes import MOVE, Lane, lanes, operation_words

_STYLES = ("blue", "yellow", "green", "magenta", "cyan", "red", "bright_blue", "bright_green")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_LEAST = 0.25
"""Cells below which an operation is not drawn."""


def draw(plan: Plan, width: int) -> list[RenderableType]:
    """The timeline in `width` columns: a line for each lane, and an axis of seconds."""
    found = lanes(plan)
    total = _total(plan)
    if not found or total <= 0:
        return []
    names = [_lane_name(lane) for lane in found]
    left = max(map(len, names)) + 1
    cells = max(20, width - left - 1)
    colours = colours_of(plan)
    rows: list[RenderableType] = [Text("Timeline of a step, as predicted", style="bold")]
    for name, lane in zip(names, found, strict=True):
        row = Text(name.ljust(left), style="bold", no_wrap=True)
        rows.append(row.append_text(_bars(lane, total, cells, colours)))
    end = f"{total:.3g} s"
    half = f"{total / 2:.3g} s"
    middle = cells // 2 - len(half) // 2
    axis = "0".ljust(middle) + half
    rows.append(Text(" " * left + axis + end.rjust(cells - len(axis)), style="dim", no_wrap=True))
    return rows


def _bars(lane: Lane, total: float, cells: int, colours: Mapping[str, int]) -> Text:
    """`▕rollout━━━━━━▕train━━━━`; what is too short for a cell is left out."""
    text, at = Text(no_wrap=True), 0
    for entry in lane.entries:
        start, end = entry.start / total * cells, entry.end / total * cells
        if end - start < _LEAST:
            continue
        first = max(at, min(cells - 1, round(start)))
        stop = min(cells, max(first + 1, round(end)))
        if stop <= first:
            continue
        text.append(" " * (first - at))
        label = ("→" if entry.what.startswith(MOVE) else "") + entry.what.removeprefix(MOVE)
        room = stop - first - 1
        inside = label if len(label) <= room else ""
        call = entry.what.removeprefix(MOVE)
        style = _STYLES[colours.get(call, 0) % len(_STYLES)]
        text.append("▕" + inside.ljust(room, "─" if entry.what.startswith(MOVE) else "━"), style=style)
        at = stop
    return text


def _lane_name(lane: Lane) -> str:
    return f"ranks {lane.name}" if len(lane.ranks) > 1 else f"rank {lane.name}" if lane.ranks else lane.name


def colours_of(plan: Plan) -> dict[str, int]:
    """Call -> its colour: the same as in a run's report."""
    return {call.name: index % COLOURS for index, call in enumerate(plan.graph.calls)}


def _total(plan: Plan) -> float:
    return max([plan.step_seconds or 0.0, *(entry.end for entry in plan.timeline)], default=0.0)


# ---- a page ------------------------------------------------------------------------------------------------


def page(plan: Plan, path: Sequence[str] = (), advice: Sequence[str] = ()) -> str:
    """One HTML file without scripts or anything from outside: the timeline, what the step hangs on (`path`
    and `advice`, sentences), and the plan's tables."""
    graph = plan.graph
    facts = [
        f"{plan.world_size} device{'s' * (plan.world_size > 1)}",
        f"{graph.prompts} prompts × {graph.samples} samples a step",
        *(f"{name} {spec.path}" for name, spec in graph.models.items()),
    ]
    body = [
        f'<div class="head"><h1>{escape(graph.name)}</h1></div>',
        f'<p class="sub">{escape(" · ".join(facts))}</p>',
        _tiles(plan),
        f"<section><h2>Timeline of a step</h2>{_chart(plan)}</section>",
        _listed("Critical path", path),
        _listed("What would shorten a step", advice),
        f"<section><h2>Plan</h2>{plantable.tables(plan)}</section>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(graph.name)} · plan · RealFlow</title><style>{CSS}</style></head><body><main>"
        f"{''.join(body)}</main></body></html>\n"
    )


def _tiles(plan: Plan) -> str:
    tiles = []
    if plan.step_seconds:
        samples = plan.graph.prompts * plan.graph.samples
        tiles.append(("Seconds a step", short(plan.step_seconds), "as predicted"))
        tiles.append(("Samples a second", short(samples / plan.step_seconds), f"{samples} a step"))
        used = sum(len(lane.ranks) * lane.busy for lane in lanes(plan)) / plan.world_size
        tiles.append(("Devices busy", f"{100 * used / plan.step_seconds:.0f} %", "mean over the step"))
    if plan.lower_bound_seconds is not None and plan.gap is not None:
        tiles.append(("Lower bound", f"{short(plan.lower_bound_seconds)} s", f"gap {100 * plan.gap:.1f} %"))
    cards = "".join(
        f'<div class="card tile"><div class="name">{escape(name)}</div>'
        f'<div class="value">{escape(value)}</div><div class="more">{escape(more)}</div></div>'
        for name, value, more in tiles
    )
    return f'<div class="tiles">{cards}</div>'


def _chart(plan: Plan) -> str:
    found, colours = lanes(plan), colours_of(plan)
    if not plan.timeline:
        return '<p class="note">Seconds have not been estimated.</p>'
    bars = [
        Interval(
            row=row,
            start=entry.start,
            end=entry.end,
            colour=colours.get(entry.what.removeprefix(MOVE), 0),
            label=entry.what.removeprefix(MOVE),
            title=f"{operation_words(entry.what)}\n{_lane_name(lane)}\n{entry.end - entry.start:.4g} s, from "
            f"{entry.start:.4g} s to {entry.end:.4g} s",
            thin=entry.what.startswith(MOVE),
        )
        for row, lane in enumerate(found)
        for entry in lane.entries
    ]
    keys = "".join(
        f'<span><span class="key c{colour}"></span>{escape(call)}</span>' for call, colour in colours.items()
    )
    chart = timeline_chart([lane.name for lane in found], bars, _total(plan))
    return (
        '<div class="card"><p class="note">A row for each group of ranks that run the same; thin bars: '
        f'weights that move to a call.</p><div class="legend">{keys}</div>{chart}</div>'
    )


def _listed(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section><h2>{title}</h2><div class="card"><ul>{items}</ul></div></section>'
