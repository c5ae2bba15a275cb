"""How a step's samples come to the replicas of a call: minibatches, and packed micro-batches of each.

It is what a run does (`realflow.data.balance`, with a sequence's estimated time), on the lengths of a typical
step. Of large steps a part is divided, which shows how uneven replicas are, and stands for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from planner.decoder import Decoder
from planner.formulas import Pass, pass_of, stage_elements
from planner.formulas.values import Cut
from planner.lengths import Lengths
from realflow.data.balance import CostModel, micro_batches, minibatches, partition

_MOST = 1024
"""Samples that are divided one by one."""


@dataclass(frozen=True)
class Sample:
    """Tokens of a prompt and of the response to it; `group` is equal for samples of one prompt."""

    group: int
    prompt: int
    response: int

    @property
    def tokens(self) -> int:
        """Of the whole sequence."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Pack:
    """A packed micro-batch, or the mean of several: `lengths` are (tokens, sequences of so many).

    `distinct` tokens are computed outside attention (beginnings that neighbours share count once); `scored`
    are those of responses.
    """

    lengths: tuple[tuple[float, float], ...]
    distinct: float
    scored: float

    @cached_property
    def tokens(self) -> float:
        """Of all its sequences."""
        return sum(length * count for length, count in self.lengths)

    @cached_property
    def sequences(self) -> float:
        """How many."""
        return sum(count for _, count in self.lengths)

    def computed(self, windows: Iterable[int], rows: float) -> Pass:
        """What a model computes of it, with `rows` rows of its head."""
        key = tuple(windows), rows
        if key not in self._computed:
            whole = pass_of(self.lengths, key[0], rows=rows)
            shared = whole.tokens - self.distinct
            self._computed[key] = Pass(
                self.distinct, whole.pairs, whole.sequences, whole.windowed, shared, rows
            )
        return self._computed[key]

    @cached_property
    def _computed(self) -> dict[tuple[tuple[int, ...], float], Pass]:
        """Counted once: a search asks for each layout with as many replicas."""
        return {}


@dataclass(frozen=True)
class Dispatch:
    """What the slowest replica of a call gets, for each minibatch that was looked at its micro-batches.

    Each minibatch stands for `minibatches` of the call, each micro-batch for `repeats` of its replica.
    """

    packs: tuple[tuple[Pack, ...], ...]
    minibatches: float = 1.0
    repeats: float = 1.0

    @cached_property
    def means(self) -> tuple[Pack, ...]:
        """Of each of those minibatches the mean micro-batch."""
        return tuple(mean_pack(packs) for packs in self.packs)

    @cached_property
    def tokens(self) -> float:
        """All that the replica gets in a step."""
        looked = sum(pack.tokens for packs in self.packs for pack in packs)
        return looked * self.minibatches * self.repeats


def sequence_cost(decoder: Decoder) -> CostModel:
    """The time of a sequence by its length, by which a run divides samples (`realflow.models.costs`)."""
    whole = stage_elements(decoder, Cut(), 0, len(decoder.layers))
    table = 0 if decoder.tied or decoder.head != "lm" else decoder.vocab * decoder.hidden
    return CostModel.for_sizes(params=whole - table, layers=len(decoder.layers), hidden=decoder.hidden)


def dispatch(
    lengths: Lengths,
    prompts: int,
    samples: int,
    *,
    replicas: int,
    count: int = 1,
    budget: int,
    cost: CostModel,
    whole_groups: bool = False,
) -> Dispatch:
    """Divide a typical step into `count` minibatches, each among `replicas`, into micro-batches of at most
    `budget` tokens; with `whole_groups` the samples of a prompt stay together."""
    found = divide(
        lengths, prompts, samples, replicas=replicas, count=count, cost=cost, whole_groups=whole_groups
    )
    return found.packed(budget)


@dataclass(frozen=True)
class Shares:
    """What the slowest replica of a call gets before it is packed: of each minibatch that was looked at its
    samples, and the tokens that all their prompts begin with. The rest as in `Dispatch`."""

    samples: tuple[tuple[Sample, ...], ...]
    common: tuple[int, ...]
    minibatches: float
    repeats: float
    whole_groups: bool

    def packed(self, budget: int) -> Dispatch:
        """In micro-batches of at most so many tokens."""
        packs = (
            _packed(mine, budget, common, self.whole_groups)
            for mine, common in zip(self.samples, self.common, strict=True)
        )
        return Dispatch(tuple(packs), self.minibatches, self.repeats)


