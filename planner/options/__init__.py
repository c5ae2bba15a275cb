"""From a graph to a problem of the search: what each call may run as, and what that costs and needs.

build(models, cluster, ask) -> Built(problem, meanings, ...)
"""

from planner.options.build import build, function_ranks
from planner.options.models import Models
from planner.options.values import Ask, Built, Least, Meaning, Pin, TooLarge
from planner.options.ways import Way, Wishes

__all__ = [
    "Ask",
    "Built",
    "Least",
    "Meaning",
    "Models",
    "Pin",
    "TooLarge",
    "Way",
    "Wishes",
    "build",
    "function_ranks",
]
