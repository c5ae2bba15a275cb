"""The report's times: a timeline of ranks, and what was predicted against what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from realflow.observe.learning import legend
from realflow.observe.predicted import MOVES, STEP, lengths_compared, predictions, words
from realflow.observe.rundata import RunData, spans_of_step, step_of
from realflow.observe.svg import COLOURS, Interval, Series, line_chart, timeline_chart
from realflow.observe.trace import COMPUTE, Span, busy_by_rank, idle_fraction, split_name

_TIMING = "timing_s/"
_STEP_COLOUR = COLOURS - 1
_MOST_ROWS = 128
_MOST_BARS = 4000


def section(run: RunData) -> str:
    """Timeline, calls and their seconds over the steps."""
    parts = [_timelines(run), _calls(run), _lengths(run), _curves(run)]
    drawn = "".join(part for part in parts if part)
    return drawn or '<p class="note">No times yet.</p>'


def step_seconds(run: RunData) -> float | None:
    """Median seconds of a step after the first: measured by the run, or else between its lines."""
    for name in ("timing_s/step", "plan/measured_s"):
        if values := run.values(name):
            return statistics.median(values[1:] or values)
    times = run.values_of_time()
    gaps = [later - sooner for sooner, later in pairwise(times)]
    return statistics.median(gaps) if gaps else None


def _windows(run: RunData) -> dict[int, tuple[Span, ...]]:
    """Step -> its spans, for every traced step."""
    steps = sorted({step for span in run.spans if (step := step_of(span)) is not None})
    return {step: spans_of_step(run.spans, step) for step in steps}


def _bounds(spans: Sequence[Span]) -> tuple[float, float]:
    return min(span.start for span in spans), max(span.end for span in spans)


def idle(run: RunData) -> float | None:
    """Median over the steps of the share of time in which no rank computes.

    As the run measured it, or else from the trace; None without either.
    """
    if measured := run.values("perf/idle_fraction"):
        return statistics.median(measured)
    shares = [idle_fraction(run.spans, *_bounds(spans)) for spans in _windows(run).values()]
    return statistics.median(shares) if shares else None


def _timelines(run: RunData) -> str:
    windows = _windows(run)
    if not windows:
        return ""
    colours = _colours(run)
    steps = list(windows)
    # The last step may have been cut short; the one before it is whole.
    first_open = steps[-1] if len(steps) < 2 or run.steps_done > steps[-1] else steps[-2]
    chosen = list(dict.fromkeys([first_open, steps[len(steps) // 2], steps[0]]))
    parts = []
    for step in chosen:
        opened = " open" if step == first_open else ""
        parts.append(
            f"<details{opened}><summary>Step {step}</summary>{_timeline(windows[step], colours)}</details>"
        )
    return f'<div class="card"><h3>Timeline of a step</h3>{"".join(parts)}</div>'


def _colours(run: RunData) -> dict[str, int]:
    """Call -> colour, the same wherever calls appear: the graph's order, then by first appearance."""
    names = [call.name for call in run.plan.graph.calls] if run.plan else []
    names += [split_name(span.name)[0] for span in run.spans]
    return {name: index % COLOURS for index, name in enumerate(dict.fromkeys(names))}


def _timeline(spans: Sequence[Span], colours: Mapping[str, int]) -> str:
    start, end = _bounds(spans)
    ranks = sorted({span.rank for span in spans})
    shown = {rank: row for row, rank in enumerate(ranks[:_MOST_ROWS])}
    drawn = sorted((s for s in spans if s.rank in shown), key=lambda s: s.end - s.start, reverse=True)
    bars = [_interval(span, start, shown[span.rank], colours) for span in drawn[:_MOST_BARS]]
    busy = busy_by_rank(spans, start, end)
    length = max(end - start, 1e-9)
    facts = [f"{end - start:.3g} s", f"no rank computes in {100 * idle_fraction(spans, start, end):.1f} %"]
    facts.append(
        f"ranks compute {100 * min(busy.values()) / length:.0f} to {100 * max(busy.values()) / length:.0f} %"
    )
    if len(ranks) > len(shown):
        facts.append(f"{len(shown)} of {len(ranks)} ranks shown")
    if len(drawn) > len(bars):
        facts.append(f"the {len(bars)} longest of {len(drawn)} intervals shown")
    calls = dict.fromkeys(split_name(span.name)[0] for span in sorted(spans, key=lambda s: s.start))
    keys = "".join(
        f'<span><span class="key c{colours.get(call, 0)}"></span>{escape(call)}</span>' for call in calls
    )
    thin = "; thin bars: transfers and waits" if any(bar.thin for bar in bars) else ""
    chart = timeline_chart([f"rank {rank}" for rank in shown], bars, end - start)
    return f'<p class="note">{" · ".join(facts)}{thin}</p><div class="legend">{keys}</div>{chart}'


