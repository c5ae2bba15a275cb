"""What the length of a step hangs on, and what would make it shorter.

critical_path(found) -> links from the step's begin to its end, each with what it waited for
gains(found) -> how much shorter a step would be if one operation were faster
idle_groups(found), faster_ways(found, decoders), tightest(plan), advice(found, decoders)

All of it from an `Estimate`: what an operation gains is found by evaluating the plan anew, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from planner.decoder import Decoder
from planner.decoderparts import option_bytes
from planner.estimate import Estimate
from planner.hardware import node_device
from planner.loads import How
from planner.meshes import pools
from planner.options.ways import Way, Wishes, ways
from planner.search import MOVE, Problem, evaluate
from planner.search.evaluate import needs, operations
from planner.search.problem import Entry
from realflow.graph.types import Call
from realflow.planfile import Plan
from realflow.planfile.flags import FLAGS, OF_TRAINING, flag_words
from realflow.planfile.ranks import format_ranks

Reason = Literal["begin", "inputs", "weights", "devices"]
"""What an operation waited for: nothing, results of another call, moved weights, or its devices."""

FASTER = 0.1
"""Part by which an operation is taken to be faster."""
_WORTH = 0.002
"""Part of a step below which a gain is not worth a sentence."""
_IDLE = 0.05
"""Part of a step below which idle devices are not."""
_BETTER = 0.02
"""Part of a call's seconds by which another way must be faster."""
_TIGHT = 0.9
"""Part of a device's memory from which on it is called tight."""


@dataclass(frozen=True)
class Link:
    """An operation of the critical path; it started when that one before it (`of`) had ended."""

    entry: Entry
    waited: Reason
    of: str = ""


@dataclass(frozen=True)
class Gain:
    """How many seconds shorter a step is where `what` takes `FASTER` less."""

    what: str
    seconds: float


@dataclass(frozen=True)
class Group:
    """Ranks that run the same operations (`users`), and seconds of a step in which they run none."""

    ranks: tuple[int, ...]
    users: tuple[str, ...]
    idle: float


@dataclass(frozen=True)
class FasterWay:
    """Another way of running a call with its layout: `saves` seconds of the call, for `bytes` more of
    memory on each of its ranks, of which there are `spare` (None: nobody knows)."""

    call: str
    way: Way
    now: float
    seconds: float
    bytes: int
    spare: int | None

    @property
    def fits(self) -> bool:
        """Whether its ranks have the bytes."""
        return self.spare is None or self.bytes <= self.spare


def critical_path(found: Estimate) -> tuple[Link, ...]:
    """The chain of operations, from the begin of a step to its end, each of which started when the one before
    had ended: nothing else sets the step's length."""
    entries = found.timeline.entries
    if not entries:
        return ()
    links: list[Link] = []
    last = max(range(len(entries)), key=lambda index: (entries[index].end, index))
    while True:
        entry = entries[last]
        before, reason = _waited(found, last)
        links.append(Link(entry, reason, entries[before].what if before is not None else ""))
        if before is None:
            return tuple(reversed(links))
        last = before


def _waited(found: Estimate, index: int) -> tuple[int | None, Reason]:
    """The operation at whose end another one started, and why it waited for it."""
    entries = found.timeline.entries
    entry = entries[index]
    near = 1e-9 * max(found.timeline.makespan, 1e-9)
    if entry.start <= near:
        return None, "begin"
    ready = [i for i in range(index) if abs(entries[i].end - entry.start) <= near]
    need = needs(found.problem, found.choice)
    after = set(operations(found.problem, found.choice)[entry.what].after)
    for reason, names in (("inputs", after), ("weights", {need.get(entry.what, "")})):
        for i in ready:
            if entries[i].what in names:
                return i, "inputs" if reason == "inputs" else "weights"
    for i in ready:
        if any(set(one) & set(other) for one in entries[i].devices for other in entry.devices):
            return i, "devices"
    raise AssertionError(f"{entry.what} starts at {entry.start}, when nothing ends")


def gains(found: Estimate, share: float = FASTER) -> tuple[Gain, ...]:
    """Of each operation: seconds that a step is shorter where it takes `share` less. The largest first."""
    least = {
        entry.what: found.timeline.makespan - _makespan(found, entry.what, 1 - share)
        for entry in found.timeline.entries
        if entry.end > entry.start
    }
    ranked = sorted(least.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Gain(what, max(0.0, seconds)) for what, seconds in ranked)


