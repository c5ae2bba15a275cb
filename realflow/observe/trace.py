"""What each rank did when: spans, their sums, and a trace file that opens in Perfetto."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realflow.observe.files import write_whole

COMPUTE = "compute"


@dataclass(frozen=True)
class Span:
    """One interval on one rank, in seconds since 1970.

    `name` is a dispatch (`rollout@17`) or what else took the time; `kind` is `compute`, or another
    word for time in which the rank does not compute (`move`, `realloc`, `wait`).
    """

    rank: int
    name: str
    start: float
    end: float
    kind: str = COMPUTE
    args: Mapping[str, Any] = field(default_factory=dict)


class Trace:
    """Spans of a run, the newest `limit` of them (what was dropped is counted in the file)."""

    def __init__(self, limit: int = 200_000) -> None:
        self._spans: deque[Span] = deque(maxlen=limit)
        self._seen = 0

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans held, in the order in which they came."""
        return tuple(self._spans)

    def span(
        self, rank: int, name: str, start: float, end: float, *, kind: str = COMPUTE, **args: Any
    ) -> None:
        """Add an interval (seconds, `time.time()`); `args` are JSON values that Perfetto shows.

        An end before its start (clocks of two machines differ) makes a span of length 0.
        """
        self._spans.append(Span(rank, name, start, max(start, end), kind, args))
        self._seen += 1

    def write(self, path: Path | str) -> None:
        """Write Chrome's trace-event JSON, which Perfetto opens: a process for each rank."""
        write_whole(Path(path), json.dumps(to_events(self.spans, self._seen - len(self._spans))))


def to_events(spans: Iterable[Span], dropped: int = 0) -> dict[str, Any]:
    """The trace-event document of spans.

    Times are microseconds from the first span; `otherData.origin` is that moment in seconds since
    1970. Spans of one rank that overlap get threads of their own, as the format asks.
    """
    ordered = sorted(spans, key=lambda span: (span.start, span.rank))
    origin = ordered[0].start if ordered else 0.0
    events: list[dict[str, Any]] = []
    lanes: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    threads: dict[tuple[int, str, int], int] = {}
    for span in ordered:
        lane = _free_lane(lanes[span.rank][span.kind], span)
        thread = threads.setdefault((span.rank, span.kind, lane), len(threads))
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": span.kind,
                "pid": span.rank,
                "tid": thread,
                "ts": round((span.start - origin) * 1e6, 3),
                "dur": round((span.end - span.start) * 1e6, 3),
                "args": dict(span.args),
            }
        )
    names = [_meta("process_name", rank, 0, {"name": f"rank {rank}"}) for rank in sorted(lanes)]
    names += [_meta("process_sort_index", rank, 0, {"sort_index": rank}) for rank in sorted(lanes)]
    for (rank, kind, lane), thread in threads.items():
        label = kind if lane == 0 else f"{kind} {lane + 1}"
        names.append(_meta("thread_name", rank, thread, {"name": label}))
    return {
        "traceEvents": names + events,
        "displayTimeUnit": "ms",
        "otherData": {"origin": origin, "dropped_spans": dropped},
    }


def _free_lane(ends: list[float], span: Span) -> int:
    """The first lane in which nothing reaches past the span's start; `ends` is updated."""
    for lane, end in enumerate(ends):
        if end <= span.start:
            ends[lane] = span.end
            return lane
    ends.append(span.end)
    return len(ends) - 1


def _meta(name: str, rank: int, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": rank, "tid": thread, "args": args}


def read_spans(path: Path | str) -> tuple[Span, ...]:
    """The spans of a written trace, in order of start. Raises ValueError for another kind of file."""
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        raise ValueError(f"{path}: no trace; expected an object with a list traceEvents")
    origin = float(document.get("otherData", {}).get("origin", 0.0))
    return tuple(
        Span(
            rank=event["pid"],
            name=event["name"],
            start=origin + event["ts"] / 1e6,
            end=origin + (event["ts"] + event["dur"]) / 1e6,
            kind=event.get("cat", COMPUTE),
            args=event.get("args", {}),
        )
        for event in document["traceEvents"]
        if event.get("ph") == "X"
    )


def busy_by_rank(spans: Iterable[Span], start: float, end: float) -> dict[int, float]:
    """Seconds of `[start, end]` in which each rank computes; overlapping spans count once."""
    by_rank: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        by_rank[span.rank].append(span)
    return {rank: _covered(held, start, end) for rank, held in sorted(by_rank.items())}


def idle_fraction(spans: Iterable[Span], start: float, end: float) -> float:
    """The fraction of `[start, end]` in which no rank computes, from 0 to 1 (0 for no time)."""
    if end <= start:
        return 0.0
    return max(0.0, 1.0 - _covered(spans, start, end) / (end - start))


def _covered(spans: Iterable[Span], start: float, end: float) -> float:
    """Seconds of `[start, end]` that lie under at least one computing span."""
    total, reached = 0.0, start
    for span in sorted((s for s in spans if s.kind == COMPUTE), key=lambda s: s.start):
        low, high = max(span.start, reached), min(span.end, end)
        if high > low:
            total += high - low
        reached = max(reached, min(span.end, end))
    return total


def split_name(name: str) -> tuple[str, int | None]:
    """Call and step of a dispatch: `reward@17.0` is ("reward", 17); without a step, None."""
    call, at, rest = name.rpartition("@")
    step = rest.partition(".")[0]
    return (call, int(step)) if at and step.isdigit() else (name, None)
