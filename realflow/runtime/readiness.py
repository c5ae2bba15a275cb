"""Which samples of a step have what each call reads: counted for each sample. Pure.

A call is told of in *units*: samples, groups or the whole batch, by its function's scope. A unit is
ready when every sample of it has every field that the call reads from other calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from realflow.graph.types import Call, Graph


def producers(graph: Graph, call: Call) -> tuple[str, ...]:
    """Names of the calls whose fields `call` reads, in the graph's order."""
    read = set(call.reads.values())
    return tuple(other.name for other in graph.calls if read & set(other.writes.values()))


def active_calls(graph: Graph, step: int) -> tuple[Call, ...]:
    """The calls that run in `step` (0-based): periodic ones when their period ends with it."""
    return tuple(call for call in graph.calls if call.every is None or (step + 1) % call.every == 0)


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
        self.lengths: dict[int, int] = {}
        self.finished: set[str] = set()
        self.backlog: dict[str, dict[int, list[int]]] = {name: {} for name in self.calls}
        """Function call -> rank -> samples that wait until the rank has finished its last piece."""
        self.pieces = dict.fromkeys(self.calls, 0)
        """Function call -> pieces dispatched."""
        self._units = {name: unit_size(graph, call) for name, call in self.calls.items()}
        self._consumers: dict[str, list[str]] = {name: [] for name in self.calls}
        self._missing: dict[str, dict[int, int]] = {}
        self._ready: dict[str, list[int]] = {name: [] for name in self.calls}
        self._todo = dict.fromkeys(self.calls, per_step)
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

    def produced(self, call: str, rank: int, ids: Iterable[int]) -> set[str]:
        """Record that `rank` now holds what `call` wrote for `ids`; the calls this made units ready for."""
        woken: set[str] = set()
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
                    woken.add(name)
        self._undone[call] -= count
        return woken

    def take(self, call: str) -> list[list[int]]:
        """The ready units of a call that were not taken before, each as its sample ids, in order."""
        units, self._ready[call] = sorted(self._ready[call]), []
        size = self._units[call]
        self._todo[call] -= size * len(units)
        return [list(range(unit * size, (unit + 1) * size)) for unit in units]

    def has_ready(self, call: str) -> bool:
        """Whether `take` would return something."""
        return bool(self._ready[call])

    def all_taken(self, call: str) -> bool:
        """Whether every sample of the step was handed to the call."""
        return self._todo[call] == 0

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