def _interval(span: Span, origin: float, row: int, colours: Mapping[str, int]) -> Interval:
    call, _ = split_name(span.name)
    facts = [f"{span.name} on rank {span.rank}", f"{span.end - span.start:.3f} s ({span.kind})"]
    facts.append(f"from {span.start - origin:.3f} s to {span.end - origin:.3f} s")
    facts.extend(f"{key}: {value}" for key, value in span.args.items())
    return Interval(
        row=row,
        start=span.start - origin,
        end=span.end - origin,
        colour=colours.get(call, 0),
        label=call,
        title="\n".join(facts),
        thin=span.kind != COMPUTE,
    )


def _timed(run: RunData) -> list[str]:
    """What was timed: calls in the graph's order, then other things, the whole step last."""
    names = [name.removeprefix(_TIMING) for name in run.names if name.startswith(_TIMING)]
    place = {name: index for index, name in enumerate(_colours(run))}
    return sorted(names, key=lambda name: (name == "step", place.get(name, len(place)), name))


def _measured(run: RunData) -> dict[str, float]:
    """What took time -> its median seconds a step after the first step."""
    return {
        name.removeprefix(_TIMING): statistics.median(values[1:] or values)
        for name in run.names
        if name.startswith(_TIMING) and (values := run.values(name))
    }


def _measured_moves(run: RunData) -> dict[str, float]:
    """`realloc/<model>` -> the median seconds of moving weights into it, in steps after the first."""
    found = {}
    for name in run.names:
        if name.startswith(MOVES) and name.count("/") == 2 and name.endswith("/seconds"):
            values = run.values(name)
            if values:
                found[name.removesuffix("/seconds")] = statistics.median(values[1:] or values)
    return found


def _calls(run: RunData) -> str:
    """A row for each call: median measured seconds, the plan's prediction, and bars of both."""
    measured, moved = _measured(run), _measured_moves(run)
    predicted = predictions(run.plan) if run.plan else {}
    if not measured:
        return ""
    colours = _colours(run)
    order = [*(name for name in _timed(run) if name != STEP), *moved, STEP]
    measured |= moved
    longest = max([*measured.values(), *(predicted.get(name, 0.0) for name in order)]) or 1.0
    rows = []
    for name in order:
        if name not in measured:
            continue
        got, said = measured[name], predicted.get(name)
        bars = _meter(f"c{colours.get(name, _STEP_COLOUR)}", got / longest)
        if said is not None:
            bars += _meter("hollow", said / longest)
        ratio = f"{got / said:.2f}" if said else ""
        expected = f'<td class="num">{"" if said is None else f"{said:.3f}"}</td><td class="num">{ratio}</td>'
        rows.append(
            f'<tr><td>{escape(words(name))}</td><td class="num">{got:.3f}</td>{expected if predicted else ""}'
            f'<td class="bars">{bars}</td></tr>'
        )
    note = (
        "Solid: measured, median of the steps after the first. Outline: what the plan predicted."
        if predicted
        else "Median of the steps after the first."
    )
    columns = '<th class="num">predicted s</th><th class="num">measured ÷ predicted</th>' if predicted else ""
    title = "Seconds of each call" + (": measured and predicted" if predicted else "")
    return (
        f'<div class="card scroll below"><h3>{title}</h3>'
        f'<p class="note">{note}</p><table><tr><th>call</th><th class="num">measured s</th>'
        f"{columns}<th></th></tr>{''.join(rows)}</table></div>"
    )


def _lengths(run: RunData) -> str:
    """Mean lengths as the plan assumed them, and as they were."""
    prompts = [
        float(row["prompt_length"])
        for step in run.samples
        for row in step.rows.values()
        if isinstance(row.get("prompt_length"), int)
    ]
    found = lengths_compared(run.plan, run.metrics, prompts)
    if not found:
        return ""
    rows = "".join(
        f'<tr><td>{one.name}</td><td class="num">{one.measured:.1f}</td>'
        f'<td class="num">{one.predicted:.1f}</td><td class="num">{one.ratio or 0.0:.2f}</td></tr>'
        for one in found
    )
    return (
        '<div class="card scroll below"><h3>Tokens: assumed and measured</h3><p class="note">Means over '
        "samples. A plan made with the lengths of a run (<code>lengths: {trace: runs/...}</code> in the "
        'graph) expects them.</p><table><tr><th></th><th class="num">measured</th>'
        '<th class="num">assumed</th>'
        f'<th class="num">measured ÷ assumed</th></tr>{rows}</table></div>'
    )


def _meter(style: str, share: float) -> str:
    return f'<div class="meter {style}" style="width:{100 * share:.1f}%"></div>'


def _curves(run: RunData) -> str:
    colours = _colours(run)
    lines = [
        Series(name, run.series(_TIMING + name), colours.get(name, _STEP_COLOUR)) for name in _timed(run)
    ]
    chart = line_chart(lines, label="Seconds of each call by step", width=1140, height=250, zero=True)
    if not chart:
        return ""
    return f'<div class="card below"><h3>Seconds of each call by step</h3>{legend(lines)}{chart}</div>'
