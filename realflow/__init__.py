"""RealFlow: a dataflow-graph engine for RLHF and RL on verifiable rewards.

    from realflow import Graph, plan, run

    result = run(plan(Graph.load("grpo", ["steps=2"]), devices=2), name="first")

Names are loaded on first use, so that `import realflow` is instant and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realflow.api import Graph, InputError, Plan, RunError, RunResult, load_graph, plan, read_plan, run

__version__ = "0.1.0"
__all__ = ["Graph", "InputError", "Plan", "RunError", "RunResult", "load_graph", "plan", "read_plan", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'realflow' has no attribute {name!r}")
    return getattr(importlib.import_module("realflow.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
