"""Progress of a run: a live panel on a terminal, one line a step elsewhere."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from realflow.observe.predicted import PREDICTED, STEP
from realflow.observe.trace import split_name

REWARD = "critic/rewards/mean"
RECENT = 5
_BLOCKS = "▁▂▃▄▅▆▇█"


class Progress:
    """Shows step, reward and its recent mean, what runs now, and the time left.

    `update` takes events:

        {"kind": "running", "call": "rollout@3", "step": 3, "done": 40, "of": 64}   # counts optional
        {"kind": "step", "step": 3, "seconds": 12.1, "metrics": {...}}
        {"kind": "note", "text": "..."}
        {"kind": "end", "text": "..."}                                              # text optional
        {"kind": "error", "text": "..."}

    Steps count from 0. It is a context manager; `close` (or the events `end` and `error`) restores
    the terminal. Events may come from any thread.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "run",
        stream: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`live` None: a live panel where `stream` (default stderr) is a terminal."""
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._total, self._title, self._clock = total_steps, title, clock
        self._lock = threading.Lock()
        self._began = self._step_began = clock()
        self._finished = 0
        self._seconds: deque[float] = deque(maxlen=10)
        self._values: list[float] = []
        self._what = "reward"
        self._running: dict[str, tuple[int | None, int | None]] = {}
        self._live: Live | None = None
        if self._console.is_terminal if live is None else live:
            self._live = Live(
                get_renderable=self._panel, console=self._console, refresh_per_second=4, transient=False
            )
            self._live.start()

    def update(self, event: Mapping[str, Any]) -> None:
        """Take one event. Raises ValueError for an unknown kind."""
        kind = event.get("kind")
        if kind == "running":
            self._on_running(event)
        elif kind == "step":
            self._on_step(event)
        elif kind == "note":
            self._print(Text(str(event["text"])))
        elif kind in ("end", "error"):
            self.close()
            if event.get("text"):
                self._print(Text(str(event["text"]), style="red" if kind == "error" else ""))
        else:
            raise ValueError(f"unknown progress event {kind!r}: expected running, step, note, end or error")

    def close(self) -> None:
        """Stop the live panel; its last state stays on the terminal."""
        with self._lock:
            live, self._live = self._live, None
            self._running.clear()
        if live is not None:
            live.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_running(self, event: Mapping[str, Any]) -> None:
        name, done, of = str(event["call"]), event.get("done"), event.get("of")
        call, _ = split_name(name)
        with self._lock:
            # Calls on different ranks run at once; one whose samples are all done runs no more.
            self._running.pop(call, None)
            if of is None or done is None or done < of:
                self._running[call] = (done, of)

    def _on_step(self, event: Mapping[str, Any]) -> None:
        headline = self._headline(event.get("metrics", {}))
        with self._lock:
            self._finished = int(event["step"]) + 1
            self._seconds.append(float(event["seconds"]))
            self._step_began = self._clock()
            self._running.clear()
            if headline is not None:
                self._values.append(headline)
            parts = [f"step {event['step']:>{len(str(self._total))}}", f"({self._finished}/{self._total})"]
            if headline is not None:
                parts.append(f"{self._what} {headline:.3f}")
                parts.append(f"last {min(RECENT, len(self._values))}: {self._recent():.3f}")
            predicted = event.get("metrics", {}).get(PREDICTED + STEP)
            took = f"{self._seconds[-1]:.1f} s"
            parts.append(took if predicted is None else f"{took} (predicted {predicted:.1f})")
            parts += [f"left {duration(self.seconds_left())}"]
        if self._live is None:
            self._print(Text("  ".join(parts)))

    def _headline(self, metrics: Mapping[str, Any]) -> float | None:
        """The number that tells how the run goes: the mean reward, without rewards the loss."""
        loss = next((name for name in sorted(metrics) if name.endswith("/loss")), None)
        name = REWARD if REWARD in metrics else loss
        value = None if name is None else metrics[name]
        if value is None or value != value:
            return None
        self._what = "reward" if name == REWARD else "loss"
        return float(value)

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)

    def _recent(self) -> float:
        last = self._values[-RECENT:]
        return statistics.fmean(last) if last else float("nan")

    def seconds_left(self) -> float | None:
        """Expected seconds to the end: the median of recent steps times what is left; None at first."""
        if not self._seconds:
            return None
        each = statistics.median(self._seconds)
        spent = min(each, self._clock() - self._step_began)
        return max(0.0, each * (self._total - self._finished) - spent)

    def _panel(self) -> Group:
        """The live panel: a bar, the reward, what runs now."""
        with self._lock:
            head = Table.grid(padding=(0, 2))
            left = duration(self.seconds_left())
            head.add_row(
                Text(self._title, style="bold"),
                ProgressBar(total=max(self._total, 1), completed=self._finished, width=30),
                Text(f"{self._finished}/{self._total} steps"),
                Text(f"{duration(self._clock() - self._began)} gone, {left} left", style="dim"),
            )
            rows: list[Table | Text] = [head]
            if self._values:
                line = Text(f"{self._what:<8}")
                line.append(f"{self._values[-1]:.3f}", style="bold")
                line.append(f"  mean of last {min(RECENT, len(self._values))} {self._recent():.3f}  ")
                line.append(sparkline(self._values, 40), style="cyan")
                rows.append(line)
            now = "  ".join(_running_text(*item) for item in self._running.items())
            rows.append(Text(f"now     {now or self._rest()}", overflow="ellipsis", no_wrap=True))
            return Group(*rows)

    def _rest(self) -> str:
        """What to say while no call is known to run."""
        if self._finished >= self._total:
            return "done"
        return "between calls" if self._finished else "starting"


def _running_text(call: str, counts: tuple[int | None, int | None]) -> str:
    done, of = counts
    if of is None:
        return call
    return f"{call} {done or 0}/{of}"


def sparkline(values: list[float], width: int) -> str:
    """Values as a row of at most `width` block characters; each shows the mean of its share."""
    count = min(width, len(values))
    cuts = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [statistics.fmean(values[a:b]) for a, b in pairwise(cuts)]
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def duration(seconds: float | None) -> str:
    """Seconds as people say them: `8 s`, `3 min 20 s`, `2 h 5 min`; `?` for None."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
