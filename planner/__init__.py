"""Graph + Cluster -> Plan. Pure: no torch, no processes.

make_plan(graph, cluster, layouts, cards) -> Plan     from a layout for each call, or one for all
local_cluster(devices) / read_cluster(path) -> Cluster
"""

from planner.cluster import local_cluster, read_cluster
from planner.layouts import EVERY, parse_layouts
from planner.make import Assumptions, make_plan, moves
from planner.memory import overfull, rank_memory, with_memory

__all__ = [
    "EVERY",
    "Assumptions",
    "local_cluster",
    "make_plan",
    "moves",
    "overfull",
    "parse_layouts",
    "rank_memory",
    "read_cluster",
    "with_memory",
]
