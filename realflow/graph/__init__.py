"""Graphs of model-function calls: reading, checking, finding and drawing. Pure values, no torch."""

from realflow.graph.draw import explain_batch, to_mermaid, to_svg
from realflow.graph.find import find_graph, graphs_folder, shipped_graphs
from realflow.graph.functions import function, load_function, loss, resolve
from realflow.graph.load import graph_to_mapping, load_graph
from realflow.graph.types import Call, DataSpec, FunctionDecl, Graph, ModelSpec

__all__ = [
    "Call",
    "DataSpec",
    "FunctionDecl",
    "Graph",
    "ModelSpec",
    "explain_batch",
    "find_graph",
    "function",
    "graph_to_mapping",
    "graphs_folder",
    "load_function",
    "load_graph",
    "loss",
    "resolve",
    "shipped_graphs",
    "to_mermaid",
    "to_svg",
]
