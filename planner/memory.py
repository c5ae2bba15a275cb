"""Bytes of each rank, by cause, at the worst moment of a step: a certificate, from the models' cards.

A moment is a call under way (with the generate calls that may be under way beside it), or weights
that move. What is there at a moment: weights of the holdings in use and of those that are kept;
masters, Adam's two moments (sharded over dp) and gradients of train calls, unless they are offloaded
meanwhile; KV caches of generate calls that keep them; the buckets of reallocation; activations, logits and
messages of what runs. The longest prompts and responses that the graph lets come count, packed as full as
micro-batches may be; on top is a margin for what allocators lose between pieces.

What is offloaded goes to host memory, which for a CPU rank is the memory that it has anyway: there
it is counted, as a cause of its own. What is freed is gone after its first use, before which it is
in host memory, too.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from planner.callbytes import Sizes, kv_bytes, training_bytes
from planner.decoder import Decoder
from planner.decoderparts import AllParts
from planner.lengths import read_lengths
from planner.loads import Batch, Load, batch_load, worst_load
from planner.passing import passing_bytes
from planner.sizes import Part, Parts
from realflow.graph.types import Call, Graph
from realflow.models.card import ITEMSIZE, Card
from realflow.planfile import CallPlan, Cluster, Plan
from realflow.planfile.holdings import After, Held, Holding, follow_edges, holdings, planned_edges, put_away
from realflow.planfile.types import CAUSES
from realflow.realloc.messages import BUCKET_BYTES

HOST = "cpu"
"""The kind of a device whose memory is the host's."""

MOVING = "reallocation"
"""The name of a moment at which weights move and no call runs."""


@dataclass(frozen=True)
class Assumptions:
    """What the graph does not say: the bytes of an idle worker process, and how much of all other bytes
    is lost between pieces of memory."""

    process_bytes: int = 600 << 20
    margin: float = 0.05


def usable_bytes(memory_bytes: int, assume: Assumptions) -> int:
    """What calls may fill of a device's memory (`planner.callbytes`): without the process, the margin, and
    the buckets of a rank that sends and receives weights."""
    return int((memory_bytes - assume.process_bytes) / (1 + assume.margin)) - 2 * BUCKET_BYTES


@dataclass(frozen=True)
class Worst:
    """The worst moment of a rank: bytes by cause (of `CAUSES`), and the calls under way, or `MOVING`."""

    sizes: Sizes
    moment: str


def rank_memory(
    graph: Graph,
    calls: Mapping[str, CallPlan],
    cards: Mapping[str, Card],
    cluster: Cluster,
    assume: Assumptions,
    batch: Batch | None = None,
    decoders: Mapping[str, Decoder] | None = None,
) -> dict[int, Worst]:
    """Rank -> its worst moment. Ranks that no call uses and causes of 0 bytes are left out.

    With `batch` it is an estimate for a step whose prompts and responses are that long, else the
    certificate for all that the graph lets come. `decoders` say what a model without a card is. Raises
    InputError for layouts that a model cannot be cut for.
    """
    kinds = [node.kind for node in cluster.nodes for _ in range(node.devices)]
    step = Step(graph, calls, AllParts(graph, cards, decoders or {}), batch)
    memory = {}
    known: dict[object, Worst] = {}
    for rank, kind in enumerate(kinds):
        alike = step.alike(rank, kind)  # ranks that do the same need the same
        if not alike:
            continue
        if alike not in known:
            known[alike] = step.worst(rank, kind, assume)
        memory[rank] = known[alike]
    return memory


def with_memory(plan: Plan, memory: Mapping[int, Worst]) -> Plan:
    """A plan with the memory of its ranks."""
    return replace(
        plan,
        memory={rank: worst.sizes for rank, worst in memory.items()},
        moments={rank: worst.moment for rank, worst in memory.items()},
    )


