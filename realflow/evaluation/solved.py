"""Prompts for training that a model solves sometimes: a source of data, from the folder of an evaluation.

data:
  source: realflow.evaluation.solved:rows
  path: evaluations/train
  options: {above: 0.1, below: 0.9}
  fields: {prompt: prompt, answer: answer}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from realflow.errors import InputError, Problem
from realflow.evaluation.folder import PROBLEMS, read_samples
from realflow.evaluation.problems import PROBLEM_ID
from realflow.observe.files import read_lines


def rows(path: str, above: float = 0.0, below: float = 1.0, solved: float = 1.0) -> list[dict[str, Any]]:
    """The problems of an evaluation whose share of right answers is over `above` and under `below`.

    Unless said otherwise these are the problems that are neither always nor never solved: from the others
    advantages within a group learn nothing (DAPO, arXiv 2503.14476, section 3.2; here before training, not
    during it). An answer is right from a reward of `solved` on. Greedy answers do not count, and neither do
    those without a reward; a problem without any reward is left out.

    A row has what problems.jsonl has (`prompt` as it was asked, `answer`, `problem_id`, `source`), and
    `solve_rate`. In order. Raises InputError for a folder that is no evaluation, one that lacks answers to
    some of its problems, and where nothing is left.
    """
    if not 0 <= above < below <= 1:
        message = f"found {above} and {below}, expected 0 <= above < below <= 1"
        raise InputError(Problem(message, where="data.options"))
    folder = Path(path)
    drawn: dict[str, list[float | None]] = {}
    for sample in read_samples(folder):
        if not sample.greedy:
            drawn.setdefault(sample.problem_id, []).append(sample.reward)
    problems = _problems(folder)
    missing = [str(row[PROBLEM_ID]) for row in problems if row[PROBLEM_ID] not in drawn]
    if missing:
        message = (
            f"{len(missing)} of {len(problems)} problems have no drawn answer, such as {missing[0]}; "
            "finish the evaluation with its own command (which goes on), with --samples above 0"
        )
        raise InputError(Problem(message, file=str(folder)))
    found = [{**row, "solve_rate": _rate(drawn[row[PROBLEM_ID]], solved)} for row in problems]
    kept = [row for row in found if row["solve_rate"] is not None and above < row["solve_rate"] < below]
    if not kept:
        share = f"in a share of its answers over {above} and under {below}"
        message = f"none of {len(found)} problems is solved {share}"
        raise InputError(Problem(message, file=str(folder)))
    return kept


def _problems(folder: Path) -> list[dict[str, Any]]:
    file = folder / PROBLEMS
    if not file.is_file():
        message = f"there is no {PROBLEMS} here; expected the folder of an evaluation"
        raise InputError(Problem(message, file=str(folder)))
    return [row for row in read_lines(file) if PROBLEM_ID in row]


def _rate(rewards: list[float | None], solved: float) -> float | None:
    """The share of the rewards that are at least `solved`; None where there is none."""
    known = [reward for reward in rewards if reward is not None]
    return sum(reward >= solved for reward in known) / len(known) if known else None
