"""Moves: what the planner counts for a pair of layouts is what the schedule of the run moves."""

from __future__ import annotations

import time

import pytest
from small_cards import llama_card

from planner.costs.moves import MoveShape, move_loads
from planner.decoder import Decoder, read_decoder
from realflow.graph.types import ModelSpec
from realflow.layout import Layout
from realflow.models.card import Card
from realflow.planfile import CallPlan
from realflow.planfile.holdings import holdings
from realflow.realloc.edges import specs
from realflow.realloc.plan import transfers
from realflow.realloc.topology import Topology, loads

SIZES = {"layers": 6, "hidden": 48, "intermediate": 96, "vocab": 120}


def model(heads: int, kv_heads: int, *, tied: bool) -> tuple[Card, Decoder]:
    card = llama_card(heads=heads, kv_heads=kv_heads, tied=tied, **SIZES)
    config = {
        "model_type": "llama",
        "hidden_size": SIZES["hidden"],
        "intermediate_size": SIZES["intermediate"],
        "num_hidden_layers": SIZES["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": SIZES["vocab"],
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    return card, read_decoder(config)


def planned(card: Card, shape: MoveShape) -> tuple[float, float, float]:
    """Of the run's schedule, in elements: the busiest rank inside its node, to other nodes, and in all."""
    sides = []
    for layout, start in zip((shape.source, shape.destination), shape.starts, strict=True):
        ranks = tuple(range(start, start + layout.size))
        held = holdings(CallPlan(ranks, layout, "native")).items()
        sides.append(specs(card, ModelSpec("m", "m", "float32"), held))
    ranks = max(shape.starts[0] + shape.source.size, shape.starts[1] + shape.destination.size)
    nodes = {rank: f"n{rank // shape.per_node}" for rank in range(ranks)}
    schedule = transfers(*sides, Topology(nodes, inside=4.0, between_rank=4.0), min_split_bytes=64)
    found = loads(schedule, Topology(nodes, inside=4.0, between_rank=4.0))
    inside = max((link.seconds or 0 for link in found.links if "inside" in link.link), default=0.0)
    between = max(
        (link.seconds or 0 for link in found.links if "other" in link.link and link.link.startswith("rank")),
        default=0.0,
    )
    return inside, between, found.bytes / 4


PAIRS = (
    ("d4", "t4"), ("t4", "d4"), ("d2t2", "p4"), ("p2", "d2"), ("p2", "d4"), ("d8", "d2t2"), ("t2", "t2"),
    ("d2p2", "t2p2"), ("p3", "p2"), ("d16", "t4"), ("d4t2", "d2t4p2"), ("d2t4p2", "d16"), ("d8t2", "p6"),
    ("t3", "d3"), ("d3", "t3"), ("d1", "d8"),
)  # fmt: skip


@pytest.mark.parametrize(("heads", "tied"), [(12, True), (9, True), (12, False)])
def test_the_busiest_rank_has_what_the_runs_schedule_gives_it(heads: int, tied: bool) -> None:
    """Tensors cut at heads that do not divide, and those that each rank holds, among them. A schedule
    levels what ranks send in all, not on each kind of link, so that of few pairs the links are less even."""
    card, decoder = model(12, 4, tied=tied) if heads == 12 else nine(tied=tied)
    ratios = []
    for source, destination in PAIRS:
        for inside in (True, False):
            for per_node in (2, 8):
                shape = MoveShape(Layout.parse(source), Layout.parse(destination), inside, per_node)
                if source == destination and inside:
                    continue
                mine, real = move_loads(decoder, shape), planned(card, shape)
                where = (source, destination, inside, per_node, mine, real)
                assert mine.total == pytest.approx(real[2], rel=1e-9), where
                busiest = max(mine.inside, mine.between)
                ratios.append(max(real[:2]) / busiest if busiest else 1.0 + max(real[:2]))
                assert 0.85 <= ratios[-1] <= 1.6, where
    assert sum(0.95 <= ratio <= 1.05 for ratio in ratios) >= 0.9 * len(ratios), sorted(ratios)


def nine(*, tied: bool) -> tuple[Card, Decoder]:
    """Nine heads of 16, as in SmolLM2: t2 has 5 and 4."""
    sizes = SIZES | {"hidden": 72}
    card = llama_card(heads=9, kv_heads=3, tied=tied, **sizes)
    config = {
        "model_type": "llama",
        "hidden_size": 72,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 120,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    return card, read_decoder(config)


def test_nothing_moves_between_equal_places_and_a_copy_moves_everything() -> None:
    card, decoder = model(12, 4, tied=True)
    assert move_loads(decoder, MoveShape(Layout(2, 2), Layout(2, 2), True, 8)).total == 0
    apart = move_loads(decoder, MoveShape(Layout(1), Layout(1), False, 8))
    assert apart.total == card.size == decoder.size
    inside = move_loads(decoder, MoveShape(Layout(4), Layout(2, 2), True, 8))
    assert inside.total == 0 and inside.copied > 0


def test_thousands_of_pairs_take_seconds() -> None:
    _, decoder = model(12, 4, tied=True)
    layouts = [Layout(1024 // (t * p), t, p) for t in (1, 2, 4, 8) for p in (1, 2, 4)]
    started, count = time.perf_counter(), 0
    for one in layouts:
        for other in layouts:
            move_loads(decoder, MoveShape(one, other, False, 8, 1024))
            count += 1
    assert (time.perf_counter() - started) / count < 0.1  # 0.003 s on a quiet machine
