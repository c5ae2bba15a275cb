"""Graphs of model-function calls: reading, checking, finding and drawing. Pure values, no torch."""

from realflow.graph.draw import to_mermaid, to_svg
from realflow.graph.find import find_graph, graphs_folder, shipped_graphs
from realflow.graph.functions import function, load_function, loss, resolve
from realflow.graph.load import graph_to_mapping, load_graph
from realflow.graph.types import Call, DataSpec, FunctionDecl, Graph, ModelSpec
from realflow.graph.words import describe, explain_batch, notes

__all__ = [
    "Call",
    "DataSpec",
    "FunctionDecl",
    "Graph",
    "ModelSpec",
    "describe",
    "explain_batch",
    "find_graph",
    "function",
    "graph_to_mapping",
    "graphs_folder",
    "load_function",
    "load_graph",
    "loss",
    "notes",
    "resolve",
    "shipped_graphs",
    "to_mermaid",
    "to_svg",
]
