"""The evaluation at the end of a step: when it is due, and what is under way. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from realflow.graph.evaluate import EVAL, evaluated
from realflow.graph.types import Call
from realflow.planfile import Plan
from realflow.runtime.assign import Cost
from realflow.runtime.orders import Orders
from realflow.runtime.readiness import StepReadiness


class Examiner:
    """The evaluations of a run, if it has any. One is like a step of its own, on a graph of its own, between
    two steps."""

    def __init__(self, plan: Plan, costs: Mapping[str, Cost]) -> None:
        """`plan` is completed: it has the calls of the evaluation."""
        self._spec, self._steps = plan.graph.evaluate, plan.graph.steps
        self._rollout = evaluated(plan.graph.calls)
        self._calls: frozenset[str] = frozenset()
        if self._spec is not None:
            self._calls = frozenset(call.name for call in self._spec.graph.calls)
            self._orders = Orders(self._spec.graph, plan.calls, costs)
        self.under_way: StepReadiness | None = None
        self._begun = 0.0

    @property
    def step(self) -> int | None:
        """The step at whose end an evaluation is under way."""
        return self.under_way.step if self.under_way else None

    @property
    def keeps_best(self) -> bool:
        """Whether a checkpoint is written at each evaluation."""
        return self._spec is not None and self._spec.keep_best

    def has(self, call: str) -> bool:
        """Whether a call is one of the evaluation's."""
        return call in self._calls

    def like(self, call: Call) -> Call:
        """The call whose weights a call uses: of that which answers the rollout's, else its own."""
        return self._rollout if call.name == EVAL and self._rollout else call

    def orders(self, step: StepReadiness, others: Orders) -> Orders:
        """Who makes the messages of a step: `others` where it is no evaluation."""
        return self._orders if step is self.under_way else others

    def due(self, step: int) -> bool:
        """Whether a step (0-based) ends with an evaluation."""
        return self._spec is not None and ((step + 1) % self._spec.every == 0 or step + 1 == self._steps)

    def begin(self, step: int, now: float) -> None:
        """A step has ended: the same prompts as ever are to be answered."""
        assert self.under_way is None and self._spec is not None
        self.under_way, self._begun = StepReadiness(self._spec.graph, step, 0), now

    def end(self, now: float) -> Mapping[str, float]:
        """All is judged; returns the metrics that only the core knows."""
        self.under_way = None
        return {"timing_s/eval": now - self._begun}
