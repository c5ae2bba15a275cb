"""How much of its samples a call has on one replica at once: the most that can come, or what came. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from realflow.data.balance import micro_batches, minibatches, partition
from realflow.graph.types import Call, Graph
from realflow.layout import Layout

PREFILL = 4096
"""Tokens that a pass of generation prefills at most, unless a single prompt is longer."""

SHORT = 256
"""Tokens up to which a CPU has the scores of attention in memory."""

WASTE = 32_768
"""Query-key pairs that sequences which are computed together may waste on padding."""

# They are the engines' own numbers, said again because planning imports no torch; `tests/plan` compares them.

Batch = Sequence[tuple[int, Sequence[int]]]
"""A step: for each prompt its tokens, and those of each of its responses (`Lengths.batch`)."""


class How(Protocol):
    """How a call runs, as far as its memory goes; a `CallPlan` is one."""

    @property
    def layout(self) -> Layout: ...  # noqa: D102
    @property
    def micro_batch_tokens(self) -> int: ...  # noqa: D102
    @property
    def slots(self) -> int: ...  # noqa: D102
    @property
    def after(self) -> Literal["keep", "free", "offload"]: ...  # noqa: D102
    @property
    def schedule(self) -> Literal["1f1b", "zero_bubble"]: ...  # noqa: D102
    @property
    def recompute(self) -> bool: ...  # noqa: D102
    @property
    def sequence_parallel(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Load:
    """What one replica has of a call's samples at once.

    `tokens` are those of its largest micro-batch; of generation the rows of a pass: one for each running
    sample, and what is prefilled. `distinct` are those that layers compute outside attention: beginnings
    that samples share count once. `padded` are the rows of attention, `pairs` its (query, key) pairs in
    sequences of up to `SHORT` tokens. `longest` is the longest sequence, or prompt of a generation.
    `scored` are the rows of logits. `micro_batches` follow one another before an optimizer step, and have
    `total` tokens.

    Of generation, `slots` are those of the KV cache, each with `room` for as many tokens, `running` those
    in use, whose samples are up to `reach` tokens long.

    `most`: that much may come, or any less.
    """

    tokens: int
    distinct: int
    padded: int
    short: int
    pairs: int
    longest: int
    scored: int
    micro_batches: int = 1
    total: int = 0
    slots: int = 0
    room: int = 0
    running: int = 0
    reach: int = 0
    most: bool = False


def worst_load(graph: Graph, call: Call, how: How, longest: tuple[int, int], positions: int) -> Load:
    """The most that can come: `longest` are the tokens of the longest prompt and of the longest response,
    `positions` those that the model has."""
    prompt, response = longest
    prompts = -(-graph.prompts // how.layout.dp)
    if call.op == "generate":
        new = call.sampling.max_new_tokens if call.sampling else response
        running = min(how.slots, prompts * graph.samples)
        room = min(positions, graph.data.prompt_tokens + new)
        rows = running + min(max(PREFILL, prompt), prompts * prompt)
        return Load(
            rows, rows, rows, 0, 0, min(prompt, room), running, 1, rows, how.slots, room, running, room, True
        )
    sequence = min(positions, prompt + response)
    samples = -(-graph.prompts * graph.samples // call.minibatches)
    unit = graph.samples if call.whole_groups else 1  # sequences that are never divided
    total = -(-samples // (unit * how.layout.dp)) * unit * sequence  # the fullest's: longest first, one each
    tokens = min(max(how.micro_batch_tokens, unit * sequence), total)
    padded = min(samples * sequence, tokens + math.isqrt(2 * samples * WASTE))
    pairs = padded * min(sequence, SHORT)
    return Load(tokens, tokens, padded, 0, pairs, sequence, tokens, samples, total, most=True)


def batch_load(graph: Graph, call: Call, how: How, batch: Batch, positions: int) -> Load:
    """What comes where a step's prompts and responses are as long as `batch` says.

    Samples go to minibatches, replicas and micro-batches as in a run; the replica and micro-batch with
    most tokens to compute count.
    """
    if call.op == "generate":
        return _generated(graph, call, how, batch, positions)
    groups = [group for group, (_, responses) in enumerate(batch) for _ in responses]
    lengths = [prompt + response for prompt, responses in batch for response in responses]
    whole = groups if call.whole_groups else None
    loads = [
        _packed(batch, groups, lengths, mine, how.micro_batch_tokens, whole)
        for ids in minibatches(range(len(lengths)), groups, call.minibatches)
        for mine in _divided(ids, lengths, how.layout.dp, whole)
        if mine
    ]
    return max(loads, key=lambda load: load.distinct)


def _divided(
    ids: Sequence[int], lengths: Sequence[int], parts: int, whole: Sequence[int] | None
) -> list[list[int]]:
    """Samples divided among replicas, about evenly in tokens; `whole` are groups that stay together."""
    if parts == 1:
        return [list(ids)]
    found = partition([lengths[i] for i in ids], parts, groups=_of(whole, ids))
    return [sorted(ids[i] for i in part) for part in found]


def _of(whole: Sequence[int] | None, ids: Sequence[int]) -> list[int] | None:
    return None if whole is None else [whole[i] for i in ids]


def _packed(
    batch: Batch,
    groups: Sequence[int],
    lengths: Sequence[int],
    mine: Sequence[int],
    budget: int,
    whole: Sequence[int] | None,
) -> Load:
    """The largest micro-batch of a replica's samples."""
    divided = micro_batches([lengths[i] for i in mine], budget, _of(whole, mine))
    parts = [[mine[i] for i in part] for part in divided]
    found = []
    for part in parts:
        tokens = sum(lengths[i] for i in part)
        repeated = sum(
            batch[groups[one]][0] for before, one in pairwise(part) if groups[before] == groups[one]
        )
        scored = tokens - sum(batch[groups[one]][0] for one in part)
        padded, short, pairs = _padding([lengths[i] for i in part])
        longest = max(lengths[i] for i in part)
        found.append((tokens, tokens - repeated, padded, short, pairs, longest, scored))
    return Load(*max(found, key=lambda one: one[1]), len(parts), sum(lengths[i] for i in mine))


def _padding(lengths: Iterable[int]) -> tuple[int, int, int]:
    """Rows of attention over sequences that are grouped by length; those of short ones, and their (query,
    key) pairs."""
    rows = short = pairs = longest = waste = 0
    for length in sorted(lengths, reverse=True):
        waste += longest**2 - length**2
        if not longest or waste > WASTE:
            longest, waste = length, 0
        rows += longest
        if longest <= SHORT:
            short += longest
            pairs += longest**2
    return rows, short, pairs


def _generated(graph: Graph, call: Call, how: How, batch: Batch, positions: int) -> Load:
    prompts = -(-len(batch) // how.layout.dp)
    new = call.sampling.max_new_tokens if call.sampling else 0
    room = min(positions, graph.data.prompt_tokens + new)
    running = min(how.slots, prompts * graph.samples)
    longest = sorted((prompt for prompt, _ in batch), reverse=True)[:prompts]
    at_once = longest[: -(-running // graph.samples)]
    rows = running + min(max(PREFILL, longest[0]), sum(at_once))
    reach = max(prompt + max(responses, default=0) for prompt, responses in batch)
    return Load(rows, rows, rows, 0, 0, longest[0], running, 1, rows, how.slots, room, running, reach)
