"""`rewards.math`: 1.0 where the answer in a completion is the right one, 0.0 where it is wrong or not there.

`answers` says what an answer is and when two are the same. What needs mathematics runs in workers with a
limit of time for each pair; a pair that goes over it, or whose worker dies, is not judged. What then becomes
of it is the option `on_timeout`: `missing` (no reward: the sample is left out of means), `wrong` (0.0) or
`error`. The default hides nothing and stops nothing. A model that learns to write answers that cannot be
judged shows in the metrics; `wrong` takes the use out of it.

Metrics are shares of samples: `reward/math/missing` (no reward), `timeout` (over the limit), `error` (a
worker failed), `no_truth` (the data has no answer that can be read), `unanswered` (wrong, as there is none).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import isfinite
from typing import Any

from realflow.errors import InputError, RunError
from realflow.graph.builtins import check_options
from realflow.rewards.answers import extract, quick
from realflow.rewards.answers.find import last_box
from realflow.rewards.answers.normal import LONGEST
from realflow.rewards.pool import Pool, Timeout, Value

ON_TIMEOUT = ("missing", "wrong", "error")
FUNCTION = "realflow.rewards.answers:judged"
SETUP = "realflow.rewards.answers.symbolic:prepare"


def math(
    completion: Sequence[str],
    answer: Sequence[Any],
    *,
    seconds: float = 5.0,
    workers: int = 1,
    on_timeout: str = "missing",
) -> dict[str, Any]:
    """`rewards` (1.0, 0.0, or None where there is no telling) and `metrics` of completions.

    An answer of the data is a number, text (LaTeX or plain; of a whole solution its last box, or what follows
    `####`), or a list of which any is right. `seconds` is the limit for one pair, `workers` the processes.

    Raises InputError for an option out of its range, RunError with `on_timeout="error"` for a pair that
    could not be judged, and when no worker can start.
    """
    check_options("rewards.math", seconds=seconds, workers=workers)
    if on_timeout not in ON_TIMEOUT:
        raise InputError(f"rewards.math: on_timeout must be {', '.join(ON_TIMEOUT)}, not {on_timeout!r}")
    rewards: list[float | None] = []
    counts: Counter[str] = Counter()
    open_pairs: list[tuple[int, str, str]] = []
    for index, (text, expected) in enumerate(zip(completion, answer, strict=True)):
        truths, found = truths_of(expected), extract(text)
        verdicts = [] if found is None else [quick(found, truth) for truth in truths]
        counts["no_truth"] += not truths
        counts["unanswered"] += bool(truths) and found is None
        rewards.append(None if not truths else float(True in verdicts))
        if found is not None and True not in verdicts:
            pairs = zip(truths, verdicts, strict=True)
            open_pairs += [(index, found, truth) for truth, verdict in pairs if verdict is None]
    if open_pairs:
        _judge(open_pairs, rewards, counts, _pool(seconds, workers), on_timeout)
    counts["missing"] = sum(reward is None for reward in rewards)
    names = ("missing", "timeout", "error", "no_truth", "unanswered")
    return {
        "rewards": rewards,
        "metrics": {f"reward/math/{name}": counts[name] / max(1, len(rewards)) for name in names},
    }


def _judge(
    pairs: list[tuple[int, str, str]],
    rewards: list[float | None],
    counts: Counter[str],
    pool: Pool,
    on_timeout: str,
) -> None:
    """Judge (sample, answer, truth) in workers. One truth of several that is met is enough."""
    unjudged: dict[int, str] = {}
    results = pool.map([(found, truth) for _, found, truth in pairs])
    for (index, found, truth), result in zip(pairs, results, strict=True):
        if isinstance(result, Value):
            if result.value:
                rewards[index] = 1.0
            continue
        if isinstance(result, Timeout):
            what, how = "timeout", f"took longer than {result.seconds:g} s"
        else:
            what, how = "error", result.message
        if how.startswith("UnreadableTruth:"):
            what = "no_truth"
        elif on_timeout == "error":
            raise RunError(f"rewards.math: comparing {found[:200]!r} with {truth[:200]!r}: {how}")
        unjudged[index] = what
    for index, what in unjudged.items():
        if rewards[index] != 1.0:
            counts[what] += 1
            rewards[index] = 0.0 if on_timeout == "wrong" and what != "no_truth" else None


def truths_of(answer: Any) -> list[str]:
    """The texts of which any is right; none where the data has no answer that can be read."""
    if isinstance(answer, list | tuple):
        return [text for one in answer for text in truths_of(one)]
    if isinstance(answer, float) and not isfinite(answer):
        return []
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    text = str(answer) if isinstance(answer, str | bool | int | float) else ""
    boxed = last_box(text)
    if boxed is None and "####" in text:
        text = text.rpartition("####")[2]
    text = (text if boxed is None else boxed).strip()
    return [text] if 0 < len(text) <= LONGEST else []


@lru_cache(maxsize=8)
def _pool(seconds: float, workers: int) -> Pool:
    """The workers of this process: they start with the first pair that needs one and end with the process."""
    return Pool(FUNCTION, workers=workers, seconds=seconds, setup=SETUP)
