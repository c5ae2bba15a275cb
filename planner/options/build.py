"""From a graph on a cluster to a problem of the search: the options of each call, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

from planner.callbytes import CallBytes
from planner.decoderparts import option_bytes
from planner.hardware import node_device
from planner.lengths import read_lengths
from planner.memory import usable_bytes
from planner.meshes import Pool, places, pools
from planner.options.finer import finer
from planner.options.models import Models
from planner.options.moves import Moves
from planner.options.prune import MOST, best, undominated
from planner.options.rules import comes_after, costs_on
from planner.options.values import Ask, Built, Least, Meaning, Pin, TooLarge
from planner.options.ways import Way, Wishes, layouts, most_replicas, ways
from planner.search import Call, Option, Problem
from realflow.errors import InputError
from realflow.errors import Problem as Wrong
from realflow.graph.types import Call as GraphCall
from realflow.graph.types import Graph
from realflow.layout import Layout
from realflow.planfile import Cluster

SMALL, LARGE = 32, 256
"""With meshes of any length: devices up to which no layout is left out unless another one is better in
everything; beyond which fewer layouts of each size are looked at."""


def build(models: Models, cluster: Cluster, ask: Ask, *, tighten: Sequence[int] = ()) -> Built:
    """The problem of a graph on a cluster. `tighten` are bytes that each device is taken to have less.

    Raises TooLarge where a call fits nowhere, InputError where nothing can be cut, or pins exclude all.
    """
    return _Builder(models, cluster, ask, tighten).built()


class _Builder:
    def __init__(self, models: Models, cluster: Cluster, ask: Ask, tighten: Sequence[int]) -> None:
        self.models, self.graph, self.cluster, self.ask = models, models.graph, cluster, ask
        self.lengths = read_lengths(self.graph)
        self.pools = pools(cluster)
        self.costs = tuple(
            costs_on(pool, self.graph, models.decoders, self.lengths, ask.profile, ask.function_seconds)
            for pool in self.pools
        )
        self.places = [places(pool, any_length=ask.meshes == "any") for pool in self.pools]
        self.world = len(cluster.devices)
        self.tighten = tighten or [0] * self.world
        self.known: dict[tuple[str, int, Way], float] = {}
        self.thorough = ask.meshes == "powers" or self.world <= SMALL
        self.left_out = 0

    def built(self) -> Built:
        found = {call.name: self._options(call) for call in self.graph.calls}
        calls = tuple(
            Call(
                call.name,
                tuple(option for option, _ in found[call.name]),
                comes_after(self.graph, call),
                call.model,
                call.op == "train",
            )
            for call in self.graph.calls
        )
        layouts_of = {call.name: [option.layout for option in call.options] for call in calls}
        problem = Problem(
            memory_bytes=self._memory(calls),
            calls=calls,
            moves=Moves(self.graph, self.costs, self.world, layouts_of),
            follows={
                name: spec.follows.model
                for name, spec in self.graph.models.items()
                if spec.follows is not None
            },
            overlap=self.graph.max_staleness + 1,
        )
        meanings = {name: tuple(meaning for _, meaning in pairs) for name, pairs in found.items()}
        return Built(problem, meanings, self.costs, self.lengths, len(self.known), self.left_out)

    # ---- options of a call ---------------------------------------------------------------------------

    def _options(self, call: GraphCall) -> list[tuple[Option, Meaning]]:
        if call.model is None:
            return [self._function(call)]
        self.least: Least | None = None
        self.refused: dict[str, Layout] = {}
        found: list[tuple[Option, Meaning]] = []
        pin = self.ask.pins.get(call.name, Pin())
        for index, pool in enumerate(self.pools):
            for size, runs in self.places[index].items():
                runs = self._within(pin, runs, pool, size)
                if runs:
                    found += self._sized(call, index, size, runs, pin)
        if found:
            return undominated(found) if self._is_alone(call) else found
        if self.least is not None:
            raise TooLarge(call.name, self.least)
        raise InputError(Wrong(self._nothing(call, pin), where=pin.text or f"calls.{call.name}"))

    def _within(self, pin: Pin, runs: tuple[range, ...], pool: Pool, size: int) -> tuple[range, ...]:
        """The runs that a pin leaves; its own where it names one, aligned or not."""
        if pin.place is not None:
            inside = pool.first <= pin.place.start and pin.place.stop <= pool.devices.stop
            return (pin.place,) if inside and len(pin.place) == size else ()
        return runs if pin.layout is None or pin.layout.size == size else ()

    def _sized(
        self, call: GraphCall, pool: int, size: int, runs: tuple[range, ...], pin: Pin
    ) -> list[tuple[Option, Meaning]]:
        """The options with `size` devices of a pool."""
        model, width = str(call.model), self.pools[pool].node.devices
        every: Iterable[Layout] = (
            [pin.layout]
            if pin.layout is not None
            else layouts(
                size,
                width,
                most_data=most_replicas(self.graph, call),
                most_stages=len(self.models.decoders[model].layers),
            )
        )
        fitting: dict[Layout, list[tuple[Way, CallBytes]]] = {}
        for layout in every:
            reasons = self.models.refusals(model, layout)
            if reasons:
                self.refused.setdefault("; ".join(reasons), layout)
            elif found := self._fitting(call, pool, layout, pin):
                fitting[layout] = found
        every_one = len(fitting)
        if not self.thorough:
            fitting = self._promising(call, pool, fitting)
        kept = {
            layout: undominated(
                [(self._option(call, pool, way, needed, runs), Meaning(way, pool)) for way, needed in found]
            )
            for layout, found in fitting.items()
        }
        if not self.thorough and not self._is_alone(call):
            kept = best(kept, self._slack(model))
        self.left_out += every_one - len(kept)
        options = [one for pairs in kept.values() for one in pairs]
        return undominated(options) if self._is_alone(call) else options

    def _fitting(self, call: GraphCall, pool: int, layout: Layout, pin: Pin) -> list[tuple[Way, CallBytes]]:
        """The ways of a layout that fit into a device, with what they need."""
        wishes = self.ask.wishes
        own = Wishes(
            pin.wishes.micro_batch_tokens or wishes.micro_batch_tokens,
            pin.wishes.slots or wishes.slots,
            pin.wishes.flags,
        )
        on_host, room = self.on_host[pool], self.room[pool]
        bytes_of = lru_cache(maxsize=None)(lambda way: self._bytes(call, way, on_host))  # asked for twice
        listed = ways(self.graph, call, layout, own, every=on_host)
        if room is not None:
            longest = self.lengths.longest_prompt + self.lengths.longest_response
            more = finer(call.op == "generate", listed, own,
                         lambda way: _whole(bytes_of(way)), room, longest)  # fmt: skip
            listed = list(dict.fromkeys([*listed, *more]))
        found = []
        for way in listed:
            needed = bytes_of(way)
            if room is None or needed.weights + needed.own_bytes + needed.active_bytes <= room:
                found.append((way, needed))
            elif self.least is None or _whole(needed) - room < _whole(self.least.needed) - self.least.room:
                self.least = Least(way, self.pools[pool].node.kind, needed, room)
        return found

    def _promising(
        self, call: GraphCall, pool: int, fitting: Mapping[Layout, list[tuple[Way, CallBytes]]]
    ) -> dict[Layout, list[tuple[Way, CallBytes]]]:
        """The layouts of one size whose most usual way is fastest, and the leanest one: all ways of every
        layout of a large cluster would be too many to cost."""
        usual = {layout: max((way for way, _ in found), key=_usual) for layout, found in fitting.items()}
        seconds = {layout: self._seconds(call, pool, way) for layout, way in usual.items()}
        least = {layout: min(_whole(needed) for _, needed in found) for layout, found in fitting.items()}
        ranked = sorted(fitting, key=lambda layout: (seconds[layout], least[layout], layout))
        leanest = sorted(fitting, key=lambda layout: (least[layout], seconds[layout], layout))
        most = MOST if self.world <= LARGE else MOST // 2
        return {layout: fitting[layout] for layout in dict.fromkeys([*ranked[:most], *leanest[:1]])}

    def _seconds(self, call: GraphCall, pool: int, way: Way) -> float:
        """Seconds of a call, which do not depend on what it does when it has ended."""
        key = call.name, pool, replace(way, after="keep")
        if key not in self.known:
            self.known[key] = self.costs[pool].call(call.name, way).seconds
        return self.known[key]

    def _bytes(self, call: GraphCall, way: Way, on_host: bool) -> CallBytes:
        longest = self.lengths.longest_prompt, self.lengths.longest_response
        decoder = self.models.decoders[str(call.model)]
        return option_bytes(self.graph, call, way, decoder, longest, host=on_host)

    def _option(
        self, call: GraphCall, pool: int, way: Way, needed: CallBytes, runs: tuple[range, ...]
    ) -> Option:
        costs = self.costs[pool]
        every = call.every or 1
        return Option(
            runs,
            self._seconds(call, pool, way) / every,
            static_bytes=needed.weights,
            own_bytes=needed.own_bytes,
            active_bytes=needed.active_bytes,
            layout=way.text,
            keeps=way.after != "free",
            offload_seconds=costs.offload(call.name, way).value / every,
        )

    def _function(self, call: GraphCall) -> tuple[Option, Meaning]:
        """A call without a model takes no device: it runs beside what the devices do."""
        way = Way(Layout(dp=function_ranks(self.graph, call, self.world)))
        seconds = max(costs.call(call.name, way).seconds for costs in self.costs)
        return Option((range(0),), seconds / (call.every or 1)), Meaning(way, 0)

    def _is_alone(self, call: GraphCall) -> bool:
        """Whether nothing tells the layouts of a call apart: no other call and no move needs its weights."""
        others = [other for other in self.graph.calls if other.model == call.model and other is not call]
        followed = any(s.follows and s.follows.model == call.model for s in self.graph.models.values())
        return not others and not followed and self.graph.models[str(call.model)].follows is None

    def _slack(self, model: str) -> float:
        """Seconds that a slower layout may gain by cheaper moves: about what moving all weights takes."""
        slack = 0.0
        for costs in self.costs:
            whole = Layout(1, 1, 1)
            other = Layout(1, 1, min(2, len(self.models.decoders[model].layers)))
            move = costs.move(model, model, whole, other, self.world)
            slack = max(slack, move.inside, move.apart)
        return slack

    # ---- memory --------------------------------------------------------------------------------------

    @cached_property
    def on_host(self) -> list[bool]:
        """Of each pool: whether its devices' memory is the host's."""
        return [node_device(pool.node).runtime == "cpu" for pool in self.pools]

    @cached_property
    def room(self) -> list[int | None]:
        """Bytes that calls may fill of a device of each pool; None where nobody knows its memory."""
        found: list[int | None] = []
        for pool in self.pools:
            memory = node_device(pool.node).memory_bytes
            least = min((self.tighten[device] for device in pool.devices), default=0)
            found.append(None if memory is None else max(0, usable_bytes(memory, self.ask.assume) - least))
        return found

    def _memory(self, calls: Sequence[Call]) -> tuple[int, ...]:
        """Bytes of each device; more than enough where nobody knows them."""
        enough = 1 + sum(
            max(option.static_bytes + option.own_bytes + option.active_bytes for option in call.options)
            for call in calls
        )
        found = []
        for pool in self.pools:
            memory = node_device(pool.node).memory_bytes
            usable = None if memory is None else usable_bytes(memory, self.ask.assume)
            found += [enough if usable is None else max(0, usable - self.tighten[device])
                      for device in pool.devices]  # fmt: skip
        return tuple(found)

    def _nothing(self, call: GraphCall, pin: Pin) -> str:
        """Why a call has no option at all."""
        if pin.place is not None or pin.layout is not None:
            reasons = (
                "; ".join(self.refused) or "no run of devices is so long, or lies in devices of one kind"
            )
            return f"{call.name} cannot run so: {reasons}"
        return f"no layout can cut {call.model}: {'; '.join(self.refused) or 'there are no devices'}"


def function_ranks(graph: Graph, call: GraphCall, world: int) -> int:
    """Ranks that a call without a model runs on: as many as there are, and have something to do."""
    units = {"sample": graph.prompts * graph.samples, "group": graph.prompts, "batch": 1}[call.decl.scope]
    return max(1, min(world, units))


def _usual(way: Way) -> tuple[bool, bool, int, int, bool]:
    """Greatest for the way that most calls run where memory does not matter."""
    return not way.recompute, way.after == "keep", way.micro_batch_tokens, way.slots, way.sequence_parallel


def _whole(needed: CallBytes) -> int:
    return needed.weights + needed.own_bytes + needed.active_bytes
