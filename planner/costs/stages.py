"""The pipeline stages of a decoder, and how long micro-batches take through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from planner.decoder import Decoder, stage_cuts


@dataclass(frozen=True)
class StageRun:
    """Layers `[first, stop)`; `embeds` on the first stage, `ends` on the last. `kinds` are the first layer of
    each kind among them, and how many are like it."""

    first: int
    stop: int
    embeds: bool
    ends: bool
    kinds: tuple[tuple[int, int], ...] = ()

    @property
    def alike(self) -> object:
        """Equal for stages that compute the same."""
        return self.kinds, self.embeds, self.ends


@lru_cache(maxsize=1024)
def stage_runs(decoder: Decoder, count: int) -> tuple[StageRun, ...]:
    """The stages of a pipeline."""
    cuts = stage_cuts(decoder, count)
    return tuple(
        StageRun(
            first, stop, first == 0, stop == len(decoder.layers), tuple(decoder.kinds(first, stop).items())
        )
        for first, stop in cuts
    )


@lru_cache(maxsize=4096)
def stage_classes(
    decoder: Decoder, count: int, *, decoding: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first stage of each class of stages that compute the same, and of each stage the class; `decoding`:
    where the embedding counts for nothing.
    """
    classes: dict[object, int] = {}
    firsts, of = [], []
    for index, run in enumerate(stage_runs(decoder, count)):
        key = (run.kinds, run.ends) if decoding else run.alike
        if key not in classes:
            classes[key] = len(classes)
            firsts.append(index)
        of.append(classes[key])
    return tuple(firsts), tuple(of)


def pipelined(
    forwards: Sequence[float], backwards: Sequence[float], count: float, schedule: str, weights: float = 0.5
) -> float:
    """Seconds of `count` like micro-batches, whose passes take `forwards[s]` and `backwards[s]` on stage s.

    1F1B: the slowest stage works on all of them, and waits for one forward and backward of every other
    stage. Zero-bubble (ZB-H1, arXiv 2401.10241) splits off the gradients of weights (`weights` of a
    backward), which fill what would be idle; or else the first stage ends last, which has all its backwards
    to do after the first one has come through. Transfers take no time here.
    """
    both = [forward + backward for forward, backward in zip(forwards, backwards, strict=True)]
    slowest = max(range(len(both)), key=both.__getitem__)
    if schedule != "zero_bubble" or len(both) == 1:
        return count * both[slowest] + sum(both) - both[slowest]
    delayed = [weights * backward for backward in backwards]
    waits = [max(0.0, b - 2 * w) for b, w in zip(both, delayed, strict=True)]
    filled = count * both[slowest] + sum(waits) - waits[slowest]
    first = sum(both) - sum(delayed) + delayed[0] + (count - 1) * backwards[0]
    return max(filled, first + max(0.0, count - len(both)) * forwards[0])
