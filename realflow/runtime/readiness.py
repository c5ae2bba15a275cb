"""Which samples of a step have what each call reads: counted for each sample. Pure.

A call is told of in *units*: samples, groups or the whole batch, by its function's scope. A unit is
ready when every sample of it has every field that the call reads from other calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from realflow.graph.types import Call, Graph


def producers(graph: Graph, call: Call) -> tuple[str, ...]:
    """Names of the calls whose fields `call` reads, in the graph's order."""
    read = set(call.reads.values())
    return tuple(other.name for other in graph.calls if read & set(other.writes.values()))


def active_calls(graph: Graph, step: int) -> tuple[Call, ...]:
    """The calls that run in `step` (0-based): periodic ones when their period ends with it."""
    return tuple(call for call in graph.calls if call.every is None or (step + 1) % call.every == 0)


def dispatches_before(call: Call, step: int) -> int:
    """How often a call has run when `step` (0-based) begins."""
    return step // (call.every or 1)


def main_rollout(graph: Graph) -> Call | None:
    """The generate call that the run is about: the one whose tokens a train call reads, without one
    the first of those that run most often.

    Its samples are recorded, its lengths are the run's `response_length`, and it draws under the
    run's own seed, so that adding another generate call changes nothing about it.
    """
    sources = token_sources(graph)
    for call in graph.calls:
        if call.op == "train" and sources[call.name] is not None:
            return graph.call(str(sources[call.name]))
    rollouts = [call for call in graph.calls if call.op == "generate"]
    return min(rollouts, key=lambda call: call.every or 1, default=None)


def token_sources(graph: Graph) -> dict[str, str | None]:
    """Call -> the generate call whose tokens make up its samples; None where they are the data's, or
    where it reads nothing that hangs on tokens.

    Its `tokens`, or else its other fields for each token, decide: they are all of the same tokens. A
    call that reads none is told by the first of its fields that comes from a generate call.
    """
    found: dict[str, str | None] = {}
    for call in graph.calls:
        if call.op == "generate":
            found[call.name] = call.name
            continue
        token = [name for name in call.reads.values() if graph.extents.get(name) == "token"]
        if "tokens" in call.reads:
            token = [call.reads["tokens"]]
        writers = [graph.writer(name) for name in token[:1] or call.reads.values()]
        sources = [found.get(writer.name) for writer in writers if writer is not None]
        found[call.name] = next((source for source in sources if source is not None), None)
    return found


def unit_size(graph: Graph, call: Call) -> int:
    """Samples in one unit of a call: 1, a group, or everything in a step."""
    total = graph.prompts * graph.samples
    if call.op in ("infer", "train"):
        return total
    return {"sample": 1, "group": graph.samples, "batch": total}[call.decl.scope]


class StepReadiness:
    """The samples of one step: who holds what, and which units are ready for which call."""

    def __init__(self, graph: Graph, step: int) -> None:
        per_step = graph.prompts * graph.samples
        self.step = step
        self.first = step * per_step
        self.stop = self.first + per_step
        self.calls = {call.name: call for call in active_calls(graph, step)}
        self.owners: dict[str, dict[int, int]] = {name: {} for name in self.calls}
        """Call -> sample -> the rank that holds what the call wrote."""
        self.lengths: dict[str, dict[int, int]] = {name: {} for name in self.calls}
        """Generate call -> sample -> tokens of its prompt and response."""
        self.states: dict[str, Mapping[str, Any]] = {}
        """Function call -> what it keeps, once it has run in this step."""
        self.finished: set[str] = set()
        self.backlog: dict[str, dict[int, list[int]]] = {name: {} for name in self.calls}
        """Function call -> rank -> samples that wait until the rank has finished its last piece."""
        self.pieces = dict.fromkeys(self.calls, 0)
        """Function call -> pieces dispatched."""
        self._units = {name: unit_size(graph, call) for name, call in self.calls.items()}
        self._consumers: dict[str, list[str]] = {name: [] for name in self.calls}
        self._missing: dict[str, dict[int, int]] = {}
        self._ready: dict[str, list[int]] = {name: [] for name in self.calls}
        self._undone = dict.fromkeys(self.calls, per_step)
        for name, call in self.calls.items():
            sources = [p for p in producers(graph, call) if p in self.calls]
            for source in sources:
                self._consumers[source].append(name)
            unit = self._units[name]
            units = range(self.first // unit, self.stop // unit)
            if sources:
                self._missing[name] = dict.fromkeys(units, unit * len(sources))
            else:
                self._ready[name] = list(units)

    def produced(self, call: str, rank: int, ids: Iterable[int]) -> None:
        """Record that `rank` now holds what `call` wrote for `ids`."""
        owners = self.owners[call]
        consumers = self._consumers[call]
        count = 0
        for sample in ids:
            assert sample not in owners, f"{call} wrote sample {sample} twice"
            assert self.first <= sample < self.stop, (call, sample)
            owners[sample] = rank
            count += 1
            for name in consumers:
                missing = self._missing[name]
                unit = sample // self._units[name]
                missing[unit] -= 1
                if missing[unit] == 0:
                    self._ready[name].append(unit)
        self._undone[call] -= count

    def take(self, call: str) -> list[list[int]]:
        """The ready units of a call that were not taken before, each as its sample ids, in order."""
        units, self._ready[call] = sorted(self._ready[call]), []
        size = self._units[call]
        return [list(range(unit * size, (unit + 1) * size)) for unit in units]

    def has_ready(self, call: str) -> bool:
        """Whether `take` would return something."""
        return bool(self._ready[call])

    def lacking(self, call: str) -> dict[str, int]:
        """Call that `call` waits for -> samples that it has not written yet."""
        sources = [name for name, consumers in self._consumers.items() if call in consumers]
        return {name: self._undone[name] for name in sources if self._undone[name]}

    def all_done(self, call: str) -> bool:
        """Whether the call has reported every sample of the step."""
        return self._undone[call] == 0


def last_readers(graph: Graph) -> Mapping[str, frozenset[str]]:
    """Field that a call writes -> the calls that read it (possibly none)."""
    return {
        name: frozenset(call.name for call in graph.readers(name))
        for writer in graph.calls
        for name in writer.writes.values()
    }
