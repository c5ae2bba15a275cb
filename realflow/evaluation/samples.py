"""One answer to a problem as it is kept: a line of samples.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from realflow.errors import InputError, Problem

NUMBERS = 1 << 32
"""Sample `number` of the problem at place p is drawn under the id `p * NUMBERS + number`, however many
samples are drawn of each."""


@dataclass(frozen=True)
class Sample:
    """An answer. `reward` is None where the reward did not apply or could not be told (missing).

    `seed` and `draw_id` are what its random numbers come from; a greedy answer uses none. `tokens` are those
    of the response, the end token included.
    """

    problem_id: str
    source: str
    number: int
    greedy: bool
    seed: int
    draw_id: int
    completion: str
    reward: float | None
    finish_reason: str
    tokens: int
    prompt_tokens: int

    @property
    def key(self) -> tuple[str, bool, int]:
        """What no two samples of an evaluation have in common."""
        return self.problem_id, self.greedy, self.number

    @property
    def order(self) -> tuple[int, bool, int]:
        """By problems, sampled before greedy."""
        return self.draw_id // NUMBERS, self.greedy, self.number


_TYPES: Mapping[str, tuple[type, ...]] = {
    "problem_id": (str,),
    "source": (str,),
    "number": (int,),
    "greedy": (bool,),
    "seed": (int,),
    "draw_id": (int,),
    "completion": (str,),
    "reward": (float, int, type(None)),
    "finish_reason": (str,),
    "tokens": (int,),
    "prompt_tokens": (int,),
}


def to_line(sample: Sample) -> dict[str, Any]:
    """The sample as plain values."""
    return asdict(sample)


def from_line(row: Mapping[str, Any], where: str = "") -> Sample:
    """The sample that `to_line` wrote; other keys are ignored. Raises InputError for what it cannot have
    written; `where` names the line."""
    for name, types in _TYPES.items():
        value = row.get(name)
        right = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
        if name not in row or not right:
            found = repr(value) if name in row else "nothing"
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise InputError(Problem(f"found {found} under {name!r}, expected {expected}", file=where))
    return Sample(**{name: row[name] for name in _TYPES})


def from_record(row: Mapping[str, Any], *, samples: int, greedy: bool, seed: int) -> Sample:
    """The sample that a run recorded, of a graph that draws `samples` of each problem under `seed`.

    `row` is a line of the run's samples.jsonl whose data has the fields `problem_id`, `source` and `draw_id`.
    """
    number = row["sample_id"] % samples
    reward = row["rewards"]
    return Sample(
        problem_id=row["problem_id"],
        source=row["source"],
        number=number,
        greedy=greedy,
        seed=seed,
        draw_id=row["draw_id"] + number,
        completion=row["completion"],
        reward=None if reward is None else float(reward),
        finish_reason=row["finish_reason"],
        tokens=row["length"],
        prompt_tokens=row["prompt_length"],
    )
