"""Charts as inline SVG: lines over steps, bars of prediction and measurement, a timeline of ranks.

Colours are CSS variables (`--c0` ... `--c7`, `--ink`, `--grid`) of the page that holds the chart.
Values appear on hover by CSS alone; nothing here is a script.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
MAX_POINTS = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 40

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """A line: points in order of x (None: a gap), a colour index, and whether it is a faint one."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    faint: bool = False


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that lie within `[low, high]`.

    >>> ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if not math.isfinite(span) or span <= 0 or span < 1e-12 * max(abs(low), abs(high)):
        return [low]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    each = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / each - 1e-9)
    last = math.floor(high / each + 1e-9)
    return [round(index * each, 12 - math.floor(math.log10(each))) + 0.0 for index in range(first, last + 1)]


def short(value: float) -> str:
    """A number for a label, with about four figures: `0.1234`, `12.5`, `1.2k`, `3.4M`, `1e-05`."""
    size = abs(value)
    if size >= 1e4:
        for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= limit:
                return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def thin_out(points: Sequence[Point], limit: int = MAX_POINTS) -> tuple[list[Point], int]:
    """At most `limit` points, each the mean of as many neighbours; and how many that are."""
    share = -(-len(points) // limit) if points else 1
    if share <= 1:
        return list(points), 1
    groups = [points[start : start + share] for start in range(0, len(points), share)]
    return [(statistics.fmean(x for x, _ in group), _mean(y for _, y in group)) for group in groups], share


def trailing_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Each point's mean over itself and up to `window - 1` points before it, gaps left out."""
    return [
        (x, _mean(y for _, y in points[max(0, index + 1 - window) : index + 1]))
        for index, (x, _) in enumerate(points)
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class _Frame:
    """Where data lies in a chart of `width` × `height`."""

    width: int
    height: int
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(_LEFT + share * (self.width - _LEFT - _RIGHT), 2)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM), 2)


def line_chart(
    series: Sequence[Series], *, label: str, width: int = 560, height: int = 240, zero: bool = False
) -> str:
    """Lines over steps with axes, and each step's values on hover. `zero`: y begins at 0.

    Returns an empty string where no series has a value.
    """
    thinned = [(one, *thin_out(one.points)) for one in series]
    known = [(x, y) for _, points, _ in thinned for x, y in points if y is not None]
    if not known:
        return ""
    frame = _frame_of(known, width, height, zero)
    paths = "".join(_line(frame, one, points) for one, points, _ in thinned)
    share = max(share for _, _, share in thinned)
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{_axes(frame)}{paths}{_hover(frame, [(one, points) for one, points, _ in thinned], share)}</svg>"
    )


def _frame_of(known: Sequence[tuple[float, float]], width: int, height: int, zero: bool) -> _Frame:
    xs, ys = [x for x, _ in known], [y for _, y in known]
    low, high = min(ys), max(ys)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < 1e-9 * max(1e-9, abs(high), abs(low)):
        pad = abs(high) * 0.1 or 1.0
        low, high = (0.0, high + pad) if zero and high >= 0 else (low - pad, high + pad)
    margin = (high - low) * 0.06
    low = low if zero and low == 0 else low - margin
    x_low, x_high = min(xs), max(xs)
    return _Frame(width, height, x_low, x_high if x_high > x_low else x_low + 1, low, high + margin)


def _axes(frame: _Frame) -> str:
    parts = []
    bottom, right = frame.height - _BOTTOM, frame.width - _RIGHT
    for value in ticks(frame.y_low, frame.y_high, 6):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(_tick(_LEFT - 8, y + 4, short(value), "end"))
    for value in ticks(frame.x_low, frame.x_high, 8):
        if value == int(value):
            x = frame.x(value)
            parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(_tick(x, bottom + 17, short(value)))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT + right) / 2
    parts.append(_tick(middle, frame.height - 6, "step"))
    return "".join(parts)


