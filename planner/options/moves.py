"""Seconds of the moves of weights between any two layouts that calls may have, asked for as needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from planner.costs import Costs
from planner.options.ways import FREE, Way, layout_of
from planner.search.problem import Move
from realflow.graph.types import Graph
from realflow.layout import Layout

Key = tuple[str, str, str]
"""A model that gets weights, the layout of the train call, its own layout: as texts."""


class Moves(Mapping[Key, Move]):
    """All moves of a graph: of two kinds of devices the slower one's."""

    def __init__(
        self, graph: Graph, costs: Sequence[Costs], devices: int, layouts: Mapping[str, Sequence[str]]
    ) -> None:
        """`layouts` has, for each call of a model, the layouts of its options."""
        self._costs, self._devices, self._known = costs, devices, dict[Key, Move]()
        self._sources: dict[str, tuple[str, Mapping[str, None]]] = {}
        self._destinations: dict[str, Mapping[str, None]] = {}
        self._calls = graph.calls
        trained = graph.trained()
        for name, spec in graph.models.items():
            leader = spec.follows.model if spec.follows else name
            if leader not in trained:
                continue
            train = trained[leader].name
            own = [
                call.name
                for call in graph.calls
                if call.model == name and call.name != (train if leader == name else "")
            ]
            self._sources[name] = leader, dict.fromkeys(layouts[train])
            self._destinations[name] = dict.fromkeys(text for call in own for text in layouts[call])

    def __getitem__(self, key: Key) -> Move:
        if key not in self._known:
            if key not in self:
                raise KeyError(key)
            into, source, destination = key
            leader = self._sources[into][0]
            one, other = layout_of(source), layout_of(destination)
            between = into, str(one), str(other)  # whether they are freed or kept
            if between not in self._known:
                found = [costs.move(leader, into, one, other, self._devices) for costs in self._costs]
                self._known[between] = Move(
                    max(move.inside for move in found), max(move.apart for move in found)
                )
            if destination.endswith(FREE):
                move = self._known[between]
                inside = self._brought(into, other) if one == other else move.inside
                self._known[key] = Move(inside, move.apart)
        return self._known[key]

    def _brought(self, model: str, layout: Layout) -> float:
        """Seconds of what stands for a move where a call frees the very weights that the train call puts
        away: they come from the host, and go back there. Those of the call for which it takes least."""
        way = replace(Way(layout), after="offload")
        users = [call for call in self._calls if call.model == model and call.op != "train"]
        return min(
            costs.offload(call.name, way).value / (call.every or 1)
            for call, costs in product(users, self._costs)
        )

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, tuple) or len(key) != 3 or key[0] not in self._sources:
            return False
        return key[1] in self._sources[key[0]][1] and key[2] in self._destinations[key[0]]

    def __iter__(self) -> Iterator[Key]:
        for into, (_, sources) in self._sources.items():
            for source in sources:
                for destination in self._destinations[into]:
                    yield into, source, destination

    def __len__(self) -> int:
        return sum(
            len(sources) * len(self._destinations[into]) for into, (_, sources) in self._sources.items()
        )