def _makespan(found: Estimate, what: str, factor: float) -> float:
    """Of the plan in which one operation takes `factor` times as long."""
    problem = found.problem
    if what.startswith(MOVE):
        changed = _with_move(problem, what.removeprefix(MOVE), factor)
    else:
        changed = _with_call(problem, what, factor)
    return evaluate(changed, found.choice, found.order).makespan


def _with_call(problem: Problem, name: str, factor: float) -> Problem:
    calls = []
    for call in problem.calls:
        if call.name == name:
            option = call.options[0]
            option = replace(
                option,
                seconds=option.seconds * factor,
                offload_seconds=option.offload_seconds * factor,
            )
            call = replace(call, options=(option,))
        calls.append(call)
    return replace(problem, calls=tuple(calls))


def _with_move(problem: Problem, name: str, factor: float) -> Problem:
    call = problem.call(name)
    into = str(call.model)
    source = problem.trained()[problem.follows.get(into, into)].options[0].layout
    key = into, source, call.options[0].layout
    move = problem.moves[key]
    scaled = replace(move, inside=move.inside * factor, apart=move.apart * factor)
    return replace(problem, moves={**problem.moves, key: scaled})


def idle_groups(found: Estimate) -> tuple[Group, ...]:
    """Ranks by what they run, with the seconds of a step in which they are idle."""
    busy: dict[int, float] = dict.fromkeys(range(found.plan.world_size), 0.0)
    users: dict[int, list[str]] = {rank: [] for rank in busy}
    for entry in found.timeline.entries:
        if not entry.devices:
            continue
        for rank in found.ranks_of(entry):
            busy[rank] += entry.end - entry.start
            users[rank].append(entry.what)
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank, names in users.items():
        groups.setdefault(tuple(names), []).append(rank)
    return tuple(
        Group(tuple(ranks), names, found.step_seconds - busy[ranks[0]]) for names, ranks in groups.items()
    )


def faster_ways(found: Estimate, decoders: Mapping[str, Decoder]) -> tuple[FasterWay, ...]:
    """For each call on the critical path, other ways of running it with its layout, where they are
    faster: the fastest that fits, and the fastest of all where memory is what keeps it from that."""
    ways_found: list[FasterWay] = []
    for link in critical_path(found):
        name = link.entry.what
        if name in found.plan.calls and found.plan.graph.call(name).model:
            ways_found += _faster(found, found.plan.graph.call(name), decoders)
    return tuple(ways_found)


def _faster(found: Estimate, call: Call, decoders: Mapping[str, Decoder]) -> list[FasterWay]:
    plan, graph = found.plan, found.plan.graph
    how = plan.calls[call.name]
    pool = next(pool for pool in pools(plan.cluster) if how.ranks[0] in pool.devices)
    host = node_device(pool.node).runtime == "cpu"
    longest = found.lengths.longest_prompt, found.lengths.longest_response
    decoder, now = decoders[str(call.model)], found.costs[call.name].seconds
    wishes = Wishes(flags={"after": how.after})

    def needed(way: How) -> int:
        one = option_bytes(graph, call, way, decoder, longest, host=host)
        return one.weights + one.own_bytes + one.active_bytes

    spares = [spare for rank in how.ranks if (spare := spare_bytes(plan, rank)) is not None]
    ranked = sorted(
        (found.seconds_of(call.name, way), index, way)
        for index, way in enumerate(ways(graph, call, how.layout, wishes))
    )
    others = [
        FasterWay(call.name, way, now, seconds, max(0, needed(way) - needed(how)), min(spares, default=None))
        for seconds, _, way in ranked
        if seconds <= now * (1 - _BETTER)
    ]
    chosen = others[:1] + [way for way in others if way.fits][:1]
    return sorted(dict.fromkeys(chosen), key=lambda way: not way.fits)


def spare_bytes(plan: Plan, rank: int) -> int | None:
    """Bytes that a rank has left at its worst moment, by the plan's certificate; None where it has none."""
    limit = _limits(plan)[rank]
    if limit is None or rank not in plan.memory:
        return None
    return limit - sum(plan.memory[rank].values())


def _limits(plan: Plan) -> list[int | None]:
    return [node.memory_bytes for node in plan.cluster.nodes for _ in range(node.devices)]


# ---- sentences -----------------------------------------------------------------------------------------


def advice(found: Estimate, decoders: Mapping[str, Decoder]) -> list[str]:
    """What would shorten a step, as sentences that a person can act on; the most that is to gain first."""
    return [
        *_gain_sentences(found),
        *(_way_sentence(found, way) for way in faster_ways(found, decoders)),
        *_idle_sentences(found),
        *_memory_sentences(found.plan),
    ]


