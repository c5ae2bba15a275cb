"""Which part of a model each call makes a rank hold, and which moves of weights follow. Pure.

Calls of one model whose holdings on a rank are equal share the storage there; other holdings have
storage of their own. After an optimizer step the train call's holdings have the newest weights, and
every other call needs them moved into its own before it runs: one `Edge` for each set of holdings
that lacks them. The planner lists the edges that it foresees; the master's core follows the same
`Freshness` while a run goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from realflow.graph.types import Call, Graph
from realflow.planfile.types import CallPlan

After = Literal["keep", "free", "offload"]


@dataclass(frozen=True, order=True)
class Holding:
    """The part of a model on tensor rank `tp` of `parts` in stage `pp` of `stages`."""

    pp: int = 0
    stages: int = 1
    tp: int = 0
    parts: int = 1

    def __str__(self) -> str:
        names = [f"p{self.pp}/{self.stages}"] if self.stages > 1 else []
        names += [f"t{self.tp}/{self.parts}"] if self.parts > 1 else []
        return " ".join(names) or "whole"

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """The fields in order, for messages."""
        return self.pp, self.stages, self.tp, self.parts


Held = tuple[int, Holding]
"""A rank and what it holds."""


@dataclass(frozen=True)
class Edge:
    """Weights of `model` move from the holdings `sources`, all of which have them, into the holdings
    `destinations`, none of which has. `call` is the call that needs them there.

    `into` is the model that gets them: `model` itself, or one that follows it with a `decay` above 0:
    each of its weights becomes `decay` times itself plus the rest of the other's (`call` is empty).
    Where a rank has several holdings of a follower, several edges fill them, told apart by `turn`.
    """

    model: str
    call: str
    sources: tuple[Held, ...]
    destinations: tuple[Held, ...]
    into: str
    decay: float = 0.0
    turn: int = 0

    @property
    def ranks(self) -> tuple[int, ...]:
        """Everybody who takes part, rising."""
        return tuple(sorted({rank for rank, _ in (*self.sources, *self.destinations)}))

    @property
    def key(self) -> str:
        """A short name: equal for edges between equal holdings, whichever call asks."""
        sides = [
            ";".join(f"{rank}:{','.join(map(str, held.numbers))}" for rank, held in side)
            for side in (self.sources, self.destinations)
        ]
        digest = hashlib.blake2b("|".join([self.model, self.into, *sides]).encode(), digest_size=6)
        return f"{self.model}-{self.into}-{digest.hexdigest()}"


def holdings(where: CallPlan) -> dict[int, Holding]:
    """Rank -> what a model's call makes it hold."""
    layout, found = where.layout, {}
    for rank in where.ranks:
        place = where.mesh.coordinate(rank)
        found[rank] = Holding(place["pp"], layout.pp, place["tp"], layout.tp)
    return found


def held_by(where: CallPlan) -> frozenset[Held]:
    """The holdings of all ranks of a call."""
    return frozenset(holdings(where).items())


def users(graph: Graph, calls: Mapping[str, CallPlan], model: str) -> dict[Held, tuple[Call, ...]]:
    """Every holding of a model -> the calls that use it, in the graph's order."""
    found: dict[Held, list[Call]] = {}
    for call in graph.calls:
        if call.model == model:
            for held in holdings(calls[call.name]).items():
                found.setdefault(held, []).append(call)
    return {held: tuple(found[held]) for held in sorted(found)}


def put_away(graph: Graph, calls: Mapping[str, CallPlan], model: str) -> dict[Held, After]:
    """What happens to a holding's weights between the calls that use it: `free` or `offload` where
    every one of them says so (`offload` where they say the one and the other), else `keep`."""
    found: dict[Held, After] = {}
    for held, using in users(graph, calls, model).items():
        said = {calls[call.name].after for call in using}
        if "keep" in said:
            found[held] = "keep"
        else:
            found[held] = "free" if said == {"free"} else "offload"
    return found


class Freshness:
    """Which holdings of one trained model will have its newest weights, once everything that is ordered
    so far is done. Ranks carry out orders in one order, so that what is ordered next finds them there.

    At the start all have them: they were loaded. Training leaves them with its own holdings, an edge
    brings them to others, and a holding that is freed after a call loses them.
    """

    def __init__(self, graph: Graph, calls: Mapping[str, CallPlan], model: str) -> None:
        self.model = model
        self._held = {c.name: held_by(calls[c.name]) for c in graph.calls if c.model == model}
        self._train = graph.trained()[model].name
        self._freed = {held for held, after in put_away(graph, calls, model).items() if after == "free"}
        self.fresh: set[Held] = {held for some in self._held.values() for held in some}

    def edge(self, call: str) -> Edge | None:
        """What must move before `call` runs; None where its holdings have everything."""
        lacking = self._held[call] - self.fresh
        if not lacking:
            return None
        assert self.fresh, f"no rank has the weights of {self.model}"
        return Edge(self.model, call, tuple(sorted(self.fresh)), tuple(sorted(lacking)), self.model)

    def moved(self, edge: Edge) -> None:
        """An edge is ordered."""
        self.fresh.update(edge.destinations)

    def used(self, call: str) -> None:
        """`call` is ordered. When it ends, before anything that is ordered later, there are new weights
        if it trains, and what nobody keeps is freed."""
        if call == self._train:
            self.fresh = set(self._held[call])
        self.fresh -= self._held[call] & self._freed


def planned_edges(graph: Graph, calls: Mapping[str, CallPlan]) -> tuple[Edge, ...]:
    """The edges of a step, as far as a plan can tell: calls run in the graph's order.

    A periodic call saves a later one the move only where it runs whenever that one does.
    """
    edges = []
    for model, train in graph.trained().items():
        using = [call for call in graph.calls if call.model == model and call.name != train.name]
        for index, call in enumerate(using):
            weights = Freshness(graph, calls, model)
            weights.used(train.name)
            for other in using[:index]:
                if (call.every or 1) % (other.every or 1) == 0:
                    edge = weights.edge(other.name)
                    if edge is not None:
                        weights.moved(edge)
                    weights.used(other.name)
            edge = weights.edge(call.name)
            if edge is not None:
                edges.append(edge)
    return tuple(edges)


def follow_edges(graph: Graph, calls: Mapping[str, CallPlan]) -> tuple[Edge, ...]:
    """The edges to each model that follows a trained one, from where that one is trained into every
    holding of the follower, at the end of each step in which it is due: as few as there can be with at
    most one holding of a rank in each, because what is written twice on a rank overlaps."""
    edges = []
    for name, spec in graph.models.items():
        if spec.follows is not None:
            leader = spec.follows.model
            sources = tuple(sorted(held_by(calls[graph.trained()[leader].name])))
            turns: list[dict[int, Holding]] = []
            for rank, held in _in_order_of_use(graph, calls, name):
                free = next((turn for turn in turns if rank not in turn), None)
                if free is None:
                    turns.append(free := {})
                free[rank] = held
            edges += [
                Edge(leader, "", sources, tuple(sorted(into.items())), name, spec.follows.decay, turn)
                for turn, into in enumerate(turns)
            ]
    return tuple(edges)


def _in_order_of_use(graph: Graph, calls: Mapping[str, CallPlan], model: str) -> Iterator[Held]:
    """Every holding of a model once, those of its first call first."""
    using = (holdings(calls[call.name]).items() for call in graph.calls if call.model == model)
    yield from dict.fromkeys(held for some in using for held in some)
