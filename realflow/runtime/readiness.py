"""Which samples of a step have what each call reads: counted for each sample. Pure.

A call is told of in *units*: samples, groups or the whole batch, by its function's scope. A unit is
ready when every sample of it has every field that the call reads from other calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from realflow.graph.refill import REFILL, judges, refilled
from realflow.graph.types import Call, Graph


def producers(graph: Graph, call: Call) -> tuple[str, ...]:
    """Names of the calls whose fields `call` reads, in the graph's order."""
    read = set(call.reads.values())
    return tuple(other.name for other in graph.calls if read & set(other.writes.values()))


def active_calls(graph: Graph, step: int) -> tuple[Call, ...]:
    """The calls that run in `step` (0-based): periodic ones when their period ends with it. Those of an
    evaluation that belongs to a run are no part of its steps."""
    apart = {call.name for call in graph.evaluate.graph.calls} if graph.evaluate else set()
    due = (call for call in graph.calls if call.every is None or (step + 1) % call.every == 0)
    return tuple(call for call in due if call.name not in apart)


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
    rollouts = [call for call in active_calls(graph, 0) if call.op == "generate"]
    rollouts += [call for call in graph.calls if call.op == "generate" and call.every not in (None, 1)]
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
    """Samples in one unit of a call: 1, or a group; 0 where a unit is everything that there is."""
    if call.op != "function":
        return 0
    return {"sample": 1, "group": graph.samples, "batch": 0}[call.decl.scope]


