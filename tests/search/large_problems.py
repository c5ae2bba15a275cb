"""Problems of the size of real clusters, from a few lines of arithmetic.

The costs are those of no machine; they only have the shape of GPUs in nodes of 8: compute, memory traffic and
messages, which layouts trade against each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner.meshes import places, pools
from planner.search.problem import Call, Move, Option, Problem
from realflow.planfile import Cluster, Node

COMPUTE, MEMORY, INSIDE, BETWEEN = 9.9e14, 2.2e12, 3.5e11, 4e10  # a second: FLOPs, bytes, bytes, bytes

_LAYOUTS = 4
"""Layouts of one size, beside the leanest."""


@dataclass(frozen=True)
class Size:
    """A decoder: parameters, layers, hidden size, channels of its keys."""

    parameters: float
    layers: int
    hidden: int
    keys: int = 1024

    @property
    def cached(self) -> float:
        """Bytes that a token leaves in the cache."""
        return 4.0 * self.keys * self.layers


SIZES = {"1.5B": Size(1.5e9, 28, 1536, 256), "7B": Size(7e9, 32, 4096), "32B": Size(32e9, 64, 5120),
         "70B": Size(70e9, 80, 8192)}  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """A call: what it does (rollout, inference or train) with a model of some size."""

    name: str
    kind: str
    model: str
    size: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Samples of a step, and tokens of each."""

    samples: int = 1024
    prompt: int = 512
    response: int = 1024

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.prompt + self.response


def ppo(devices: int, actor: str = "7B", critic: str = "7B", **more: object) -> Problem:
    """Six calls."""
    scored = ("reward", "ref", "value")
    asks = (
        Ask("rollout", "rollout", "actor", actor),
        Ask("reward", "inference", "reward", critic, ("rollout",)),
        Ask("ref", "inference", "ref", actor, ("rollout",)),
        Ask("value", "inference", "critic", critic, ("rollout",)),
        Ask("train_actor", "train", "actor", actor, scored),
        Ask("train_critic", "train", "critic", critic, scored),
    )
    return build(asks, devices, **more)  # type: ignore[arg-type]


def grpo(devices: int, actor: str = "7B", **more: object) -> Problem:
    """Five calls, one model with three of them."""
    asks = (
        Ask("rollout", "rollout", "actor", actor),
        Ask("reward", "inference", "reward", actor, ("rollout",)),
        Ask("ref", "inference", "ref", actor, ("rollout",)),
        Ask("old", "inference", "actor", actor, ("rollout",)),
        Ask("train", "train", "actor", actor, ("reward", "ref", "old")),
    )
    return build(asks, devices, **more)  # type: ignore[arg-type]


def eight(devices: int, **more: object) -> Problem:
    """Eight calls: two rewards, two references."""
    scored = ("reward", "reward2", "ref", "ref2", "value")
    asks = (
        Ask("rollout", "rollout", "actor", "7B"),
        Ask("reward", "inference", "reward", "7B", ("rollout",)),
        Ask("reward2", "inference", "reward2", "32B", ("rollout",)),
        Ask("ref", "inference", "ref", "7B", ("rollout",)),
        Ask("ref2", "inference", "ref2", "32B", ("rollout",)),
        Ask("value", "inference", "critic", "7B", ("rollout",)),
        Ask("train_actor", "train", "actor", "7B", scored),
        Ask("train_critic", "train", "critic", "7B", scored),
    )
    return build(asks, devices, **more)  # type: ignore[arg-type]


