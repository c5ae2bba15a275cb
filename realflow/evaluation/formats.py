"""What `--data` names: files of known shapes and reasoning-gym's tasks, as problem sets with a reward."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from realflow.errors import InputError, Problem
from realflow.evaluation.problems import PLACE, ProblemSet
from realflow.graph.gymtasks import TASKS
from realflow.graph.schema import NAME, nearest
from realflow.graph.types import DataSpec

GYM_PROBLEMS = 100
"""Problems of a task, where `--limit` does not say otherwise."""

MATH_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
CODE_PROMPT = (
    "Complete the following Python function. Answer with the whole function in one block of code.\n\n"
    "```python\n{problem}\n```"
)

GYM_PROMPT = (
    "{problem}\n\nPlease reason step by step, and put your final answer within <answer></answer> tags."
)

ROLES: Mapping[str, tuple[str, ...]] = {
    "problem": ("problem", "question", "prompt", "query"),
    "answer": ("answer", "final_answer", "expected_answer", "ground_truth", "solution"),
    "id": ("id", "problem_id", "task_id", "unique_id", "question_id"),
    "source": ("source", "data_source", "dataset"),
}
"""What a column can be for -> the names that are looked for, the first that is there."""

_HUMANEVAL = ("prompt", "test", "entry_point")


@dataclass(frozen=True)
class Asked:
    """What `--data` names: its problems, and the reward that judges answers unless another is asked for."""

    problems: ProblemSet
    reward: str


@dataclass(frozen=True)
class Wishes:
    """How a file is to be read: role -> column, a text around each problem (`{problem}` stands for it) in
    place of the usual one, at most so many problems (0: all), and whether every column is to be a field."""

    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    limit: int = 0
    whole: bool = False


def open_format(name: str, wishes: Wishes) -> Asked:
    """A file (.jsonl or .parquet) or a task of reasoning-gym.

    A file with the columns prompt, test and entry_point is HumanEval's; else it has a problem and an answer
    under one of the names in `ROLES`, or under those that are wished for. Raises InputError.
    """
    columns, prompt = wishes.columns, wishes.prompt
    if prompt is not None and PLACE not in prompt:
        raise InputError(Problem(f"found {prompt!r}, expected a text with {PLACE} in it", where="--prompt"))
    for role in columns:
        if role not in ROLES:
            raise InputError(Problem(f"unknown role {role!r}; {nearest(role, ROLES)}", where="--columns"))
    if name in TASKS:
        return _gym(name, wishes)
    path = Path(name).expanduser()
    if path.suffix not in (".jsonl", ".parquet"):
        message = f"{name!r} is neither a .jsonl or .parquet file nor a task of reasoning-gym; "
        raise InputError(Problem(message + nearest(name, TASKS), where="--data"))
    known = columns_of(path)
    if not columns and set(_HUMANEVAL) <= set(known):
        return _humaneval(path, known, wishes)
    return _math(path, known, wishes)


def columns_of(path: Path) -> list[str]:
    """The names of a file's columns; of a .jsonl file those of its first row. Raises InputError."""
    try:
        if path.suffix == ".parquet":
            return _parquet_columns(path)
        with path.open(encoding="utf-8-sig") as lines:
            first = next((line for line in lines if line.strip()), None)
        row = None if first is None else json.loads(first)
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise InputError(Problem(message, where="--data", file=str(path))) from None
    except ValueError as error:  # neither JSON nor UTF-8
        raise InputError(Problem(f"the first row is not JSON: {error}", file=str(path))) from None
    if not isinstance(row, dict):
        found = "the file is empty" if row is None else f"found {type(row).__name__} in the first row"
        raise InputError(Problem(f"{found}; expected a JSON object on each line", file=str(path)))
    return [str(name) for name in row]


def _parquet_columns(path: Path) -> list[str]:
    if importlib.util.find_spec("pyarrow") is None:
        message = "reading parquet needs pyarrow, which is not installed: pip install pyarrow"
        raise InputError(Problem(message, where="--data"))
    arrow = importlib.import_module("pyarrow")
    try:
        return list(map(str, importlib.import_module("pyarrow.parquet").read_schema(path).names))
    except arrow.ArrowException as error:
        raise InputError(Problem(f"not a parquet file that can be read: {error}", file=str(path))) from None


def _math(path: Path, known: Sequence[str], wishes: Wishes) -> Asked:
    """Rows with a problem and an answer."""
    roles = {role: _column(path, role, known, wishes.columns) for role in ROLES}
    problem, answer = roles["problem"], roles["answer"]
    if problem is None or answer is None:
        missing = " and the ".join(role for role in ("problem", "answer") if roles[role] is None)
        message = (
            f"no column for the {missing}; it has {', '.join(known)}. Say which it is, such as "
            f"--columns {missing.split()[0]}=COLUMN"
        )
        raise InputError(Problem(message, where="--data", file=str(path)))
    fields = {"prompt": problem, "answer": answer}
    return Asked(_set(path, fields, known, roles, MATH_PROMPT, wishes), "rewards.math")


def _humaneval(path: Path, known: Sequence[str], wishes: Wishes) -> Asked:
    """HumanEval: a function's head, its tests and its name. `problem` is the head as it stands."""
    roles = {role: _column(path, role, known, {}) for role in ("id", "source")}
    fields = {"problem": "prompt", **{name: name for name in _HUMANEVAL}}
    return Asked(_set(path, fields, known, roles, CODE_PROMPT, wishes), "rewards.humaneval")


def _gym(task: str, wishes: Wishes) -> Asked:
    if wishes.columns:
        raise InputError(Problem(f"{task} is a task, which has no columns to choose", where="--columns"))
    fields = {"prompt": "question", "answer": "answer", "entry": "entry"}
    data = DataSpec("reasoning_gym", fields, task=task, size=wishes.limit or GYM_PROBLEMS)
    return Asked(ProblemSet(task, data, prompt=wishes.prompt or GYM_PROMPT), "rewards.gym")


def _set(
    path: Path,
    fields: Mapping[str, str],
    known: Sequence[str],
    roles: Mapping[str, str | None],
    prompt: str,
    wishes: Wishes,
) -> ProblemSet:
    """The set of a file. Id and source have fields of their own, apart from columns of these names."""
    named = {f"_{role}": column for role in ("id", "source") if (column := roles[role]) is not None}
    others = {name: name for name in known if NAME.fullmatch(name)} if wishes.whole else {}
    return ProblemSet(
        path.name.removesuffix(path.suffix),
        DataSpec(path.suffix[1:], {**others, **fields, **named}, path=str(path.resolve())),
        prompt=prompt if wishes.prompt is None else wishes.prompt,
        id_field="_id" if "_id" in named else "",
        source_field="_source" if "_source" in named else "",
        limit=wishes.limit,
    )


def _column(path: Path, role: str, known: Sequence[str], columns: Mapping[str, str]) -> str | None:
    """The column for a role; None where there is none."""
    if role not in columns:
        return next((name for name in ROLES[role] if name in known), None)
    if columns[role].partition(".")[0] not in known:
        message = f"no column {columns[role]!r}; {nearest(columns[role], known)}"
        raise InputError(Problem(message, where=f"--columns {role}", file=str(path)))
    return columns[role]
