"""Pictures of a graph: mermaid text, and an SVG file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from realflow.graph.datamapping import source_line
from realflow.graph.layered import Layered, Point, arrange
from realflow.graph.types import Call, Graph
from realflow.graph.words import explain_batch

DATA = "data"
_CHAR, _SMALL = 8.0, 6.3  # mean width of a character at 14 and at 11 pixels
_BOX_HEIGHT, _LINE = 62.0, 15.0
_MARGIN, _TITLE = 28.0, 72.0
# Fill, border and text of each op, readable on white and on black.
_COLOURS = {
    "generate": ("#dbeafe", "#2563eb"),
    "infer": ("#ede9fe", "#7c3aed"),
    "train": ("#dcfce7", "#16a34a"),
    "function": ("#fef3c7", "#d97706"),
    DATA: ("#f1f5f9", "#64748b"),
}
_STYLE = """
  text { font-family: ui-sans-serif, system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #0f172a; }
  .title { font-size: 17px; font-weight: 600; }
  .note, .sub, .field { font-size: 11px; fill: #475569; }
  .name { font-size: 14px; font-weight: 600; }
  .op { font-size: 10px; font-weight: 600; letter-spacing: .06em; }
  .edge { fill: none; stroke: #94a3b8; stroke-width: 1.4; }
  .paper { fill: #ffffff; }
  .halo { fill: #ffffff; }
"""


@dataclass(frozen=True)
class Edge:
    """Fields that go from one call (or `data`) to another."""

    source: str
    target: str
    fields: tuple[str, ...]


def edges(graph: Graph) -> tuple[Edge, ...]:
    """Every pair of calls that are connected, with the fields between them, in order of the calls."""
    found: dict[tuple[str, str], list[str]] = {}
    for call in graph.calls:
        for name in dict.fromkeys(call.reads.values()):
            writer = graph.writer(name)
            found.setdefault((writer.name if writer else DATA, call.name), []).append(name)
    return tuple(Edge(a, b, tuple(fields)) for (a, b), fields in found.items())


def to_mermaid(graph: Graph) -> str:
    """The graph as a mermaid flowchart."""
    names = {DATA: "n0"} | {call.name: f"n{index + 1}" for index, call in enumerate(graph.calls)}
    lines = ["flowchart TD", f'    n0[("data<br/>{_mermaid_text(source_line(graph.data))}")]']
    for call in graph.calls:
        body = "<br/>".join(_mermaid_text(line) for line in (call.name, *_details(call)))
        lines.append(f'    {names[call.name]}["{body}"]:::{call.op}')
    for edge in edges(graph):
        label = _mermaid_text(", ".join(edge.fields))
        lines.append(f'    {names[edge.source]} -- "{label}" --> {names[edge.target]}')
    for op, (fill, border) in _COLOURS.items():
        if op != DATA:
            lines.append(f"    classDef {op} fill:{fill},stroke:{border},color:#0f172a")
    return "\n".join(lines) + "\n"


def _mermaid_text(text: str) -> str:
    """Text with mermaid's entities, which are those of HTML with `#` for `&`."""
    return escape(text.replace("#", "\0"), quote=True).replace("&", "#").replace("\0", "#35;")


def _details(call: Call) -> tuple[str, ...]:
    """What a box says under the call's name."""
    of = {"generate": f"{call.model} generates", "infer": f"{call.model}: {call.decl.name}"}
    what = of.get(
        call.op, call.decl.name if call.op == "function" else f"{call.model} learns: {call.decl.name}"
    )
    extra = []
    if call.op == "generate" and call.sampling is not None:
        limits = [limit for _, limit in call.sampling.stages] or [call.sampling.max_new_tokens]
        extra.append(f"{call.batch}, {call.samples} each, up to {', then '.join(map(str, limits))} tokens")
    if call.op == "train":
        extra.append(f"{call.minibatches} minibatch{'es' if call.minibatches > 1 else ''}")
    if call.op == "function" and call.decl.scope != "sample":
        extra.append(f"sees a whole {call.decl.scope}")
    if call.every:
        extra.append(f"every {call.every} steps")
    return (what, ", ".join(extra)) if extra else (what,)


def to_svg(graph: Graph) -> str:
    """The graph as one SVG file that needs nothing else: calls as boxes, fields on the edges."""
    texts = {call.name: (call.name, *_details(call)) for call in graph.calls}
    texts[DATA] = (DATA, source_line(graph.data))
    ops = {call.name: call.op for call in graph.calls} | {DATA: DATA}
    links = edges(graph)
    labels = [_wrapped(edge.fields) for edge in links]
    widths = {
        name: max(
            len(lines[0]) * _CHAR + len(ops[name]) * 7.5 + 52, *(len(t) * _SMALL + 28 for t in lines[1:]), 150
        )
        for name, lines in texts.items()
    }
    label_widths = [max(len(line) for line in lines) * _SMALL + 10 for lines in labels]
    layout = arrange(widths, [(edge.source, edge.target) for edge in links], label_widths, 26.0)
    tops = _row_tops(layout, labels)
    routes = _ports(layout, links, widths)
    subtitle = explain_batch(graph).splitlines()[0]
    left = min(layout.left, 0) - _MARGIN
    text_width = max(len(graph.name) * 10.5, len(subtitle) * _SMALL) + 2 * _MARGIN
    width = max(layout.right - left + _MARGIN, text_width)
    height = tops[-1] + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.0f} 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img">',
        f"<title>{escape(graph.name)}</title><style>{_STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L10 5L0 10z" fill="#94a3b8"/></marker></defs>',
        f'<rect class="paper" x="{left:.0f}" y="0" width="{width:.0f}" height="{height:.0f}"/>',
        f'<text class="title" x="{left + _MARGIN:.0f}" y="34">{escape(graph.name)}</text>',
        f'<text class="note" x="{left + _MARGIN:.0f}" y="52">{escape(subtitle)}</text>',
    ]
    parts += [_edge_path(route, tops) for route in routes]
    parts += [_label(route, lines, tops) for route, lines in zip(routes, labels, strict=True)]
    parts += [_box(texts[name], ops[name], point, widths[name], tops) for name, point in layout.boxes.items()]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ports(layout: Layered, links: Sequence[Edge], widths: dict[str, float]) -> list[list[Point]]:
    """The routes, with the ends at one side of a box spread along it in the order of the edges."""
    routes = [list(route) for route in layout.routes]
    for side, near in ((0, 1), (-1, -2)):
        for name in layout.boxes:
            here = [
                r for r, link in zip(routes, links, strict=True) if (link.source, link.target)[side] == name
            ]
            here.sort(key=lambda route, n=near: route[n].x)  # type: ignore[misc]
            step = min(22.0, (widths[name] - 36) / max(len(here) - 1, 1))
            for index, route in enumerate(here):
                shift = (index - (len(here) - 1) / 2) * step
                route[side] = Point(route[side].x + shift, route[side].row)
    return routes


def _wrapped(fields: Sequence[str]) -> list[str]:
    """Field names in lines of at most about 24 characters."""
    lines = [""]
    for index, name in enumerate(fields):
        text = name + ("," if index + 1 < len(fields) else "")
        if lines[-1] and len(lines[-1]) + len(text) > 23:
            lines.append("")
        lines[-1] = f"{lines[-1]} {text}".strip()
    return lines


def _row_tops(layout: Layered, labels: Sequence[Sequence[str]]) -> list[float]:
    """y of the top of every row, and of the end of the last one."""
    lines = [0] * (layout.rows + 1)
    for route, text in zip(layout.routes, labels, strict=True):
        lines[route[1].row] = max(lines[route[1].row], len(text))
    tops = [_TITLE]
    for row in range(layout.rows):
        tops.append(tops[-1] + (_BOX_HEIGHT if row % 2 == 0 else lines[row] * _LINE + 52))
    return tops


def _edge_path(route: Sequence[Point], tops: Sequence[float]) -> str:
    """A smooth line from box to box: vertical inside rows, curves between them."""
    y = tops[route[0].row + 1]
    path = [f"M{route[0].x:.1f} {y:.1f}"]
    x = route[0].x
    for point in route[1:]:
        end = point is route[-1]
        odd = point.row % 2 == 1
        enter = tops[point.row] + (18 if odd else 0) - (2 if end else 0)
        middle = (y + enter) / 2
        path.append(f"C{x:.1f} {middle:.1f} {point.x:.1f} {middle:.1f} {point.x:.1f} {enter:.1f}")
        if not end:
            y = tops[point.row + 1] - (18 if odd else 0)
            path.append(f"L{point.x:.1f} {y:.1f}")
        x = point.x
    return f'<path class="edge" d="{" ".join(path)}" marker-end="url(#arrow)"/>'


def _label(route: Sequence[Point], lines: Sequence[str], tops: Sequence[float]) -> str:
    """The fields of an edge, in the row under its source."""
    point = route[1]
    centre = (tops[point.row] + tops[point.row + 1]) / 2
    width = max(len(line) for line in lines) * _SMALL + 8
    height = len(lines) * _LINE + 2
    first = centre - (len(lines) - 1) * _LINE / 2 + 4
    spans = "".join(
        f'<tspan x="{point.x:.1f}" y="{first + index * _LINE:.1f}">{escape(line)}</tspan>'
        for index, line in enumerate(lines)
    )
    return (
        f'<rect class="halo" x="{point.x - width / 2:.1f}" y="{centre - height / 2:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}"/><text class="field" text-anchor="middle">{spans}</text>'
    )


def _box(lines: Sequence[str], op: str, point: Point, width: float, tops: Sequence[float]) -> str:
    fill, border = _COLOURS[op]
    left, top = point.x - width / 2, tops[point.row]
    right = left + width - 12
    mark = (
        f'<text class="op" x="{right:.1f}" y="{top + 21:.1f}" text-anchor="end" style="fill:{border}">'
        f"{op.upper()}</text>"
    )
    rest = "".join(
        f'<text class="sub" x="{left + 14:.1f}" y="{top + 39 + index * 14:.1f}">{escape(line)}</text>'
        for index, line in enumerate(lines[1:])
    )
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_BOX_HEIGHT:.0f}" rx="9" '
        f'fill="{fill}" stroke="{border}" stroke-width="1.4"/>'
        f'<text class="name" x="{left + 14:.1f}" y="{top + 22:.1f}">{escape(lines[0])}</text>'
        f"{mark if op != DATA else ''}{rest}"
    )
