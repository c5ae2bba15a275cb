"""metrics.jsonl, samples.jsonl and TensorBoard: what a run measures and writes, step by step."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from realflow.observe.files import AppendFile, json_line, read_lines

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RESERVED = ("step", "time")


class MetricsLog:
    """The metrics of a run: one line a step in metrics.jsonl, and scalars for TensorBoard.

    A line is flat: `{"step": 3, "time": 1700000000.0, "critic/rewards/mean": 0.5, ...}` with
    `time` in seconds since 1970. A value that is NaN or infinite is null there (strict JSON) and
    itself in TensorBoard, which marks it in its plots.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self._lines = AppendFile(Path(run_dir) / METRICS, lines=True)
        self._board = _Board(Path(run_dir) / "tensorboard")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of one step (0-based).

        A step repeated after a restart is a further line; `read_metrics` takes the last.
        Raises ValueError for the names `step` and `time`, and TypeError for what is no number.
        """
        taken = sorted(set(values) & set(RESERVED))
        if taken:
            raise ValueError(f"metrics cannot be named {taken}: each line has its own step and time")
        now = time.time()
        numbers = {name: float(value) for name, value in values.items()}
        self._lines.write(json_line({"step": int(step), "time": now, **numbers}))
        self._board.scalars(step, now, numbers)

    def close(self) -> None:
        """Close both files."""
        self._lines.close()
        self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Board:
    """One TensorBoard event file, written with the tensorboard package's own records."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        # The time in ns keeps the files of a restarted run apart and in order.
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        # RecordWriter calls write once for a whole record: header, data and checksums together.
        self._records = RecordWriter(AppendFile(folder / name))
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def scalars(self, step: int, now: float, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = Event(wall_time=now, step=step, summary=Summary(value=entries))
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._records.close()


class SamplesLog:
    """The samples of a run in samples.jsonl, one line each.

    Rows: step, sample_id, group_id, prompt, completion, answer, rewards, finish_reason, length and
    prompt_length (tokens of the response, and of its prompt); a graph without some of them leaves them out.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self._lines = AppendFile(Path(run_dir) / SAMPLES, lines=True)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, all of them in one write."""
        lines = b"".join(json_line(dict(row)) for row in rows)
        if lines:
            self._lines.write(lines)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def __enter__(self) -> SamplesLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The metrics of a run in order of step; of a repeated step the last line. [] without a file."""
    path = Path(run_dir) / METRICS
    if not path.exists():
        return []
    steps = {row["step"]: row for row in read_lines(path) if isinstance(row.get("step"), int)}
    return [steps[step] for step in sorted(steps)]
