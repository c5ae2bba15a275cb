"""The problems that an evaluation draws answers to.

`rows` is the source of data that the graph of an evaluation names: it reads the problems where they are, and
gives each its id, its source, and the id under which its answers are drawn. It is called in every worker,
and gives the same in all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

from realflow.data.source import open_source
from realflow.errors import InputError, Problem
from realflow.evaluation.samples import NUMBERS
from realflow.graph.types import DataSpec

SOURCE = f"{__name__}:rows"
"""What a graph calls `rows`."""

SEED = 0
"""Under which tasks make their problems: another seed of the evaluation draws other answers to the same."""

PROBLEM_ID, PROBLEM_SOURCE, DRAW_ID = "problem_id", "source", "draw_id"
"""The fields that every row has beside those of its data."""

PLACE = "{problem}"
"""What a prompt's text has in the place of the problem."""

_DATA_KEYS = (
    "source", "path", "task", "options", "size", "fields", "unique", "test", "use", "split_name",
)  # fmt: skip
_NAMED = ("problem_id", "id", "task_id", "unique_id")


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one source of data.

    `data` is what a graph would read, `folder` what its paths and modules start from (empty: the current
    one). `prompt` is a text around the field `prompt`, with `{problem}` in its place. `id_field` and
    `source_field` are fields that say what a problem is called and where it comes from; without them it is
    its place, and `name`. At most `limit` problems are taken, unless that is 0.
    """

    name: str
    data: DataSpec
    folder: str = ""
    prompt: str = ""
    id_field: str = ""
    source_field: str = ""
    limit: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Plain values that `from_plain` reads back; defaults are left out."""
        default = DataSpec("", {})
        data = {key: getattr(self.data, key) for key in _DATA_KEYS}
        kept = {key: value for key, value in data.items() if value != getattr(default, key)}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "data"}
        return {"data": kept, **{key: value for key, value in own.items() if value}}


def from_plain(value: Mapping[str, Any]) -> ProblemSet:
    """The set that `to_plain` wrote."""
    return ProblemSet(**{**value, "data": DataSpec(**{"fields": {}, **value["data"]})})


def sets_of(data: DataSpec, folder: str = "", limit: int = 0) -> tuple[ProblemSet, ...]:
    """The sets of a graph's data: one for each of its sources.

    Its field `source`, and one of `problem_id`, `id`, `task_id` and `unique_id`, are taken for what they say.
    """
    parts = [(part.name, part.data) for part in data.sources] or [(_name(data), data)]
    return tuple(
        ProblemSet(
            name,
            part,
            folder=folder,
            id_field=next((field for field in _NAMED if field in part.fields), ""),
            source_field=PROBLEM_SOURCE if PROBLEM_SOURCE in part.fields else "",
            limit=limit,
        )
        for name, part in parts
    )


def _name(data: DataSpec) -> str:
    return data.task or Path(data.path or "").stem or data.source.rpartition(":")[2]


@dataclass(frozen=True)
class Problems:
    """All problems of some sets, in order, with the same fields each. `digest` is of all that they say."""

    rows: Sequence[Mapping[str, Any]]
    digest: str

    @property
    def ids(self) -> list[str]:
        """The id of each."""
        return [row[PROBLEM_ID] for row in self.rows]


def rows(sets: Sequence[Mapping[str, Any]], only: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The problems of some sets as rows of data: their own fields, `problem_id`, `source` and `draw_id`.

    `only` are the places of those that are wanted, among all. A field that another set has and this one has
    not is None. Raises InputError for data that cannot be read.
    """
    everything = list(_all(map(from_plain, sets)))
    chosen = everything if only is None else [everything[place] for place in only]
    names = dict.fromkeys(name for row in everything for name in row)
    return [{name: row.get(name) for name in names} for row in chosen]


def read_problems(sets: Sequence[ProblemSet]) -> Problems:
    """All problems of some sets. Raises InputError for data that cannot be read, and for an id that two
    problems have."""
    found = rows([chosen.to_plain() for chosen in sets])
    problems = Problems(found, _digest(found))
    seen: dict[str, int] = {}
    for place, name in enumerate(problems.ids):
        if name in seen:
            message = (
                f"the problems at places {seen[name]} and {place} are both called {name!r}; give the files "
                "other names, or name a column whose values differ with --columns id=COLUMN"
            )
            raise InputError(Problem(message, where="--data"))
        seen[name] = place
    return problems


def _all(sets: Iterable[ProblemSet]) -> Iterator[dict[str, Any]]:
    place = 0
    for chosen in sets:
        for row in islice(_of_set(chosen), chosen.limit or None):
            yield {**row, DRAW_ID: place * NUMBERS}
            place += 1


def _of_set(chosen: ProblemSet) -> Iterator[dict[str, Any]]:
    base = Path(chosen.folder) if chosen.folder else None
    source = open_source(replace(chosen.data, shuffle=False), seed=SEED, base=base)
    for place in range(len(source)):
        row = dict(source.row(place))
        own, name = row.get(chosen.source_field), row.get(chosen.id_field)
        row[PROBLEM_SOURCE] = chosen.name if own is None else str(own)
        row[PROBLEM_ID] = f"{chosen.name}/{place if name is None else name}"
        if chosen.prompt and isinstance(row.get("prompt"), str):
            row["prompt"] = chosen.prompt.replace(PLACE, row["prompt"])
        yield row


def _digest(found: Sequence[Mapping[str, Any]]) -> str:
    """sha256 of all rows; what has no JSON form counts by its `repr`."""
    whole = hashlib.sha256()
    for row in found:
        whole.update(json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass") + b"\n")
    return whole.hexdigest()