def divide(
    lengths: Lengths,
    prompts: int,
    samples: int,
    *,
    replicas: int,
    count: int,
    cost: CostModel,
    whole_groups: bool,
) -> Shares:
    """The first part of `dispatch`, which micro-batches do not matter to."""
    each = prompts * samples / (count * replicas)
    if prompts * samples <= _MOST:
        looked, parts, repeats, some = count, replicas, 1.0, prompts
    else:
        looked, parts = 1, min(replicas, max(1, int(_MOST / each)))
        repeats = max(1.0, each / _MOST)
        some = max(1, round(parts * each / repeats / samples))
    found = _samples(lengths, some, samples)
    looked = min(looked, len(found))
    batches = minibatches(range(len(found)), [sample.group for sample in found], looked)
    slowest: list[tuple[Sample, ...]] = []
    common = []
    for batch in batches:
        mine = _slowest([found[i] for i in batch], parts, cost, whole_groups)
        longest = _longest(lengths)
        if parts < replicas and cost(longest.prompt + longest.response) > _time(mine, cost):
            slowest.append((longest,))  # which one of all replicas has
            common.append(0)
        else:
            slowest.append(mine)
            common.append(lengths.common)
    return Shares(tuple(slowest), tuple(common), count / looked, repeats, whole_groups)


def _slowest(
    samples: Sequence[Sample], parts: int, cost: CostModel, whole_groups: bool
) -> tuple[Sample, ...]:
    """The samples of the replica that needs longest, of `parts`."""
    groups = [sample.group for sample in samples] if whole_groups else None
    shares = partition([cost(sample.tokens) for sample in samples], parts, groups=groups)
    found = [tuple(samples[i] for i in mine) for mine in shares]
    return max(found, key=lambda mine: _time(mine, cost))


def _time(samples: Iterable[Sample], cost: CostModel) -> float:
    return sum(cost(sample.tokens) for sample in samples)


def _samples(lengths: Lengths, prompts: int, samples: int) -> list[Sample]:
    batch = lengths.batch(prompts, samples)
    return [
        Sample(group, prompt, response)
        for group, (prompt, responses) in enumerate(batch)
        for response in responses
    ]


def _longest(lengths: Lengths) -> Sample:
    """The longest sample that may come."""
    pair = max(lengths.pairs, key=lambda pair: pair.total)
    return Sample(0, pair.prompt, pair.response)


def _packed(samples: Sequence[Sample], budget: int, common: int, whole_groups: bool) -> tuple[Pack, ...]:
    """The micro-batches of one replica, in order."""
    if not samples:
        return ()
    groups = [sample.group for sample in samples] if whole_groups else None
    parts = micro_batches([sample.tokens for sample in samples], budget, groups)
    return tuple(_pack([samples[i] for i in part], common) for part in parts)


def _pack(samples: Sequence[Sample], common: int) -> Pack:
    counts: dict[float, float] = {}
    distinct, before = 0, None
    for sample in samples:
        counts[sample.tokens] = counts.get(sample.tokens, 0) + 1
        distinct += sample.tokens
        if before is not None:
            same = sample.prompt if before.group == sample.group else common
            distinct -= min(same, sample.prompt, before.prompt)
        before = sample
    return Pack(tuple(sorted(counts.items())), distinct, sum(sample.response for sample in samples))


def mean_pack(packs: Sequence[Pack]) -> Pack:
    """A micro-batch as they are in the mean; an empty one of none."""
    if not packs:
        return Pack((), 0.0, 0.0)
    counts: dict[float, float] = {}
    for pack in packs:
        for length, count in pack.lengths:
            counts[length] = counts.get(length, 0.0) + count / len(packs)
    return Pack(
        tuple(sorted(counts.items())),
        sum(pack.distinct for pack in packs) / len(packs),
        sum(pack.scored for pack in packs) / len(packs),
    )
