"""Which weights a call may use, and which must move before it runs. Pure."""

from __future__ import annotations

from realflow.graph.types import Call, Graph
from realflow.planfile import Plan
from realflow.planfile.holdings import Edge, Freshness, follow_edges
from realflow.runtime.readiness import StepReadiness, dispatches_before


class Weights:
    """The trained models of a run: how often each was trained, and which holdings have its newest
    weights. Models that nobody trains never move.

    With a staleness above 0, calls of a model may be ordered while it trains. They come behind that
    training on the ranks that they share with it, and get their weights from there elsewhere: so
    what is ordered, not what is done, says which weights a call finds.
    """

    def __init__(self, plan: Plan, start_step: int = 0) -> None:
        self._graph: Graph = plan.graph
        trained = self._graph.trained()
        self._trained = {model: dispatches_before(call, start_step) for model, call in trained.items()}
        """Model -> train dispatches that are done."""
        self.versions = {m: self._trained[m] * call.minibatches for m, call in trained.items()}
        """Model -> optimizer steps that its weights have seen."""
        self._ordered = dict(self.versions)
        """Model -> those that they will have seen after all that is ordered."""
        self._follows = follow_edges(self._graph, plan.calls)
        self._fresh = {model: Freshness(self._graph, plan.calls, model) for model in trained}

    def version(self, model: str | None) -> int:
        """Optimizer steps that a model's weights will have seen where something is ordered now."""
        return self._ordered.get(str(model), 0)

    def allow(self, step: StepReadiness, call: Call) -> bool:
        """Whether `call` may use the weights that there are now.

        It needs all train dispatches that were due in earlier steps, but for `max_staleness` of them.
        A train call waits for the step's other calls of its model, which must see the old weights.
        """
        if call.model not in self._trained:
            return True
        done, due = self._trained[call.model], self._due(step, call.model)
        if call.op == "train":
            return done == due and not self._before(step, call)
        return done >= due - self._graph.max_staleness

    def edge(self, call: Call) -> Edge | None:
        """The move that must come before `call`."""
        fresh = self._fresh.get(str(call.model))
        return fresh.edge(call.name) if fresh is not None else None

    def moved(self, edge: Edge) -> None:
        """An edge was ordered: what is ordered after it finds the weights there."""
        if edge.into == edge.model:
            self._fresh[edge.model].moved(edge)

    def following(self, step: int) -> list[Edge]:
        """The edges to models that follow another one, due at the end of `step`."""
        every = {name: spec.follows.every for name, spec in self._graph.models.items() if spec.follows}
        return [edge for edge in self._follows if (step + 1) % every[edge.into] == 0]

    def used(self, call: Call) -> None:
        """A call was ordered."""
        if call.model in self._fresh:
            self._fresh[call.model].used(call.name)
            if call.op == "train":
                self._ordered[call.model] += call.minibatches

    def trained(self, call: Call) -> None:
        """A train dispatch has ended."""
        assert call.model is not None
        self._trained[call.model] += 1
        self.versions[call.model] += call.minibatches

    def waits(self, step: StepReadiness, call: Call) -> str:
        """What a call that has its samples still waits for, in words."""
        if call.model not in self._trained:
            return "nothing"
        done, due = self._trained[call.model], self._due(step, call.model)
        last = self._before(step, call) if call.op == "train" else []
        return ", ".join([f"weights of {call.model} ({done} of {due} train dispatches are done)", *last])

    def _before(self, step: StepReadiness, call: Call) -> list[str]:
        """The step's other calls of a train call's model that have not finished."""
        others = (c.name for c in step.calls.values() if c.model == call.model and c.name != call.name)
        return [name for name in others if name not in step.finished]

    def _due(self, step: StepReadiness, model: str) -> int:
        """Train dispatches of a model in the steps before `step`."""
        return dispatches_before(self._graph.trained()[model], step.step)


def kept(graph: Graph) -> dict[str, Call]:
    """The models whose weights change, so that checkpoints have them -> the call whose ranks write them:
    the one that trains the model, of a model that follows another one the first that uses it."""
    found = dict(graph.trained())
    for name, spec in graph.models.items():
        if spec.follows is not None:
            found[name] = next(call for call in graph.calls if call.model == name)
    return found