def path_words(found: Estimate) -> list[str]:
    """The critical path, a line for each operation."""
    words = {
        "begin": "from the begin",
        "inputs": "waited for results of {of}",
        "weights": "waited for {of}",
        "devices": "waited for devices that {of} used",
    }
    lines = []
    for link in critical_path(found):
        entry = link.entry
        share = (entry.end - entry.start) / found.step_seconds if found.step_seconds else 0.0
        where = format_ranks(found.ranks_of(entry)) if entry.devices else "CPUs"
        why = words[link.waited].format(of=said(link.of))
        lines.append(
            f"{said(entry.what)} on {where}: {entry.end - entry.start:.3g} s ({share:.0%} of a step), {why}"
        )
    if found.bookkeeping > 0:
        share = found.bookkeeping / found.step_seconds
        lines.append(f"bookkeeping between steps: {found.bookkeeping:.3g} s ({share:.0%} of a step)")
    return lines


def said(what: str) -> str:
    """An operation in words: `moving weights to rollout`."""
    return f"moving weights to {what.removeprefix(MOVE)}" if what.startswith(MOVE) else what


def _gain_sentences(found: Estimate) -> list[str]:
    step = found.step_seconds
    ranked = gains(found)
    worth = [gain for gain in ranked if gain.seconds > _WORTH * step]
    lines = [
        f"If {said(gain.what)} took {FASTER:.0%} less, a step would be {gain.seconds:.3g} s "
        f"({gain.seconds / step:.1%}) shorter."
        for gain in worth
    ]
    nothing = [said(gain.what) for gain in ranked if gain.seconds <= 1e-9 * step]
    if nothing and worth:
        lines.append(f"A faster {' or '.join(nothing)} gains nothing: others take longer beside.")
    return lines


def _way_sentence(found: Estimate, faster: FasterWay) -> str:
    call, way = found.plan.graph.call(faster.call), faster.way
    so = replace(
        found.plan.calls[faster.call],
        schedule=way.schedule,
        recompute=way.recompute,
        sequence_parallel=way.sequence_parallel,
    )
    many = f"{way.slots} slots" if call.op == "generate" else f"{way.micro_batch_tokens} tokens a micro-batch"
    words = [many, *(word for word in flag_words(so) if FLAGS[word][0] in OF_TRAINING)]
    line = (
        f"With {', '.join(words)} {faster.call} would take {faster.seconds:.3g} s in place of "
        f"{faster.now:.3g} s"
    )
    ranks = format_ranks(found.plan.calls[faster.call].ranks)
    more = f"{_size(faster.bytes)} more" if faster.bytes else "no more memory"
    if faster.spare is None:
        return f"{line}; it needs {more} on ranks {ranks}."
    if faster.fits:
        return f"{line}; it needs {more} on ranks {ranks}, and {_size(max(0, faster.spare))} are to spare."
    return (
        f"Memory binds: {line[0].lower()}{line[1:]}, but needs {more} on ranks {ranks}, where "
        f"{_size(max(0, faster.spare))} are to spare."
    )


def _idle_sentences(found: Estimate) -> list[str]:
    lines = []
    for group in idle_groups(found):
        share = group.idle / found.step_seconds if found.step_seconds else 0.0
        if share <= _IDLE:
            continue
        users = " and ".join(dict.fromkeys(map(said, group.users))) or "nothing"
        one = len(group.ranks) == 1
        lines.append(
            f"Rank{'s' * (not one)} {format_ranks(group.ranks)} {'is' if one else 'are'} idle for "
            f"{share:.0%} of a step ({group.idle:.3g} s); {users} run{'s' * (len(set(group.users)) <= 1)} "
            "there."
        )
    return lines


def _memory_sentences(plan: Plan) -> list[str]:
    """The rank with the least memory to spare."""
    known = [(spare, rank) for rank in sorted(plan.memory) if (spare := spare_bytes(plan, rank)) is not None]
    if not known:
        return []
    spare, rank = min(known)
    limit = _limits(plan)[rank]
    assert limit is not None
    used = sum(plan.memory[rank].values())
    cause, size = max(plan.memory[rank].items(), key=lambda item: item[1])
    at = f" at {plan.moments[rank]}" if rank in plan.moments else ""
    tight = "is nearly full" if used > _TIGHT * limit else "has room"
    if spare < 0:
        tight = "does not fit"
    return [
        f"Memory {tight}: rank {rank} needs {_size(used)} of {_size(limit)}{at}, most of it {cause} "
        f"({_size(size)})."
    ]


def _size(size: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"
