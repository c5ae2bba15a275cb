"""The files of a run's directory, as the master writes them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from realflow.observe.collect import Collector
from realflow.observe.metrics import MetricsLog, SamplesLog
from realflow.observe.predicted import predictions
from realflow.observe.trace import Trace
from realflow.planfile import Plan
from realflow.runtime.best import keep_if_best
from realflow.runtime.carried import Carried
from realflow.runtime.directory import (
    CURSOR,
    checkpoint_path,
    checkpoints,
    cursor,
    partial_directory,
    remove_partial,
)
from realflow.runtime.messages import DispatchDone

EVAL_REWARD = "eval/reward/mean"


class RunFiles:
    """metrics.jsonl, samples.jsonl, TensorBoard, trace.json, checkpoints, error.txt."""

    def __init__(self, run_dir: Path, plan: Plan) -> None:
        self.run_dir = run_dir
        self._graph = plan.graph
        self._collector = Collector(plan.graph, predictions(plan))
        self._metrics = MetricsLog(run_dir)
        self._samples = SamplesLog(run_dir)
        self._trace = Trace()
        self._rewards: dict[int, float] = {}
        """Steps done -> the mean reward of the evaluation then."""

    def report(self, step: int, call: str, done: DispatchDone) -> None:
        """Take a rank's report of a dispatch."""
        for span in self._collector.add(step, call, done):
            self._trace.span(span.rank, span.name, span.start, span.end)
        self._samples.write(done.rows)

    def step(self, step: int, start: float, end: float, told: Mapping[str, float]) -> dict[str, float]:
        """Write and return the metrics of a step, those `told` among them."""
        metrics = {**self._collector.finish(step, start, end), **told}
        if EVAL_REWARD in metrics:
            self._rewards[step + 1] = metrics[EVAL_REWARD]
        self._metrics.step(step, metrics)
        return metrics

    def checkpoint(self, number: int, files: Mapping[str, str], carried: Carried) -> Path:
        """Give a checkpoint whose parts are all written its final name; `carried` goes into it."""
        final = checkpoint_path(self.run_dir, number)
        partial = partial_directory(self.run_dir, final.name)
        text = json.dumps(cursor(self._graph, number, carried), indent=1, allow_nan=False)
        (partial / CURSOR).write_text(text, encoding="utf-8")
        files = {**files, CURSOR: hashlib.sha256(text.encode()).hexdigest()}
        with open(partial / "checksums.json", "w", encoding="utf-8") as file:
            json.dump(dict(sorted(files.items())), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, final)
        self._trace.write(self.run_dir / "trace.json")
        if self._graph.evaluate is not None and self._graph.evaluate.keep_best and number in self._rewards:
            keep_if_best(self.run_dir, final, number, self._rewards[number])
        for old in checkpoints(self.run_dir)[: -self._graph.checkpoint_keep]:
            shutil.rmtree(old)
        return final

    def close(self) -> None:
        """The run is complete."""
        self._trace.write(self.run_dir / "trace.json")

    def failed(self, text: str) -> None:
        """The run has failed: keep what was traced, say why, and leave nothing half-written."""
        self._trace.write(self.run_dir / "trace.json")
        partial = self.run_dir / "error.txt.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.run_dir / "error.txt")
        remove_partial(self.run_dir)
