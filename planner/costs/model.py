"""Seconds of calls, moves and copies of one graph on one kind of node.

costs = Costs(graph, decoders, lengths, rates, per_node=8)
costs.call("rollout", how)                       # how: a CallPlan, or anything with its layout and flags
costs.move("actor", "actor", Layout(8), Layout(2, 4))
costs.offload("train", how)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache

from planner.costs.batches import Dispatch, Shares, divide, sequence_cost
from planner.costs.functions import function_cost
from planner.costs.generate import generate_cost
from planner.costs.moves import MoveShape, move_loads, moved_seconds
from planner.costs.passes import infer_cost, train_cost
from planner.costs.rollout import History, as_few, simulate, slowest_replica
from planner.costs.setting import Setting
from planner.costs.stages import stage_runs
from planner.costs.values import CallCost
from planner.decoder import Decoder
from planner.formulas import stage_elements
from planner.formulas.values import Cut
from planner.lengths import Lengths
from planner.loads import How
from planner.rates import Rates, Seconds
from planner.search.problem import Move
from realflow.graph.types import Call, Graph
from realflow.layout import Layout
from realflow.models.card import ITEMSIZE

_FIELD_BYTES = {"int": 8, "bool": 1}  # others are float32


class Costs:
    """Answers are cached where they depend on few things: a search asks thousands of times."""

    def __init__(
        self,
        graph: Graph,
        decoders: Mapping[str, Decoder],
        lengths: Lengths,
        rates: Rates,
        *,
        per_node: int,
        function_seconds: Mapping[str, float] | None = None,
    ) -> None:
        """`decoders` has every model of the graph, with its head. `per_node`: devices of a node.
        `function_seconds` are those of calls without a model, for each sample, where they are known."""
        self.graph, self.decoders, self.lengths, self.rates = graph, decoders, lengths, rates
        self.per_node = per_node
        self.function_seconds = dict(function_seconds or {})
        self._lengths: dict[str, Lengths] = {}
        self._histories = lru_cache(maxsize=4096)(self._history)
        self._dispatches = lru_cache(maxsize=4096)(self._dispatch)
        self._shares = lru_cache(maxsize=1024)(self._divided)
        self._loads = lru_cache(maxsize=65536)(move_loads)

    def call(self, name: str, how: How, *, context: int = 1, experts: int = 1) -> CallCost:
        """What a call costs. `context` and `experts` are the ranks of the layout letters c and e, which
        `Layout` does not have yet; the ranks of c come on top of those of `how.layout`."""
        call = self.graph.call(name)
        if call.op == "function":
            seconds = self.function_seconds.get(name)
            return function_cost(self.graph, self.lengths_of(call), self.rates, call, how, seconds)
        setting = self.setting(call, how, context=context, experts=experts)
        if call.op == "generate":
            return generate_cost(setting, self.history(call, how))
        divided = self.divided(call, how)
        return train_cost(setting, divided) if call.op == "train" else infer_cost(setting, divided)

    def setting(self, call: Call, how: How, *, context: int = 1, experts: int = 1) -> Setting:
        """All that the seconds of a model's call depend on, but for the samples."""
        layout = how.layout
        cut = Cut(layout.tp, layout.pp, context, experts, how.sequence_parallel)
        decoder, dtype = self.decoders[str(call.model)], self.graph.models[str(call.model)].dtype
        stages = stage_runs(decoder, layout.pp)
        read = read_bytes(self.graph, call)
        lora = self.graph.models[str(call.model)].lora
        return Setting(call, how, decoder, cut, stages, self.rates, dtype, self.per_node, read, lora)

    def lengths_of(self, call: Call) -> Lengths:
        """The lengths that a call sees: those of the rollout whose tokens it reads."""
        rollout = self._sources.get(call.name)
        if rollout is None or rollout.sampling is None:
            return self.lengths
        if rollout.name not in self._lengths:
            self._lengths[rollout.name] = self.lengths.up_to(rollout.sampling.max_new_tokens)
        return self._lengths[rollout.name]

    def history(self, call: Call, how: How) -> History:
        """The rounds of a generate call on its slowest replica."""
        replicas = as_few(self.graph.prompts, self.graph.samples, how.layout.dp, how.slots)
        return self._histories(call.name, replicas, how.slots)

    def divided(self, call: Call, how: How) -> Dispatch:
        """The micro-batches of an infer or train call on its slowest replica."""
        return self._dispatches(call.name, how.layout.dp, how.micro_batch_tokens)

    def offload(self, name: str, how: How) -> Seconds:
        """What an option that puts away to host memory after its call costs more: bringing back before,
        and putting away behind; of a train call the optimizer's state too."""
        call = self.graph.call(name)
        if call.model is None or how.after != "offload":
            return Seconds(0.0)
        weights, states = 0.0, 0.0
        item = ITEMSIZE[self.graph.models[call.model].dtype]
        setting = self.setting(call, how)
        for run in setting.stages:
            elements = stage_elements(setting.decoder, setting.cut, run.first, run.stop)
            weights = max(weights, float(elements * item))
            if call.op == "train":
                wide = 8 if item == 8 else 4
                trained = setting.trained(run)
                states = max(states, (2 if item == wide else 3) * wide * trained / how.layout.dp)
        changes = call.model in self.graph.trained()
        # Weights that never change have a copy on the host already: they are only brought back.
        return self.rates.host_copy(weights) * (2 if changes else 1) + self.rates.host_copy(states) * 2

    def move(
        self, model: str, into: str, source: Layout, destination: Layout, devices: int | None = None
    ) -> Move:
        """Seconds of moving a trained model's weights from its train call's layout to another one (`into`:
        the model itself, or one that follows it). `devices` of the cluster bound where they can lie apart."""
        decoder, spec = self.decoders[model], self.graph.models[into]
        item = min(ITEMSIZE[self.graph.models[model].dtype], ITEMSIZE[spec.average or spec.dtype])
        follows = spec.follows if into != model else None
        seconds = []
        for inside in (True, False):
            shape = MoveShape(source, destination, inside, self.per_node, devices)
            loads = self._loads(decoder, shape)
            seconds.append(moved_seconds(self.rates, loads, item, averaged=follows is not None).value)
        return Move(*seconds)

    @cached_property
    def _sources(self) -> dict[str, Call]:
        """Call -> the generate call whose tokens it reads."""
        found: dict[str, Call] = {}
        for call in self.graph.calls:
            if call.op == "generate":
                found[call.name] = call
                continue
            fields = [call.reads["tokens"]] if "tokens" in call.reads else list(call.reads.values())
            writers = [self.graph.writer(name) for name in fields]
            sources = [found[w.name] for w in writers if w is not None and w.name in found]
            if sources:
                found[call.name] = sources[0]
        return found

    def _history(self, name: str, replicas: int, slots: int) -> History:
        lengths = self.lengths_of(self.graph.call(name))
        groups = slowest_replica(lengths, self.graph.prompts, self.graph.samples, replicas, slots)
        return simulate(groups, slots, lengths.common)

    def _dispatch(self, name: str, replicas: int, budget: int) -> Dispatch:
        call = self.graph.call(name)
        decoder = self.decoders[str(call.model)]
        source = self._sources.get(name, call).name  # calls of one rollout's samples see the same lengths
        found = self._shares(source, decoder, replicas, call.minibatches, call.whole_groups)
        return found.packed(budget)

    def _divided(self, name: str, decoder: Decoder, replicas: int, count: int, whole_groups: bool) -> Shares:
        """The samples of the slowest replica, for all calls that divide the same ones alike."""
        return divide(
            self.lengths_of(self.graph.call(name)),
            self.graph.prompts,
            self.graph.samples,
            replicas=replicas,
            count=count,
            cost=sequence_cost(decoder),
            whole_groups=whole_groups,
        )


def read_bytes(graph: Graph, call: Call) -> float:
    """Bytes of each token in the fields that a call reads from other calls (those of a sample are few)."""
    written = {name for other in graph.calls for name in other.writes.values()}
    fields = {name for name in call.reads.values() if name in written and graph.extents[name] == "token"}
    return float(sum(_FIELD_BYTES.get(graph.dtypes[name], 4) for name in fields))
