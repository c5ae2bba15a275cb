"""The plans of golden/: run this file to write them anew after a change that is meant."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_cards import NINE_HEADS, llama_card

from planner import make_plan, parse_layouts
from planner.decoder import read_decoder
from planner.hardware import filled
from planner.options import Ask, Models
from planner.options.pins import parse_pins
from planner.search import Work
from planner.searched import search_plan
from realflow.graph import find_graph, load_graph
from realflow.planfile import Cluster, Node, Plan, write_plan

CARD = llama_card(hidden=72, heads=9, kv_heads=3)
ONE_MACHINE = Cluster((Node("local", 4, "cpu", 4 << 30),))
TWO_NODES = Cluster(tuple(Node(f"node{i}", 4, "cuda", 80 << 30) for i in range(2)))

H100_NODES = Cluster(tuple(filled(Node(f"node{i}", 4, "h100")) for i in range(2)))


def _plan(graph: str, cluster: Cluster, *layouts: str) -> Callable[[], Plan]:
    def make() -> Plan:
        loaded = load_graph(find_graph(graph), ["steps=2"])
        return make_plan(loaded, cluster, parse_layouts(layouts), dict.fromkeys(loaded.models, CARD))

    return make


def _searched(graph: str, cluster: Cluster, *fixed: str, staleness: int = 0) -> Callable[[], Plan]:
    def make() -> Plan:
        loaded = replace(load_graph(find_graph(graph), ["steps=2"]), max_staleness=staleness)
        decoders = {name: read_decoder(NINE_HEADS, spec.head) for name, spec in loaded.models.items()}
        models = Models(loaded, decoders, dict.fromkeys(loaded.models, CARD))
        pins = parse_pins(dict(text.split("=") for text in fixed), len(cluster.devices))
        return search_plan(models, cluster, Ask(pins=pins), work=Work(solver=2.0, rounds=500))

    return make


PLANS: Mapping[str, Callable[[], Plan]] = {
    "default": _plan("grpo", ONE_MACHINE),
    "tensor": _plan("grpo", ONE_MACHINE, "d2t2:sequence_parallel", "ref=d1@3:offload"),
    "pipeline": _plan("grpo", ONE_MACHINE, "d4", "train=d2p2:zero_bubble,recompute,offload"),
    "nodes": _plan("grpo", TWO_NODES, "d8", "train=t2p2@0-3", "rollout=d2t2@4-7:free", "ref=d4@4-7:offload"),
    "six-layouts": _plan(
        "ppo",
        ONE_MACHINE,
        "d1@0",
        "rollout=d2@0-1",
        "reward=t2@2-3",
        "ref=p2@1-2:offload",
        "values=d1@3:free",
        "train=d2t2",
        "train_critic=t2p2:zero_bubble,sequence_parallel",
    ),
    "searched": _searched("grpo", ONE_MACHINE),
    "searched-fixed": _searched("ppo", H100_NODES, "rollout=d2t2@0-3", "train=d2p2"),
    "searched-async": _searched("grpo", H100_NODES, staleness=1),
}
"""Name -> a function that makes the plan."""

if __name__ == "__main__":
    folder = Path(__file__).parent / "golden"
    folder.mkdir(exist_ok=True)
    for name, make in PLANS.items():
        print(write_plan(make(), folder / f"{name}.yaml"))
