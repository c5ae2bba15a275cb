"""From what workers report to the metrics and trace of each step. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from realflow.graph.types import Graph
from realflow.observe.predicted import MOVES, with_predictions
from realflow.observe.trace import Span, busy_by_rank, idle_fraction, split_name
from realflow.runtime.messages import DispatchDone

COUNTED = "data/"
"""Numbers of this kind say how many of the data's prompts were so: they are added up."""


@dataclass
class _StepReport:
    stats: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    means: dict[str, list[float]] = field(default_factory=dict)
    """Metric that functions told -> [sum, count]."""
    moves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Dispatch of a reallocation -> its numbers."""


def merge_stats(into: dict[str, list[float]], stats: Mapping[str, list[float]]) -> None:
    """Merge [sum, count, min, max] entries."""
    for name, (total, count, low, high) in stats.items():
        if count == 0:
            continue
        old = into.get(name, [0.0, 0.0, math.inf, -math.inf])
        into[name] = [old[0] + total, old[1] + count, min(old[2], low), max(old[3], high)]


class Collector:
    """Gathers the reports of each step until it ends."""

    def __init__(self, graph: Graph, predicted: Mapping[str, float]) -> None:
        self._graph = graph
        self._predicted = predicted
        self._reports: dict[int, _StepReport] = {}
        self._between = _StepReport()

    def add(self, step: int, call: str, done: DispatchDone) -> list[Span]:
        """Take a rank's report of a dispatch of `call`; `step` is -1 for what belongs to the step that
        ends next. Returns its spans."""
        spans = [Span(done.rank, done.dispatch, start, end) for start, end in done.spans]
        report = self._between if step < 0 else self._reports.setdefault(step, _StepReport())
        moved = {name: entry for name, entry in done.stats.items() if name.startswith(MOVES)}
        if moved:
            merge_stats(report.moves.setdefault(done.dispatch, {}), moved)
        merge_stats(report.stats, {name: e for name, e in done.stats.items() if name not in moved})
        report.values.update(done.values)
        for name, (total, count) in done.means.items():
            before = report.means.get(name, [0.0, 0.0])
            report.means[name] = [before[0] + total, before[1] + count]
        report.spans.extend(spans)
        return spans

    def finish(self, step: int, start: float, end: float) -> dict[str, float]:
        """The metrics of a step that ran from `start` to `end` (seconds since the epoch)."""
        report, between = self._reports.pop(step, _StepReport()), self._between
        self._between = _StepReport()
        spans = report.spans + between.spans
        # A model may follow while the next step runs already: that one's ranks were busy with it.
        self._between.spans = [span for span in spans if span.end > end]
        merge_stats(report.stats, between.stats)
        moves = [*between.moves.values(), *report.moves.values()]
        metrics = {**between.values, **report.values, **_moved(moves)}
        metrics |= {name: total / count for name, (total, count) in report.means.items()}
        for name, (total, count, low, high) in report.stats.items():
            if name.endswith("_ratio"):  # a share: only its mean says something
                metrics[name] = total / count
                continue
            if name.startswith(COUNTED):
                metrics |= {name: total, f"{name}_ratio": total / count}
                continue
            metrics[f"{name}/mean"] = total / count
            metrics[f"{name}/max"] = high
            metrics[f"{name}/min"] = low
        seconds = end - start
        by_call: dict[str, list[Span]] = {}
        for span in spans:
            by_call.setdefault(split_name(span.name)[0], []).append(span)
        for call in self._graph.calls:
            if call.name in by_call:
                measured = max(busy_by_rank(by_call[call.name], start, end).values())
                metrics[f"timing_s/{call.name}"] = measured
        metrics["timing_s/step"] = seconds
        metrics["perf/idle_fraction"] = idle_fraction(spans, start, end)
        tokens = report.stats.get("response_length")
        if tokens and seconds > 0:
            metrics["perf/tokens_per_second"] = tokens[0] / seconds
        return with_predictions(metrics, self._predicted)


def _moved(dispatches: Iterable[Mapping[str, list[float]]]) -> dict[str, float]:
    """The reallocations of a step, added up: of each the bytes of all ranks, and the seconds and the
    bytes sent of the rank that has most."""
    metrics: dict[str, float] = {}
    for numbers in dispatches:
        for name, (total, _, _, high) in numbers.items():
            metrics[name] = metrics.get(name, 0.0) + (total if name.endswith("/bytes") else high)
    return metrics
