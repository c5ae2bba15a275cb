"""What planning knows of a graph's models: a decoder of each, and the card of those that can be built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.decoder import Decoder
from realflow.graph.types import Graph
from realflow.layout import Layout
from realflow.models.card import Card
from realflow.models.layouts import refusals
from realflow.models.partition import with_head


@dataclass(frozen=True)
class Models:
    """`decoders` has every model of a graph, with its head; `cards` those whose modules are known, so that
    the run's own rules say how they can be cut, and its own schedules what moves. `notes` are for people."""

    graph: Graph
    decoders: Mapping[str, Decoder]
    cards: Mapping[str, Card] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _known: dict[tuple[str, int, int], tuple[str, ...]] = field(default_factory=dict, compare=False)

    @property
    def usable(self) -> dict[str, Card]:
        """The cards of models that the engine can run."""
        return {name: known for name, known in self.cards.items() if not self.refused(name)}

    def refusals(self, model: str, layout: Layout) -> tuple[str, ...]:
        """Why a model cannot be cut for a layout; empty where it can."""
        key = model, layout.tp, layout.pp
        if key not in self._known:
            self._known[key] = tuple(self._refusals(model, Layout(1, layout.tp, layout.pp)))
        return self._known[key]

    def _refusals(self, model: str, layout: Layout) -> list[str]:
        if model in self.cards and not self.refused(model):
            return refusals(with_head(self.cards[model], self.graph.models[model].head), layout)
        decoder, found = self.decoders[model], []
        if layout.tp > decoder.heads:
            found.append(f"it has {decoder.heads} attention heads; t{layout.tp} needs at least {layout.tp}")
        if layout.pp > len(decoder.layers):
            found.append(f"it has {len(decoder.layers)} layers; p{layout.pp} needs at least {layout.pp}")
        return found

    def refused(self, model: str) -> str:
        """Why the engine cannot run a model at all; empty where it can. Its costs are known all the same."""
        own = with_head(self.cards[model], self.graph.models[model].head)
        return own.unsupported or own.unsupported_head
