"""What a dispatch is given: which samples on which rank, and where each finds its inputs; and what is
freed behind it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from realflow.data.balance import minibatches
from realflow.graph.types import Call, Graph
from realflow.planfile import CallPlan
from realflow.runtime.assign import Cost, divide, near_owner, together
from realflow.runtime.carried import State
from realflow.runtime.dispatches import replicas
from realflow.runtime.messages import Execute, Free
from realflow.runtime.readiness import StepReadiness, last_readers, producers, token_sources


class Orders:
    """Makes the messages of infer, train and function dispatches."""

    def __init__(self, graph: Graph, calls: Mapping[str, CallPlan], costs: Mapping[str, Cost]) -> None:
        self._graph, self._calls, self._costs = graph, calls, costs
        self._sources = token_sources(graph)
        self._readers = last_readers(graph)

    def assign(self, step: StepReadiness, call: Call) -> None:
        """Put the ready units of a function call on the backlog of ranks, near their inputs."""
        if not step.has_ready(call.name):
            return
        backlog = step.backlog[call.name]
        load = {rank: len(ids) for rank, ids in backlog.items()}
        owners = [step.owners[p] for p in producers(self._graph, call) if p in step.calls]
        for unit in step.take(call.name):
            rank = near_owner(unit, owners, self._calls[call.name].ranks, load)
            load[rank] = load.get(rank, 0) + len(unit)
            backlog.setdefault(rank, []).extend(unit)

    def piece(
        self, order: int, name: str, step: StepReadiness, call: Call, ids: list[int], state: State
    ) -> Execute:
        """A function's piece on one rank."""
        inputs, lengths = self._inputs(step, call, ids), self._lengths(step, call, ids)
        return Execute(order, name, call.name, step.step, [ids], inputs, lengths, state=dict(state))

    def spread(
        self, order: int, step: StepReadiness, call: Call, ids: list[int]
    ) -> tuple[dict[int, list[int]], dict[int, Execute]]:
        """An infer or train dispatch over its whole mesh: rank -> the samples that it will report, and
        rank -> its message. All ranks of a replica get the replica's samples.

        Where tokens come from the data, only workers know the lengths. Replicas then take their parts
        of a train minibatch themselves, by estimated time. Samples of an infer call are divided by
        their number: the core must know which rank will hold what it writes.
        """
        where = self._calls[call.name]
        groups = [sample // self._graph.samples for sample in ids]
        batches = minibatches(ids, groups, call.minibatches)
        source = self._sources[call.name]
        whole = call.op == "train" and source is None
        if whole:
            parts = [[batch] * where.layout.dp for batch in batches]
        else:
            cost = self._costs.get(str(call.model), float)
            known = step.lengths[source] if source else {}
            parts = [
                divide(batch, known, where.layout.dp, cost, together(self._graph, call, batch))
                for batch in batches
            ]
        shards = [[part[dp] for part in parts] for dp in range(where.layout.dp)]
        flat = [[sample for shard in mine for sample in shard] for mine in shards]
        held: dict[int, list[int]] = {rank: [] for rank in where.ranks}
        for dp, rank in enumerate(replicas(where)):
            held[rank] = ([] if dp else ids) if whole else flat[dp]
        name = step.name(call.name)
        inputs = [self._inputs(step, call, mine) for mine in flat]
        lengths = [self._lengths(step, call, mine) for mine in flat]
        sent = {}
        for rank in where.ranks:
            dp = where.mesh.coordinate(rank)["dp"]
            sent[rank] = Execute(
                order, name, call.name, step.step, shards[dp], inputs[dp], lengths=lengths[dp], whole=whole
            )
        return held, sent

    def freed(self, step: StepReadiness, call: Call) -> list[tuple[tuple[int, ...], Free]]:
        """The fields that nobody reads again now that `call` has finished, with the ranks that have them."""
        by_ranks: dict[tuple[int, ...], list[str]] = {}
        for name in {*call.reads.values(), *call.writes.values()}:
            writer = self._graph.writer(name)
            if writer is None or writer.name not in step.finished:
                continue
            readers = {reader for reader in self._readers[name] if reader in step.calls}
            if readers <= step.finished:
                users = {writer.name, *readers}
                ranks = tuple(sorted({rank for user in users for rank in self._calls[user].ranks}))
                by_ranks.setdefault(ranks, []).append(name)
        return [(ranks, Free(sorted(names), step.first, step.stop)) for ranks, names in by_ranks.items()]

    def dropped(self, step: StepReadiness, groups: Sequence[int]) -> list[tuple[tuple[int, ...], Free]]:
        """What the calls that saw a round have of the groups that leave the step, as in `freed`."""
        names: list[str] = []
        users: set[str] = set()
        for call in (step.calls[name] for name in sorted(step.judges)):
            names += call.writes.values()
            users.add(call.name)
        ranks = tuple(sorted({rank for user in users for rank in self._calls[user].ranks}))
        spans = [step.samples_of([group]) for group in groups]
        return [(ranks, Free(sorted(names), span[0], span[-1] + 1)) for span in spans]

    def _lengths(self, step: StepReadiness, call: Call, ids: Sequence[int]) -> list[int]:
        """Tokens of each sample as `call` sees it; nothing where only workers can know."""
        source = self._sources[call.name]
        return [step.lengths[source][sample] for sample in ids] if source else []

    def _inputs(self, step: StepReadiness, call: Call, ids: Sequence[int]) -> list[list[object]]:
        """[field, owner, ids] for every field that other calls wrote for `ids`."""
        inputs: list[list[object]] = []
        for name in dict.fromkeys(call.reads.values()):
            writer = self._graph.writer(name)
            if writer is None or writer.name not in step.calls:
                continue
            owners = step.owners[writer.name]
            by_owner: dict[int, list[int]] = {}
            for sample in ids:
                by_owner.setdefault(owners[sample], []).append(sample)
            inputs.extend([name, owner, samples] for owner, samples in sorted(by_owner.items()))
        return inputs
