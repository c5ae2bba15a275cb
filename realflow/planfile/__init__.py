"""The plan file: the contract between planner and runtime. Pure values; reading and writing YAML.

write_plan(plan, path)      a file that a person can read and edit
read_plan(path) -> Plan     exactly what was written; everything wrong is told in one InputError
check_plan(plan)            the rules that a plan keeps, wherever it came from
"""

from realflow.planfile.check import check_plan, check_runnable, idle_ranks, needed_reallocs, run_problems
from realflow.planfile.read import parse_plan, read_plan
from realflow.planfile.types import (
    FORMAT,
    CallPlan,
    Cluster,
    Node,
    Plan,
    ReallocPlan,
    TimelineEntry,
)
from realflow.planfile.write import plan_to_yaml, write_plan

__all__ = [
    "FORMAT",
    "CallPlan",
    "Cluster",
    "Node",
    "Plan",
    "ReallocPlan",
    "TimelineEntry",
    "check_plan",
    "check_runnable",
    "idle_ranks",
    "needed_reallocs",
    "parse_plan",
    "plan_to_yaml",
    "read_plan",
    "run_problems",
    "write_plan",
]
