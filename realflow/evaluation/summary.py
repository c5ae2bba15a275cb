"""From samples to scores: of each problem, of each source, of all, and of one evaluation against another.

A sample without a reward is missing: it is counted, and left out of every score. A problem that has fewer
than k samples left says nothing of pass@k.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from realflow.errors import InputError, Problem
from realflow.evaluation.intervals import Estimate, estimate
from realflow.evaluation.passk import pass_at_k
from realflow.evaluation.samples import Sample

ALL = "all"
GREEDY = "greedy"
REWARD = "reward"


@dataclass(frozen=True)
class ProblemScores:
    """What the samples of one problem say: the name of a score -> its value.

    `missing` counts the samples without a reward, `cut` those that were cut off at their limit of tokens.
    """

    problem_id: str
    source: str
    scores: Mapping[str, float]
    samples: int
    missing: int
    cut: int
    tokens: int


@dataclass(frozen=True)
class Line:
    """The scores of one source, or of all: the mean over problems of each, with its interval."""

    name: str
    problems: int
    samples: int
    missing: int
    cut: int
    mean_tokens: float
    scores: Mapping[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """`lines` are the sources by name, where there are several, then all. `names` are those of the scores.

    `whole` says that no reward was other than 0 or 1, so that the mean reward is pass@1.
    """

    names: tuple[str, ...]
    lines: tuple[Line, ...]
    whole: bool

    @property
    def all(self) -> Line:
        """The line of all problems."""
        return self.lines[-1]


@dataclass(frozen=True)
class Difference:
    """How much higher the scores of one evaluation are than another's, over the problems that both have.

    `only` counts the problems that just the first has, and just the second.
    """

    names: tuple[str, ...]
    lines: tuple[Line, ...]
    only: tuple[int, int]


def score_names(ks: Sequence[int], *, greedy: bool) -> tuple[str, ...]:
    """The names of the scores, in the order of tables."""
    return (REWARD, *(f"pass@{k}" for k in ks), *((GREEDY,) if greedy else ()))


def per_problem(
    samples: Iterable[Sample], *, ks: Sequence[int], solved: float = 1.0
) -> dict[str, ProblemScores]:
    """The scores of each problem, by its id. A sample solves its problem with a reward of at least `solved`.

    `reward` is the mean reward of the drawn samples, `greedy` 1 where the greedy answer solves the problem.
    """
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.problem_id, []).append(sample)
    return {name: _of_problem(name, drawn, ks, solved) for name, drawn in found.items()}


def _of_problem(problem: str, samples: Sequence[Sample], ks: Sequence[int], solved: float) -> ProblemScores:
    drawn = [s.reward for s in samples if not s.greedy and s.reward is not None]
    greedy = [s.reward for s in samples if s.greedy and s.reward is not None]
    scores: dict[str, float] = {}
    if drawn:
        scores[REWARD] = statistics.fmean(drawn)
    right = sum(reward >= solved for reward in drawn)
    scores |= {f"pass@{k}": pass_at_k(len(drawn), right, k) for k in ks if k <= len(drawn)}
    if greedy:
        scores[GREEDY] = float(greedy[0] >= solved)
    return ProblemScores(
        problem,
        samples[0].source,
        scores,
        samples=len(samples),
        missing=sum(s.reward is None for s in samples),
        cut=sum(s.finish_reason == "length" for s in samples),
        tokens=sum(s.tokens for s in samples),
    )


def summary(samples: Sequence[Sample], *, ks: Sequence[int], solved: float = 1.0) -> Summary:
    """The scores of each source and of all.

    The line of all is the mean over problems, not over sources. Raises InputError where there is no sample.
    """
    if not samples:
        raise InputError("there are no samples to be summed up")
    names = score_names(ks, greedy=any(sample.greedy for sample in samples))
    problems = per_problem(samples, ks=ks, solved=solved)
    whole = all(sample.reward in (None, 0.0, 1.0) for sample in samples) and solved == 1.0
    lines = [_line(name, part, names) for name, part in _parts(problems.values())]
    return Summary(names, tuple(lines), whole)


def _parts(problems: Iterable[ProblemScores]) -> list[tuple[str, list[ProblemScores]]]:
    """The problems of each source, where there are several, and all of them."""
    everything = list(problems)
    sources = sorted({problem.source for problem in everything})
    parts = [(name, [p for p in everything if p.source == name]) for name in sources]
    return [*(parts if len(parts) > 1 else []), (ALL, everything)]


def _line(name: str, problems: Sequence[ProblemScores], names: Sequence[str]) -> Line:
    samples = sum(problem.samples for problem in problems)
    return Line(
        name,
        problems=len(problems),
        samples=samples,
        missing=sum(problem.missing for problem in problems),
        cut=sum(problem.cut for problem in problems),
        mean_tokens=sum(problem.tokens for problem in problems) / samples if samples else 0.0,
        scores={score: estimate([p.scores[score] for p in problems if score in p.scores]) for score in names},
    )


def difference(
    ours: Sequence[Sample], theirs: Sequence[Sample], *, ks: Sequence[int], solved: float = 1.0
) -> Difference:
    """Our scores less theirs, paired by problem.

    A score counts where both know it. Raises InputError where the two have no problem in common.
    """
    mine = per_problem(ours, ks=ks, solved=solved)
    other = per_problem(theirs, ks=ks, solved=solved)
    common = [problem for problem in mine if problem in other]
    if not common:
        message = "the two evaluations have no problem in common; expected the same --data"
        raise InputError(Problem(message, where="--against"))
    pairs = [_less(mine[problem], other[problem]) for problem in common]
    there = {score for pair in pairs for score in pair.scores}
    names = tuple(name for name in score_names(ks, greedy=True) if name in there)
    lines = tuple(_line(name, part, names) for name, part in _parts(pairs))
    return Difference(names, lines, only=(len(mine) - len(common), len(other) - len(common)))


def _less(ours: ProblemScores, theirs: ProblemScores) -> ProblemScores:
    scores = {name: ours.scores[name] - theirs.scores[name] for name in ours.scores if name in theirs.scores}
    samples, missing = ours.samples + theirs.samples, ours.missing + theirs.missing
    cut, tokens = ours.cut + theirs.cut, ours.tokens + theirs.tokens
    return ProblemScores(ours.problem_id, ours.source, scores, samples, missing, cut, tokens)


def to_mapping(found: Summary | Difference) -> dict[str, Any]:
    """Plain values, for results.json."""
    return asdict(found)
