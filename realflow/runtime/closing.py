"""Steps whose calls have ended, until they can be told of, and their checkpoints. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from realflow.runtime.carried import Carried
from realflow.runtime.dispatches import Dispatches
from realflow.runtime.events import Saved, StepDone


class Closing:
    """What has ended, and is still waited for: models that follow, an evaluation, files."""

    def __init__(self) -> None:
        self._steps: dict[int, StepDone] = {}
        self._files: dict[int, dict[str, str]] = {}
        self._carried: dict[int, Carried] = {}
        """Step whose checkpoint is being written -> what it carries."""

    def ended(self, done: StepDone) -> None:
        """All calls of a step have ended."""
        self._steps[done.step] = done

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """More metrics of a step that has ended."""
        done = self._steps[step]
        self._steps[step] = replace(done, metrics={**done.metrics, **metrics})

    def saves(self, step: int, carried: Carried) -> None:
        """The checkpoint of a step is being written."""
        self._carried[step] = carried

    def wrote(self, step: int, files: Mapping[str, str]) -> None:
        """A model's part of a checkpoint is written."""
        self._files.setdefault(step, {}).update(files)

    def told(self, dispatches: Dispatches, examined: int | None) -> list[StepDone | Saved]:
        """The steps, in order, at whose end nothing is under way any more (`examined`: the one that is
        evaluated), then their checkpoints. Each is told of once."""
        found: list[StepDone | Saved] = []
        for step in sorted(self._steps):
            if dispatches.following(step) or step == examined:
                break
            found.append(self._steps.pop(step))
        for step in sorted(self._files):
            if step not in self._steps and not dispatches.saving(step):
                found.append(Saved(step, self._files.pop(step), self._carried.pop(step)))
        return found
