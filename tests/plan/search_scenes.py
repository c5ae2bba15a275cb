"""Graphs, models and clusters that are searched in tests: small, and known by their configs alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.decoder import read_decoder
from planner.hardware import filled
from planner.options import Models
from realflow.graph import find_graph, load_graph
from realflow.graph.types import Graph
from realflow.planfile import Cluster, Node

CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def model_folder(folder: Path, **changes: Any) -> Path:
    """A model that is no more than its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def models(graph: Graph, **changes: Any) -> Models:
    """All models of a graph with one config."""
    config = {**CONFIG, **changes}
    return Models(graph, {name: read_decoder(config, spec.head) for name, spec in graph.models.items()})


def shipped(name: str, *overrides: str) -> Graph:
    """A graph that comes with RealFlow."""
    return load_graph(find_graph(name), overrides)


def gpus(nodes: int, width: int = 8, kind: str = "h100", memory: int | None = None) -> Cluster:
    """Nodes that are alike."""
    return Cluster(tuple(filled(Node(f"node{i}", width, kind, memory)) for i in range(nodes)))


def cpus(devices: int, memory: int = 8 << 30) -> Cluster:
    """This machine, as it were."""
    return Cluster((Node("local", devices, "cpu", memory),))
