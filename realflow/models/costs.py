"""What a sequence costs in time, from the sizes of a model. Imports no torch."""

from __future__ import annotations

from realflow.data.balance import CostModel
from realflow.graph.types import Graph
from realflow.models.card import Card, card
from realflow.models.paths import resolve_model


def sequence_costs(graph: Graph) -> dict[str, CostModel]:
    """Model of a graph -> the time of a sequence by its length (tokens, and attention's square of them).

    Cards come from the cache or are made now (some seconds each, in another process).
    """
    return {name: cost_model(card(resolve_model(spec.path))) for name, spec in graph.models.items()}


def cost_model(card: Card) -> CostModel:
    """The time of a sequence of a model by its length; see `CostModel.for_sizes`."""
    return CostModel.for_sizes(params=product_parameters(card), layers=card.layers, hidden=card.hidden)


def product_parameters(card: Card) -> int:
    """Parameters of matrix products: all but an input embedding that is not also the head, of which
    a token reads one row."""
    tables = [parameter for parameter in card.parameters if parameter.shape == (card.vocab, card.hidden)]
    return card.size - (tables[0].size if len(tables) > 1 else 0)
