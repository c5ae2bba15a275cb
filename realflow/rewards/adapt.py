"""Calling a user's reward function in the signature it was written for.

    TRL    f(completions, prompts=None, completion_ids=None, **columns) -> list[float | None]
    verl   compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | dict

The first gets columns, the second one sample at a time; both may be `async`. `started(i)` is told
which sample is being worked on (an index into the columns, None for no single one), so that one that
raises or hangs can be named. What comes back is checked by the caller, not here.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, overload

Started = Callable[[int | None], None]


class WatchedList(list[Any]):
    """A list that tells `started(i)` which entry was taken last, through iteration or an index, and
    `started(None)` when an iteration ends.

    A function that gets whole columns is thereby followed from sample to sample.
    """

    def __init__(self, values: Sequence[Any], started: Started) -> None:
        super().__init__(values)
        self._started = started

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self)):
            self._started(index)
            yield super().__getitem__(index)
        self._started(None)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        found = super().__getitem__(index)
        if not isinstance(index, slice):
            self._started(index.__index__() % len(self))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies (`copy`, `deepcopy`, another process) are plain lists."""
        return list, (list(super().__iter__()),)


def call_trl(function: Callable[..., Any], columns: Mapping[str, Sequence[Any]], started: Started) -> Any:
    """Call a function in TRL's signature with the columns it is to be given; returns what it returns.

    Where all prompts are lists of messages, completions become messages too, as TRL has it:
    `[{"role": "assistant", "content": text}]`.
    """
    given = dict(columns)
    prompts = given.get("prompts")
    if prompts and all(isinstance(prompt, list) for prompt in prompts):
        given["completions"] = [[{"role": "assistant", "content": text}] for text in given["completions"]]
    result = function(**{name: WatchedList(column, started) for name, column in given.items()})
    return asyncio.run(_result(result)) if inspect.isawaitable(result) else result


def call_verl(
    function: Callable[..., Any], columns: Mapping[str, Sequence[Any]], started: Started
) -> list[Any]:
    """Call a function in verl's signature for each sample; of a dict that it returns, `score` counts.

    Coroutines run side by side; `started` is then told the first sample that has not ended.
    Raises ValueError for a dict without `score`.
    """
    count = len(columns["solution_str"])
    results: list[Any] = []
    for index in range(count):
        started(index)
        results.append(function(**{name: column[index] for name, column in columns.items()}))
        if not inspect.isawaitable(results[-1]):
            results[-1] = _score(results[-1])
    waiting = [index for index, result in enumerate(results) if inspect.isawaitable(result)]
    if waiting:
        asyncio.run(_settle(results, waiting, started))
    return results


async def _settle(results: list[Any], waiting: Sequence[int], started: Started) -> None:
    """Await `results[i]` for each i of `waiting`, all at once, and put the score in its place."""
    left = dict.fromkeys(waiting)
    started(waiting[0])

    async def settle(index: int) -> None:
        try:
            results[index] = _score(await results[index])
        except Exception:
            started(index)
            raise
        del left[index]
        if left:
            started(next(iter(left)))

    await asyncio.gather(*(settle(index) for index in waiting))


def _score(result: Any) -> Any:
    if not isinstance(result, Mapping):
        return result
    if "score" not in result:
        raise ValueError(f"the function returned a dict with {', '.join(map(str, result))}, but no 'score'")
    return result["score"]


async def _result(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