def build(
    asks: Sequence[Ask],
    devices: int,
    *,
    batch: Batch | None = None,
    gigabytes: float = 80.0,
    any_length: bool = False,
    overlap: int = 1,
    follows: bool = False,
) -> Problem:
    """The problem of some calls on nodes of 8; `follows`: the rollout has its own model."""
    batch = batch or Batch()
    cluster = Cluster(tuple(Node(f"n{index}", min(8, devices)) for index in range(max(1, devices // 8))))
    runs = places(pools(cluster)[0], any_length=any_length)
    trained = {ask.model: ask.name for ask in asks if ask.kind == "train"}
    calls, moves = {}, {}
    for ask in asks:
        model = "sampler" if follows and ask.kind == "rollout" else ask.model
        options = tuple(
            option for size, those in runs.items() for option in _options(ask, size, those, batch)
        )
        calls[ask.name] = Call(ask.name, options, ask.after, model, ask.kind == "train")
    for ask in asks:
        if ask.model in trained and ask.kind != "train":
            for source in {option.layout: None for option in calls[trained[ask.model]].options}:
                for into in {option.layout: None for option in calls[ask.name].options}:
                    moves[str(calls[ask.name].model), source, into] = _move(SIZES[ask.size], source, into)
    memory = (int(gigabytes * 0.92 * 2**30),) * devices
    return Problem(memory, tuple(calls.values()), moves, {"sampler": "actor"} if follows else {}, overlap)


def _options(ask: Ask, size: int, runs: tuple[range, ...], batch: Batch) -> Iterator[Option]:
    found: list[Option] = []
    shape = SIZES[ask.size]
    for t in (1, 2, 4, 8):
        for p in (1, 2, 4, 8, 16):
            d = size // (t * p)
            if size % (t * p) == 0 and p <= shape.layers // 2 and d <= batch.samples:
                for micro in (1, 4, 16) if ask.kind != "rollout" else (0,):
                    if micro <= -(-batch.samples // d):
                        found += _with(ask.kind, shape, (d, t, p), micro, runs, batch)
    found.sort(key=lambda one: (one.seconds, one.static_bytes, one.active_bytes))
    fastest = list(dict.fromkeys(option.layout for option in found))[:_LAYOUTS]
    leanest = min(found, key=lambda one: (one.static_bytes + one.active_bytes, one.seconds), default=None)
    found = [option for option in found if option.layout in fastest or option is leanest]
    kept: list[Option] = []
    for option in found:
        if not any(_no_worse(other, option) for other in kept):
            kept.append(option)
            yield option


def _no_worse(one: Option, other: Option) -> bool:
    same = (one.layout, one.keeps) == (other.layout, other.keeps)
    return same and one.static_bytes <= other.static_bytes and one.active_bytes <= other.active_bytes


def _with(
    kind: str, shape: Size, cut: tuple[int, int, int], micro: int, runs: tuple[range, ...], batch: Batch
) -> Iterator[Option]:
    d, t, p = cut
    share, layout = -(-batch.samples // d), f"d{d}t{t}p{p}"
    mine = shape.parameters / t / p
    if kind == "rollout":
        read = (2 * mine * p + share * shape.cached * batch.length / 2 / t) / MEMORY
        step = read + shape.layers * 24e-6 * (t > 1) + p * 1e-5
        seconds = batch.response * max(step, 2 * shape.parameters * share / t / COMPUTE / 0.4)
        seconds += 2 * mine * share * batch.prompt / COMPUTE / 0.4
        active, static = share * shape.cached * batch.length / t / p + 2e9, 2 * mine
    else:
        passes, kept = (6, 34.0 / 4) if kind == "train" else (2, 4.0 / p)
        rounds, tokens = -(-share // micro), micro * batch.length
        busy = passes * mine * share * batch.length / COMPUTE / 0.5 * (1 + 1500.0 * t / tokens)
        sent = (
            passes / 1.5 * shape.layers / p * share * batch.length * shape.hidden * 2 * (t - 1) / t / INSIDE
        )
        seconds = (busy + sent) * (rounds + p - 1) / rounds
        active, static = tokens * shape.hidden * kept * shape.layers / t + 1e9, 2 * mine
        if kind == "train":
            seconds += 4 * mine * (d > 1) / (INSIDE if d * t * p <= 8 else BETWEEN)
            yield Option(runs, seconds, int(6 * mine + 12 * mine / d), int(active), layout)
            return
    yield Option(runs, seconds, int(static), int(active), layout)
    yield Option(runs, seconds, 0, int(active + static), layout, keeps=False)


def _move(shape: Size, source: str, into: str) -> Move:
    one, other = ([int(n) for n in re.findall(r"\d+", layout)] for layout in (source, into))
    size = 2 * shape.parameters / (other[1] * other[2])
    return Move(0.002 + (one[1:] != other[1:]) * size / INSIDE, 0.002 + size / BETWEEN)
