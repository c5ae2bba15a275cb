"""How long prompts and responses are: what costs are counted with, and the longest that memory must hold.

    lengths = read_lengths(graph)
    lengths.batch(prompts=8, samples=4)    # a step that is typical, the same each time

A graph gives numbers, distributions or the trace of a former run (`realflow.graph.lengths`). They all become
pairs of lengths with weights. A distribution is log-normal, cut at the longest length so that its mean stays
as it was given: responses are skewed, and their tail is what a rollout ends with.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, TypeGuard, TypeVar

from realflow.errors import InputError, Problem
from realflow.graph.lengths import P90
from realflow.graph.types import Graph, LengthsSpec, Spread

T = TypeVar("T")

SAMPLES = "samples.jsonl"
"""What a run calls the file of its samples."""

_PROMPT_BINS = tuple(i / 8 for i in range(9))
_RESPONSE_BINS = (*(i / 16 for i in range(16)), *(1 - 2.0**-k for k in range(5, 11)), 1.0)
"""Quantiles at which lengths are grouped; finer at the end, where the longest of a batch come from."""
_EXACT = 256  # pairs of a trace that are kept as they are
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, order=True)
class Pair:
    """Tokens of a prompt and of a response, and the share of samples that are so."""

    prompt: int
    response: int
    weight: float

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return self.prompt + self.response


Group = tuple[int, tuple[int, ...]]
"""Tokens of a prompt, and of each response to it."""


@dataclass(frozen=True)
class Lengths:
    """What is known of lengths. `pairs` rise, and their weights add up to 1.

    `longest_prompt` and `longest_response` are the longest that the graph lets come, whatever the pairs say:
    memory must hold them. All prompts begin with the same `common` tokens. `note` says where the pairs come
    from, for people; `assumed`: nothing was given, all are taken to be as long as they may.
    """

    pairs: tuple[Pair, ...]
    longest_prompt: int
    longest_response: int
    note: str
    assumed: bool = False
    common: int = 0

    @cached_property
    def prompt(self) -> float:
        """Mean tokens of a prompt."""
        return sum(pair.prompt * pair.weight for pair in self.pairs)

    @cached_property
    def response(self) -> float:
        """Mean tokens of a response."""
        return sum(pair.response * pair.weight for pair in self.pairs)

    @property
    def means(self) -> dict[str, float]:
        """Mean tokens of a prompt and of a response, as a plan records them."""
        return {"prompt": round(self.prompt, 1), "response": round(self.response, 1)}

    def up_to(self, new_tokens: int) -> Lengths:
        """Responses of a call that ends them after `new_tokens`."""
        if all(pair.response <= new_tokens for pair in self.pairs):
            return self
        cut: dict[tuple[int, int], float] = {}
        for pair in self.pairs:
            key = pair.prompt, min(pair.response, new_tokens)
            cut[key] = cut.get(key, 0.0) + pair.weight
        pairs = tuple(Pair(*key, weight) for key, weight in sorted(cut.items()))
        return replace(self, pairs=pairs, longest_response=min(self.longest_response, new_tokens))

    def batch(self, prompts: int, samples: int) -> tuple[Group, ...]:
        """A typical step: for each of `prompts` its tokens and those of its `samples` responses.

        Deterministic: the lengths are evenly spaced quantiles, in an order in which neighbours differ.
        """
        if (prompts, samples) not in self._batches:
            self._batches[prompts, samples] = self._batch(prompts, samples)
        return self._batches[prompts, samples]

    def longest_first(self, prompts: int, samples: int) -> tuple[Group, ...]:
        """The same step, prompts with the longest responses first."""
        if (prompts, samples) not in self._sorted:
            every = self.batch(prompts, samples)
            self._sorted[prompts, samples] = tuple(sorted(every, key=lambda group: (-max(group[1]), group)))
        return self._sorted[prompts, samples]

    @cached_property
    def deviation(self) -> float:
        """Standard deviation of the tokens of a response."""
        mean = self.response
        return math.sqrt(sum(pair.weight * (pair.response - mean) ** 2 for pair in self.pairs))

    @cached_property
    def _batches(self) -> dict[tuple[int, int], tuple[Group, ...]]:
        """Made once: a search asks for the same ones a thousand times."""
        return {}

    @cached_property
    def _sorted(self) -> dict[tuple[int, int], tuple[Group, ...]]:
        return {}

    def _batch(self, prompts: int, samples: int) -> tuple[Group, ...]:
        starts, classes = self._classes
        first, every = _spread(prompts), _spread(prompts * samples)
        found = []
        for index in range(prompts):
            length, ends, responses = classes[bisect_right(starts, first[index]) - 1]
            mine = every[index * samples : (index + 1) * samples]
            picks = tuple(responses[min(bisect_right(ends, u), len(responses) - 1)] for u in mine)
            found.append((length, picks))
        return tuple(found)

    @cached_property
    def _classes(self) -> tuple[list[float], list[tuple[int, list[float], list[int]]]]:
        """For each length of prompts: the quantile where it begins; it, the ends of the quantiles of its
        responses, and these."""
        by_prompt: dict[int, list[Pair]] = {}
        for pair in self.pairs:
            by_prompt.setdefault(pair.prompt, []).append(pair)
        starts, classes, start = [], [], 0.0
        for prompt, pairs in by_prompt.items():
            weight = sum(pair.weight for pair in pairs)
            ends = [done / weight for done in accumulate(pair.weight for pair in pairs)]
            starts.append(start)
            classes.append((prompt, ends, [pair.response for pair in pairs]))
            start += weight
        return starts, classes


def _spread(count: int) -> list[float]:
    """The midpoints of `count` equal parts of [0, 1), neighbours far from each other."""
    order = sorted(range(count), key=lambda index: (index * _GOLDEN) % 1.0)
    found = [0.0] * count
    for place, index in enumerate(order):
        found[index] = (place + 0.5) / count
    return found


def read_lengths(graph: Graph) -> Lengths:
    """The lengths of a graph's main rollout, or of its data where nothing is generated.

    Raises InputError where the trace that the graph names cannot be read.
    """
    spec = graph.lengths or LengthsSpec()
    new = max((call.sampling.max_new_tokens for call in graph.calls if call.sampling), default=0)
    prompts = graph.data.prompt_tokens
    generated = any(call.op == "generate" for call in graph.calls)
    # Without a rollout data.max_length holds for prompt and completion together.
    longest = (prompts, new) if generated else (prompts, 0)
    if spec.trace is not None:
        found = _from_trace(Path(spec.trace), spec.prompt, prompts)
        pairs = _pairs([(min(p, prompts), min(r, new) if generated else r) for p, r in found])
        note = f"as in {len(found)} samples of {spec.trace}"
        return Lengths(pairs, *longest, note, common=spec.common)
    one, said = _side(spec.prompt, prompts, _PROMPT_BINS, "prompts", "data.max_length")
    other, also = (
        _side(spec.response, new or prompts, _RESPONSE_BINS, "responses", "max_new_tokens")
        if generated or spec.response is not None
        else ([(0, 1.0)], "")
    )
    merged: dict[tuple[int, int], float] = {}
    for prompt, weight in one:
        for response, share in other:
            merged[prompt, response] = merged.get((prompt, response), 0.0) + weight * share
    pairs = tuple(Pair(*key, weight) for key, weight in sorted(merged.items()))
    note = " and ".join(filter(None, (said, also)))
    return Lengths(pairs, *longest, note, assumed=spec == LengthsSpec(), common=spec.common)


Weighted = list[tuple[int, float]]
"""Lengths and their weights."""


def _side(
    spread: Spread | None, most: int, bins: Sequence[float], what: str, limit: str
) -> tuple[Weighted, str]:
    """Lengths of prompts or of responses, and the same in words."""
    if spread is None:
        return [(most, 1.0)], f"{what} taken to be as long as {limit} allows ({most} tokens)"
    if not spread.std and spread.p90 is None:
        return [(max(1, round(spread.mean)), 1.0)], f"{what} of {spread.mean:g} tokens"
    longest = min(spread.longest or most, most)
    kind = f"standard deviation {spread.std:g}" if spread.p90 is None else f"9 of 10 within {spread.p90:g}"
    return quantised(spread, longest, bins), f"{what} of {spread.mean:g} tokens ({kind}, at most {longest})"


def quantised(spread: Spread, longest: int, bins: Sequence[float] = _RESPONSE_BINS) -> Weighted:
    """A log-normal distribution as a few lengths from 1 to `longest`, with its mean kept."""
    if spread.p90 is not None:
        sigma = P90 - math.sqrt(max(0.0, P90**2 - 2 * math.log(spread.p90 / spread.mean)))
    else:
        sigma = math.sqrt(math.log1p((spread.std or 0.0) ** 2 / spread.mean**2))
    weights = [stop - start for start, stop in pairwise(bins)]
    shapes = [_normal_part(start, stop) for start, stop in pairwise(bins)]

    def lengths(mu: float) -> list[float]:
        return [
            fmean(min(max(math.exp(min(mu + sigma * z, 60.0)), 1.0), longest) for z in part)
            for part in shapes
        ]

    low, high = -sigma * 10, math.log(longest) + sigma * 10
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(w * x for w, x in zip(weights, lengths(middle), strict=True))
        low, high = (middle, high) if mean < spread.mean else (low, middle)
    merged: dict[int, float] = {}
    for weight, length in zip(weights, lengths(high), strict=True):
        merged[round(length)] = merged.get(round(length), 0.0) + weight
    return list(merged.items())


def _normal_part(start: float, stop: float, points: int = 8) -> list[float]:
    """Evenly spaced quantiles of a normal variable between two of its quantiles."""
    normal = NormalDist()
    return [normal.inv_cdf(start + (stop - start) * (i + 0.5) / points) for i in range(points)]


def _pairs(found: Iterable[tuple[int, int]]) -> tuple[Pair, ...]:
    """Lengths as they were, as weighted pairs; many are grouped by quantiles, with the mean of each."""
    rows = sorted(found)
    counts: dict[tuple[int, int], int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    if len(counts) > _EXACT:
        counts = {}
        for part in _parts(rows, _PROMPT_BINS):
            prompt = round(fmean(p for p, _ in part))
            for some in _parts(sorted(r for _, r in part), _RESPONSE_BINS):
                key = prompt, round(fmean(some))
                counts[key] = counts.get(key, 0) + len(some)
    return tuple(Pair(*key, count / len(rows)) for key, count in sorted(counts.items()))


def _parts(rows: Sequence[T], bins: Sequence[float]) -> Iterable[Sequence[T]]:
    """Sorted rows between quantiles, without empty parts."""
    ends = [round(share * len(rows)) for share in bins]
    return (rows[a:b] for a, b in pairwise(ends) if b > a)


def _from_trace(path: Path, given: Spread | None, most: int) -> list[tuple[int, int]]:
    """(prompt, response) of every sample that a run has recorded. Prompts are as `given`, or as long as
    they may be, where the run did not record theirs."""
    file = path / SAMPLES if path.is_dir() else path
    where = "lengths.trace"
    if not file.is_file():
        raise InputError(
            Problem(f"{file}: no such file; expected the folder of a former run, or its {SAMPLES}", where)
        )
    fallback = most if given is None else round(given.mean)
    found = []
    with file.open(encoding="utf-8") as lines:
        for row in map(_mapping, lines):
            prompt = row.get("prompt_length") if given is None else None
            response = row.get("length")
            if _is_count(response):
                found.append((prompt if _is_count(prompt) else fallback, response))
    if not found:
        raise InputError(
            Problem(f"{file} has no sample with its length; expected the {SAMPLES} of a run", where)
        )
    return found


def _mapping(line: str) -> dict[str, Any]:
    """A line of a JSON-lines file; empty where it is cut off or something else."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