class StepReadiness:
    """The samples of one step: who holds what, and which units are ready for which call.

    A step draws its prompts at once, unless the graph replaces groups (`refill`). Then it draws them in
    rounds: the calls that the decision hangs on see each round for itself, of the others those that see a
    group or a sample only what stays, and those that see everything wait until the step is `closed`, when
    no round follows any more.
    """

    def __init__(self, graph: Graph, step: int, first_prompt: int | None = None) -> None:
        """`first_prompt`: where the data stands (None: no step before has replaced a group)."""
        self.step = step
        self.calls = {call.name: call for call in active_calls(graph, step)}
        self.groups: list[int] = []
        """The groups of the step as it stands, in order."""
        self.dropped: set[int] = set()
        """Those that have left it, or will once their round is decided."""
        self.round = -1
        self.closed = False
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
        self._samples = graph.samples
        self._begin = self.next_prompt = step * graph.prompts if first_prompt is None else first_prompt
        self._units = {name: unit_size(graph, call) for name, call in self.calls.items()}
        self._sources = {
            name: [p for p in producers(graph, call) if p in self.calls] for name, call in self.calls.items()
        }
        self._consumers: dict[str, list[str]] = {name: [] for name in self.calls}
        for name, sources in self._sources.items():
            for source in sources:
                self._consumers[source].append(name)
        self._missing: dict[str, dict[int, int]] = {name: {} for name in self.calls}
        self._ready: dict[str, list[int]] = {name: [] for name in self.calls}
        self._whole: dict[str, list[int]] = {}
        """Call whose unit is everything -> the samples of that unit."""
        self._undone = dict.fromkeys(self.calls, 0)
        replaces = refilled(graph.calls)
        self.refill = replaces.refill if replaces else None
        self.judges = frozenset(self.calls)
        """The calls that see every round."""
        if self.refill is not None:
            self.judges = judges(graph.calls, self.refill) | {REFILL}
        self.draw(graph.prompts)
        if self.refill is None:
            self.close()

    @property
    def first(self) -> int:
        """The first sample that the step has drawn."""
        return self._begin * self._samples

    @property
    def stop(self) -> int:
        """The sample behind the last one that it has drawn."""
        return self.next_prompt * self._samples

    @property
    def total(self) -> int:
        """Samples of the step as it stands."""
        return len(self.groups) * self._samples

    def samples_of(self, groups: Iterable[int]) -> list[int]:
        """The samples of groups, in order."""
        n = self._samples
        return [sample for group in groups for sample in range(group * n, group * n + n)]

    # ---- rounds -------------------------------------------------------------------------------

    def draw(self, prompts: int) -> None:
        """Take the next prompts of the data into the step: a round."""
        drawn = list(range(self.next_prompt, self.next_prompt + prompts))
        self.next_prompt += prompts
        self.round += 1
        self._drawn = drawn
        self.groups += drawn
        for name in self.judges:
            self._admit(name, drawn)

    @property
    def decided(self) -> bool:
        """Whether it has become known of every group of the last round if it stays."""
        return not self.closed and not self._undone[REFILL]

    def settle(self) -> list[int]:
        """The last round is decided: the groups of it that are dropped leave the step, and are returned;
        calls that see a group or a sample now see those that stay."""
        gone = [group for group in self._drawn if group in self.dropped]
        self.groups = [group for group in self.groups if group not in self.dropped]
        for sample in self.samples_of(gone):
            for name in self.judges:
                self.owners[name].pop(sample, None)
                self.lengths[name].pop(sample, None)
        stay = [group for group in self._drawn if group not in self.dropped]
        for name, size in self._units.items():
            if size and name not in self.judges:
                self._admit(name, stay)
        return gone

    def close(self) -> None:
        """No round follows: calls that see everything now see the step as it stands."""
        self.closed = True
        for name, size in self._units.items():
            if not size and name not in self.judges:
                self._admit(name, self.groups)

    def _admit(self, call: str, groups: list[int]) -> None:
        """A call is to see these groups, as soon as what it reads of them is there."""
        ids, size, sources = self.samples_of(groups), self._units[call], self._sources[call]
        if not ids:
            return
        self._undone[call] += len(ids)
        if not size:
            self._whole[call] = ids
        parts = [ids[i : i + size] for i in range(0, len(ids), size)] if size else [ids]
        for part in parts:
            unit = part[0] // size if size else self.round
            lacking = sum(sample not in self.owners[source] for source in sources for sample in part)
            if lacking:
                self._missing[call][unit] = lacking
            else:
                self._ready[call].append(unit)

    # ---- samples ------------------------------------------------------------------------------

    def produced(self, call: str, rank: int, ids: Iterable[int]) -> None:
        """Record that `rank` now holds what `call` wrote for `ids`."""
        owners = self.owners[call]
        waiting = [
            (self._missing[name], self._units[name], self._ready[name]) for name in self._consumers[call]
        ]
        count = 0
        for sample in ids:
            assert sample not in owners, f"{call} wrote sample {sample} twice"
            assert self.first <= sample < self.stop, (call, sample)
            owners[sample] = rank
            count += 1
            for missing, size, ready in waiting:
                unit = sample // size if size else self.round
                if unit not in missing:  # the call does not see it, or not yet
                    continue
                missing[unit] -= 1
                if missing[unit] == 0:
                    ready.append(unit)
        self._undone[call] -= count

    def take(self, call: str) -> list[list[int]]:
        """The ready units of a call that were not taken before, each as its sample ids, in order."""
        units, self._ready[call] = sorted(self._ready[call]), []
        size = self._units[call]
        if not size:
            return [self._whole[call] for _ in units]
        return [list(range(unit * size, (unit + 1) * size)) for unit in units]

    def has_ready(self, call: str) -> bool:
        """Whether `take` would return something."""
        return bool(self._ready[call])

    def lacking(self, call: str) -> dict[str, int]:
        """Call that `call` waits for -> samples that it has not written yet."""
        return {name: self._undone[name] for name in self._sources[call] if self._undone[name]}

    def all_done(self, call: str) -> bool:
        """Whether the call has reported every sample of the step."""
        return self.closed and self._undone[call] == 0

    def name(self, call: str) -> str:
        """What a dispatch of a model call is called: `rollout@17`, or `rollout@17.1` in a second round."""
        again = f".{self.round}" if self.round and call in self.judges else ""
        return f"{call}@{self.step}{again}"


def last_readers(graph: Graph) -> Mapping[str, frozenset[str]]:
    """Field that a call writes -> the calls that read it (possibly none)."""
    return {
        name: frozenset(call.name for call in graph.readers(name))
        for writer in graph.calls
        for name in writer.writes.values()
    }
