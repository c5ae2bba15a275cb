"""The evaluation at the end of a step: when it is due, and what is under way. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from realflow.graph.evaluate import evaluated
from realflow.planfile import Plan
from realflow.runtime.assign import Cost
from realflow.runtime.orders import Orders
from realflow.runtime.readiness import StepReadiness


class Examiner:
    """The evaluations of a run. One is like a step of its own, on a graph of its own, between two steps."""

    def __init__(self, plan: Plan, costs: Mapping[str, Cost]) -> None:
        """`plan` is completed: it has the calls of the evaluation."""
        spec, rollout = plan.graph.evaluate, evaluated(plan.graph.calls)
        assert spec is not None and rollout is not None
        self.rollout = rollout
        """The call whose weights it uses."""
        self.keeps_best = spec.keep_best
        self.calls = frozenset(call.name for call in spec.graph.calls)
        self.orders = Orders(spec.graph, plan.calls, costs)
        self.under_way: StepReadiness | None = None
        self._graph, self._every, self._steps = spec.graph, spec.every, plan.graph.steps
        self._begun = 0.0

    def due(self, step: int) -> bool:
        """Whether a step (0-based) ends with an evaluation."""
        return (step + 1) % self._every == 0 or step + 1 == self._steps

    def begin(self, step: int, now: float) -> None:
        """A step has ended: the same prompts as ever are to be answered."""
        assert self.under_way is None
        self.under_way, self._begun = StepReadiness(self._graph, step, 0), now

    def end(self, now: float) -> Mapping[str, float]:
        """All is judged; returns the metrics that only the core knows."""
        self.under_way = None
        return {"timing_s/eval": now - self._begun}