def overfull(plan: Plan) -> dict[tuple[int, int], list[int]]:
    """(bytes expected, bytes of the device) -> the ranks that are expected not to fit into memory."""
    limits = [node.memory_bytes for node in plan.cluster.nodes for _ in range(node.devices)]
    found: dict[tuple[int, int], list[int]] = {}
    for rank, causes in sorted(plan.memory.items()):
        limit, total = limits[rank], sum(causes.values())
        if limit is not None and total > limit:
            found.setdefault((total, limit), []).append(rank)
    return found


@dataclass(frozen=True)
class Moment:
    """What a rank does at a moment, and which holdings of which models it needs for that.

    `position` is that of its call among the graph's calls; moves come after all of them.
    """

    running: tuple[Call, ...]
    used: frozenset[tuple[str, Holding]]
    position: int

    @property
    def name(self) -> str:
        """The calls under way."""
        return " beside ".join(call.name for call in self.running) or MOVING


class Step:
    """What ranks hold and do in one step of a plan."""

    def __init__(
        self, graph: Graph, calls: Mapping[str, CallPlan], parts: Parts, batch: Batch | None = None
    ) -> None:
        self._graph, self._calls, self._parts, self._batch = graph, calls, parts, batch
        self._loads: dict[str, Load] = {}
        lengths = read_lengths(graph)
        self._longest = lengths.longest_prompt, lengths.longest_response
        self._edges = (*planned_edges(graph, calls), *follow_edges(graph, calls))
        self._ends = [(_by_rank(edge.sources), _by_rank(edge.destinations)) for edge in self._edges]
        self._away: dict[int, list[tuple[str, Holding, After]]] = defaultdict(list)
        for model in graph.models:
            for (rank, held), after in put_away(graph, calls, model).items():
                self._away[rank].append((model, held, after))
        self._held = {call.name: holdings(calls[call.name]) for call in graph.calls if call.model}
        self._beside = {call.name: _beside(graph, call) for call in graph.calls}

    def alike(self, rank: int, kind: str) -> object:
        """Equal for ranks whose memory is the same; None for a rank that no call uses."""
        here = self._here(rank)
        uses = tuple((call.name, self._held[call.name][rank] if call.model else None) for call in here)
        moves = tuple((sources.get(rank), destinations.get(rank)) for sources, destinations in self._ends)
        return (uses, moves, kind) if here else None

    def worst(self, rank: int, kind: str, assume: Assumptions) -> Worst:
        """The moment at which a rank needs most."""
        found = [(self.at(moment, rank, kind), moment.name) for moment in self.moments(rank)]
        sizes, name = max(found, key=lambda one: sum(one[0].values()))
        total = {**sizes, "process": assume.process_bytes}
        total["margin"] = int(assume.margin * sum(sizes.values()))
        return Worst({cause: total[cause] for cause in CAUSES if total.get(cause)}, name)

    def load(self, call: Call, part: Part) -> Load:
        """What a replica has of a call's samples."""
        if call.name not in self._loads:
            where = self._calls[call.name]
            if self._batch is None:
                found = worst_load(self._graph, call, where, self._longest, part.positions)
            else:
                found = batch_load(self._graph, call, where, self._batch, part.positions)
            self._loads[call.name] = found
        return self._loads[call.name]

    def moments(self, rank: int) -> Iterator[Moment]:
        """All that a rank does in a step."""
        for call in self._here(rank):
            running = [call, *(c for c in self._beside[call.name] if rank in self._calls[c.name].ranks)]
            used = frozenset((str(c.model), self._held[c.name][rank]) for c in running if c.model)
            yield Moment(tuple(running), used, self._graph.calls.index(call))
        for edge, (sources, destinations) in zip(self._edges, self._ends, strict=True):
            used = frozenset((edge.model, held) for held in sources.get(rank, ()))
            into = {(edge.into, held) for held in destinations.get(rank, ())}
            if used or into:
                yield Moment((), used | into, len(self._graph.calls))

    def at(self, moment: Moment, rank: int, kind: str) -> Sizes:
        """Bytes by cause at one moment, without the process and the margin."""
        sizes = self._weights(moment, rank, kind)
        sizes["buckets"] += self._bucket_bytes(rank)
        for call in self._here(rank):
            if call.model is None:
                continue
            where, part, runs = self._calls[call.name], self._part(call, rank), call in moment.running
            if call.op == "generate" and (runs or where.after == "keep"):
                sizes["kv_cache"] += kv_bytes(part, self.load(call, part))
            if call.op == "train":
                held = training_bytes(part, where.layout.dp)
                if runs or where.after == "keep":
                    sizes.update(held)
                elif kind == HOST:  # gradients are let go
                    sizes["offloaded"] += sum(size for cause, size in held.items() if cause != "gradients")
            if runs:
                sizes.update(passing_bytes(call, where, part, self.load(call, part), host=kind == HOST))
        return dict(sizes)

    def _here(self, rank: int) -> list[Call]:
        return [call for call in self._graph.calls if rank in self._calls[call.name].ranks]

    def _weights(self, moment: Moment, rank: int, kind: str) -> Counter[str]:
        sizes: Counter[str] = Counter()
        for model, held, after in self._away[rank]:
            part, used = self._parts.of(model, held), (model, held) in moment.used
            unused = after == "free" and moment.position < self._first_use(model, held, rank)
            sides = [(part.weight_bytes, after == "keep" or used)]
            average = self._graph.models[model].average
            if average:  # of a follower: moves need it, calls do not
                wide = part.stored * ITEMSIZE[average]
                sides.append((wide, after == "keep" or (used and not moment.running)))
            for size, here in sides:
                if here:
                    sizes["weights"] += size
                elif (after == "offload" or unused) and kind == HOST:
                    sizes["offloaded"] += size
        return sizes

    def _first_use(self, model: str, held: Holding, rank: int) -> float:
        """Position of the first call that uses a holding in the first step; infinite where only periodic
        calls do, which come later."""
        found = (
            position
            for position, call in enumerate(self._graph.calls)
            if call.model == model and call.every is None and self._held[call.name].get(rank) == held
        )
        return next(found, math.inf)

    def _part(self, call: Call, rank: int) -> Part:
        return self._parts.of(str(call.model), self._held[call.name][rank])

    def _bucket_bytes(self, rank: int) -> int:
        """One bucket to send from where a rank has sources of a move, one to receive into where it has
        destinations; each no larger than the weights that it is for."""
        most = [0, 0]
        for edge, ends in zip(self._edges, self._ends, strict=True):
            for side, (model, held) in enumerate(zip((edge.model, edge.into), ends, strict=True)):
                parts = [self._parts.of(model, one) for one in held.get(rank, ())]
                size = sum(part.elements * part.itemsize for part in parts)
                most[side] = max(most[side], min(BUCKET_BYTES, size))
        return sum(most)


def _by_rank(held: Iterable[Held]) -> dict[int, tuple[Holding, ...]]:
    found: dict[int, tuple[Holding, ...]] = {}
    for rank, one in held:
        found[rank] = (*found.get(rank, ()), one)
    return found


def _beside(graph: Graph, call: Call) -> tuple[Call, ...]:
    """The generate calls that may be under way while `call` is: neither needs what the other writes."""
    return tuple(
        other
        for other in graph.calls
        if other.op == "generate"
        and other.name != call.name
        and other.name not in _before(graph, call)
        and call.name not in _before(graph, other)
    )


def _before(graph: Graph, call: Call) -> set[str]:
    """The calls that a call waits for, directly or not: those that write what it reads."""
    found: set[str] = set()
    todo = [call]
    while todo:
        for name in todo.pop().reads.values():
            writer = graph.writer(name)
            if writer is not None and writer.name not in found:
                found.add(writer.name)
                todo.append(writer)
    return found