def _tick(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(frame: _Frame, one: Series, points: Sequence[Point]) -> str:
    runs: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append(f"{frame.x(x)},{frame.y(y)}")
    style = f"c{one.colour % COLOURS}{' faint' if one.faint else ''}"
    drawn = [f'<polyline class="line {style}" points="{" ".join(run)}"/>' for run in runs if len(run) > 1]
    for run in runs:
        if len(run) == 1:  # a value between two gaps is a dot
            cx, cy = run[0].split(",")
            drawn.append(f'<circle class="dot {style}" cx="{cx}" cy="{cy}" r="3"/>')
    return "".join(drawn)


def _hover(frame: _Frame, lines: Sequence[tuple[Series, Sequence[Point]]], share: int) -> str:
    """For each x an invisible column which, under the pointer, shows a rule, dots and the values."""
    columns: dict[float, list[tuple[Series, float]]] = {}
    for one, points in lines:
        for x, y in points:
            if y is not None:
                columns.setdefault(x, []).append((one, y))
    xs = sorted(columns)
    parts = []
    for index, x in enumerate(xs):
        here = frame.x(x)
        left = (frame.x(xs[index - 1]) + here) / 2 if index else _LEFT
        right = (frame.x(xs[index + 1]) + here) / 2 if index + 1 < len(xs) else frame.width - _RIGHT
        head = f"step {x:g}" if share == 1 else f"mean of {share} steps around {x:.0f}"
        texts = [head, *(f"{one.name}  {short(y)}" for one, y in columns[x])]
        dots = "".join(
            f'<circle class="dot c{one.colour % COLOURS}" cx="{here}" cy="{frame.y(y)}" r="3.5"/>'
            for one, y in columns[x]
        )
        parts.append(
            f'<g class="at"><rect class="hit" x="{left:.2f}" y="{_TOP}" width="{max(right - left, 0.5):.2f}" '
            f'height="{frame.height - _TOP - _BOTTOM}"/><g class="tip">'
            f'<line class="rule" x1="{here}" x2="{here}" y1="{_TOP}" y2="{frame.height - _BOTTOM}"/>'
            f"{dots}{_tip(frame.width, here, _TOP + 4, texts)}</g></g>"
        )
    return "".join(parts)


def _tip(width: int, x: float, y: float, texts: Sequence[str]) -> str:
    """A box of text beside x, on the side where there is room."""
    wide = 7.0 * max(len(text) for text in texts) + 16
    left = x + 10 if x + 10 + wide < width else max(0.0, x - 10 - wide)
    rows = "".join(
        f'<text x="{left + 8:.1f}" y="{y + 16 + 16 * row:.1f}">{escape(text)}</text>'
        for row, text in enumerate(texts)
    )
    return (
        f'<rect class="box" x="{left:.1f}" y="{y}" width="{wide:.1f}" height="{16 * len(texts) + 8}" rx="4"/>'
        f"{rows}"
    )


@dataclass(frozen=True)
class Interval:
    """A bar of the timeline: seconds from the step's begin; a `thin` one is no computation."""

    row: int
    start: float
    end: float
    colour: int
    label: str
    title: str
    thin: bool = False


def timeline_chart(
    rows: Sequence[str], bars: Sequence[Interval], seconds: float, *, width: int = 1140
) -> str:
    """Bars over time, a row for each rank, with a time axis in seconds and hover titles."""
    each = max(6, min(30, 720 // max(1, len(rows))))
    left, top, right = 70, 6, 14
    height = top + each * len(rows) + 34
    bottom = height - 34
    seconds = max(seconds, 1e-6)
    scale = (width - left - right) / seconds
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="Timeline of a step">']
    for value in ticks(0, seconds, 10):
        x = left + value * scale
        parts.append(f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="{top}" y2="{bottom}"/>')
        parts.append(_tick(x, bottom + 16, f"{short(value)} s"))
    for index, name in enumerate(rows):
        y = top + index * each
        if each >= 12 or index % (12 // each + 1) == 0:
            parts.append(_tick(left - 8, y + each / 2 + 4, name, "end"))
        parts.append(
            f'<rect class="row" x="{left}" y="{y + 1}" width="{width - left - right}" height="{each - 2}"/>'
        )
    parts.extend(_bar(bar, left, top, each, scale) for bar in bars)
    return "".join([*parts, "</svg>"])


def _bar(bar: Interval, left: float, top: float, each: float, scale: float) -> str:
    x, wide = left + bar.start * scale, max((bar.end - bar.start) * scale, 0.75)
    y, high = top + bar.row * each + 1, each - 2.0
    if bar.thin:
        y, high = y + high * 0.7, high * 0.3
    fits = not bar.thin and each >= 16 and wide > 7.2 * len(bar.label) + 8
    text = (
        f'<text class="inbar" x="{x + wide / 2:.2f}" y="{y + high / 2 + 4:.1f}" text-anchor="middle">'
        f"{escape(bar.label)}</text>"
        if fits
        else ""
    )
    return (
        f'<g class="bar"><rect class="fill c{bar.colour % COLOURS}{" thin" if bar.thin else ""}" x="{x:.2f}" '
        f'y="{y:.1f}" width="{wide:.2f}" height="{high:.1f}" rx="2"/>{text}'
        f"<title>{escape(bar.title)}</title></g>"
    )
