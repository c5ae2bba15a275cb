"""What a plan predicted against what its run measured: seconds of calls, moves and steps, and lengths."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from realflow.planfile import Plan
from realflow.planfile.types import LENGTHS

STEP = "step"
"""The name of the whole step among what takes seconds."""

MOVES = "realloc/"
"""What the names of reallocations begin with; the model that gets the weights follows."""

PREDICTED, MEASURED = "plan/predicted_s/", "plan/measured_s/"


@dataclass(frozen=True)
class Compared:
    """Seconds, or tokens, of one thing; `predicted` is None where nobody said anything of it."""

    name: str
    predicted: float | None
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured by predicted."""
        return self.measured / self.predicted if self.predicted else None


def predictions(plan: Plan) -> dict[str, float]:
    """What takes time in a step (calls, `realloc/<model>`, `step`) -> the seconds that the plan expects."""
    found = {name: call.predicted_seconds for name, call in plan.calls.items()}
    for one in plan.reallocs:
        name = MOVES + (one.follower or one.model)
        if one.predicted_seconds is not None:
            found[name] = (found.get(name) or 0.0) + one.predicted_seconds
    found[STEP] = plan.step_seconds
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def with_predictions(metrics: Mapping[str, float], predicted: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step, and for what was predicted of it `plan/predicted_s` and `plan/measured_s`."""
    found = dict(metrics)
    for name, seconds in predicted.items():
        measured = metrics.get(f"{name}/seconds" if name.startswith(MOVES) else f"timing_s/{name}")
        if measured is not None:
            found[PREDICTED + name] = seconds
            found[MEASURED + name] = measured
    return found


def seconds_compared(rows: Iterable[Mapping[str, Any]]) -> list[Compared]:
    """Of the metrics of a run: everything that was predicted, with the median of what was measured. The first
    step is left out where there are others: much is made in it for the first time."""
    listed = list(rows)
    listed = listed[1:] or listed
    names = dict.fromkeys(
        name.removeprefix(PREDICTED) for row in listed for name in row if name.startswith(PREDICTED)
    )
    found = []
    for name in sorted(names, key=lambda name: (name == STEP, name.startswith(MOVES))):
        measured = [row[MEASURED + name] for row in listed if row.get(MEASURED + name) is not None]
        said = [row[PREDICTED + name] for row in listed if row.get(PREDICTED + name) is not None]
        if measured and said:
            found.append(Compared(name, said[-1], statistics.median(measured)))
    return found


def lengths_compared(
    plan: Plan | None, rows: Iterable[Mapping[str, Any]], prompts: Iterable[float]
) -> list[Compared]:
    """Mean tokens of prompts and responses, as the plan assumed and as a run had them. `prompts` are lengths
    of some of its prompts."""
    assumed = plan.extra.get(LENGTHS, {}) if plan else {}
    if not isinstance(assumed, Mapping):
        return []
    means = [row["response_length/mean"] for row in rows if row.get("response_length/mean") is not None]
    measured = {"prompt": list(prompts), "response": means}
    return [
        Compared(name, float(assumed[name]), statistics.fmean(values))
        for name, values in measured.items()
        if values and isinstance(assumed.get(name), int | float)
    ]


def lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Predicted against measured, a line for each: for the terminal, at the end of a run."""
    found = seconds_compared(rows)
    wide = max((len(words(one.name)) for one in found), default=0)
    return [
        f"{words(one.name).ljust(wide)}  measured {one.measured:9.3f} s  "
        f"predicted {one.predicted or 0.0:9.3f} s" + ("" if one.ratio is None else f"  ({one.ratio:.2f})")
        for one in found
    ]


def words(name: str) -> str:
    """What takes time, in words."""
    return f"moving weights to {name.removeprefix(MOVES)}" if name.startswith(MOVES) else name
