"""The report's curves: how the run learned."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import escape

from realflow.observe.progress import RECENT, REWARD
from realflow.observe.rundata import RunData
from realflow.observe.svg import Series, line_chart, short, trailing_mean


@dataclass(frozen=True)
class _Chart:
    title: str
    patterns: tuple[str, ...]
    zero: bool = False


_CHARTS = (
    _Chart("Reward", (REWARD,)),
    _Chart("Loss", ("*/pg_loss", "*/sft_loss", "*/loss", "*/vf_loss")),
    _Chart("Response length (tokens)", ("response_length/mean", "response_length/max"), zero=True),
    _Chart("Gradient norm", ("*/grad_norm",), zero=True),
    _Chart("KL divergence", ("*/kl_loss", "*/ppo_kl")),
    _Chart("Entropy", ("*/entropy",), zero=True),
)
_ELSEWHERE = ("timing_s/*", "plan/*", "perf/idle_fraction")


def mean_of(values: Sequence[float]) -> float:
    """Mean of values; there must be one."""
    return statistics.fmean(values)


def charts(run: RunData) -> str:
    """Cards with the curves that people look at first, as far as the run has them."""
    cards = [_card(run, chart.title, _matching(run, chart), chart.zero) for chart in _CHARTS]
    drawn = "".join(card for card in cards if card)
    return f'<div class="two">{drawn}</div>' if drawn else '<p class="note">No metrics yet.</p>'


def other_charts(run: RunData) -> str:
    """Every other metric as a small curve, folded."""
    shown = {name for chart in _CHARTS for name in _matching(run, chart)}
    rest = [
        name
        for name in run.names
        if name not in shown and not any(fnmatchcase(name, pattern) for pattern in _ELSEWHERE)
    ]
    cards = "".join(_card(run, name, [name], smooth=False) for name in sorted(rest))
    if not cards:
        return ""
    return f'<details><summary>{len(rest)} more metrics</summary><div class="three">{cards}</div></details>'


def _matching(run: RunData, chart: _Chart) -> list[str]:
    return [name for pattern in chart.patterns for name in run.names if fnmatchcase(name, pattern)]


def _card(run: RunData, title: str, names: Sequence[str], zero: bool = False, smooth: bool = True) -> str:
    lines = series_of(run, names, smooth)
    chart = line_chart(lines, label=title, zero=zero)
    if not chart:
        return ""
    return f'<div class="card"><h3>{escape(title)}</h3>{legend(lines)}{chart}</div>'


def series_of(run: RunData, names: Sequence[str], smooth: bool) -> list[Series]:
    """Lines of metrics; a single long one becomes its running mean over the faint raw values."""
    if len(names) == 1 and smooth and len(run.metrics) >= 2 * RECENT:
        raw = run.series(names[0])
        return [
            Series("each step", raw, faint=True),
            Series(f"mean of {RECENT}", trailing_mean(raw, RECENT)),
        ]
    return [Series(name, run.series(name), index) for index, name in enumerate(names)]


def legend(lines: Sequence[Series]) -> str:
    """Names of lines with their colours and last values."""
    keys = []
    for line in lines:
        known = [value for _, value in line.points if value is not None]
        if known:
            faint = " faint" if line.faint else ""
            keys.append(
                f'<span><span class="key c{line.colour % 8}{faint}"></span>{escape(line.name)}'
                f" <b>{short(known[-1])}</b></span>"
            )
    return f'<div class="legend">{"".join(keys)}</div>'
