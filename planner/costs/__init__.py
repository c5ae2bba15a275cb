"""Seconds of calls, of moves of weights and of copies to the host, for a graph on one kind of node.

    costs = Costs(graph, decoders, lengths, rates, per_node=8)
    costs.call("rollout", how) -> CallCost        how: a `CallPlan`, or anything with its layout and flags
    costs.move(model, into, source, destination) -> Move
    costs.offload("train", how) -> Seconds

What is computed, and what is sent, is in `planner.formulas`; how long that takes is in `planner.rates`; what
happens in which order is here: how samples come to replicas and into micro-batches, rounds of continuous
batching, pipelines, minibatches, moves.
"""

from planner.costs.model import Costs
from planner.costs.values import CallCost

__all__ = ["CallCost", "Costs"]
