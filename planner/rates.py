"""Seconds of work, messages, copies and bookkeeping on one kind of device.

From the catalogue (`planner.roofline`), corrected by a profile where it has measured. Every answer says where
it comes from:

    measured      inside what was measured on this machine for this model's shape
    extrapolated  the nearest measurement, scaled by the roofline (other sizes, another shape, more ranks)
    catalogue     from data sheets alone

    rates = make_rates(node, profile)      # a node of the cluster; the profile of its machine, or None
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from planner import roofline
from planner.decoder import Decoder
from planner.formulas import (
    Cut,
    Pass,
    Phase,
    decode_pass,
    ends_traffic,
    ends_work,
    layer_traffic,
    layer_work,
    pass_of,
)
from planner.hardware import Device, node_device
from planner.measured import Measured, has
from planner.profile import Profile
from realflow.errors import InputError, Problem
from realflow.models.card import ITEMSIZE
from realflow.planfile import Node

Source = Literal["measured", "extrapolated", "catalogue"]
Doing = Literal["infer", "prefill", "forward", "backward", "recompute"]
"""infer: a pass that keeps nothing. prefill: one of the generation engine. forward: one that keeps what the
backward pass needs. backward: gradients, those of weights added into the float32 buffer. recompute:
backward that first computes the forward again."""
Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]

CONSTANTS: Mapping[str, float] = {
    "dispatch": 4e-3,
    "step": 30e-3,
    "micro_batch": 2e-3,
    "train_step": 5e-3,
    "sample": 1e-3,
    "decode_pass": 1e-3,
}
"""Seconds of bookkeeping where nothing was measured: a call's way from the master to workers and back; the
master's work at the end of a step; packing and preparing a micro-batch; counts, metrics and norms of a
minibatch; what a rollout and the calls without a model cost for each sample; the generation engine's own work
in a pass."""

_RANKING: tuple[Source, ...] = ("measured", "extrapolated", "catalogue")
_PHASES: Mapping[str, Phase] = {
    "infer": "forward",
    "prefill": "forward",
    "forward": "forward",
    "backward": "backward",
    "recompute": "recompute",
    "decode": "decode",
}


@dataclass(frozen=True, slots=True)
class Seconds:
    """A time, and the least certain source that it rests on. Sums and multiples keep the source."""

    value: float
    source: Source = "measured"

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.value + other.value, worse(self.source, other.source))

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.value * times, self.source)

    __rmul__ = __mul__


def worse(one: Source, other: Source) -> Source:
    """The less certain of two sources."""
    return one if one == other else max(one, other, key=_RANKING.index)


def make_rates(node: Node, profile: Profile | None = None) -> Rates:
    """The rates of a node's devices. Raises InputError for a profile of another kind of device."""
    device = node_device(node)
    if profile is not None and not is_of(profile, node):
        found = profile.machine.get("kind")
        message = f"the profile is of {found}, but node {node.name} has {node.kind}; measure there"
        raise InputError(Problem(f"{message} (realflow profile)", where="profile"))
    return Rates(device, node.devices, profile)


def is_of(profile: Profile, node: Node) -> bool:
    """Whether a profile was measured on a node's kind of device."""
    return profile.machine.get("kind") == node.kind


@dataclass(frozen=True)
class _Asked:
    """What is asked for: a thing, on a model that is cut, at a place on the table's axes."""

    what: str
    doing: str
    decoder: Decoder
    kind: int
    cut: Cut
    dtype: str
    busy: int
    place: tuple[float, ...]
    roof: Callable[[Decoder, int, Cut, tuple[float, ...]], float]
    """Seconds from the catalogue alone, for any model, cut and place."""


class Rates:
    """Seconds on one kind of device.

    `dtype` is that of the compute weights. `busy` is how many ranks of a node compute at once, this one
    included (they share a CPU's memory bandwidth and caches; a GPU does not care).
    """

    def __init__(self, device: Device, per_node: int, profile: Profile | None = None) -> None:
        self.device, self.per_node, self.profile = device, per_node, profile
        shared = device.runtime == "cpu"
        self._measured = None if profile is None else Measured(profile, per_node, shared_cores=shared)
        self._layer = lru_cache(maxsize=65536)(self._layer_seconds)
        self._ends = lru_cache(maxsize=65536)(self._ends_seconds)

    def layer(
        self, decoder: Decoder, kind: int, cut: Cut, one: Pass, doing: Doing, *, dtype: str, busy: int = 1
    ) -> Seconds:
        """One pass through a layer like number `kind` on one rank, with the collectives of its tensor
        group (all of them inside a node)."""
        return self._layer(decoder, kind, _one_stage(cut), one, doing, dtype, busy)

    def ends(
        self,
        decoder: Decoder,
        cut: Cut,
        one: Pass,
        doing: Doing,
        *,
        dtype: str,
        busy: int = 1,
        first: bool = True,
        last: bool = True,
    ) -> Seconds:
        """What a pass computes outside its layers: on the `first` stage the embedding, on the `last` one
        final norm, head and log probabilities (values of a value head) of `one.head_rows` tokens. In
        `prefill` nothing but the embedding."""
        last = last and doing != "prefill"
        what: Doing = "infer" if doing == "prefill" else doing
        if not (first or last):
            return Seconds(0.0)
        if first and last and decoder.head == "lm":
            return self._ends(decoder, _one_stage(cut), one, what, dtype, busy, "ends")
        total = Seconds(0.0)
        if first:
            total += self._ends(decoder, _one_stage(cut), one, what, dtype, busy, "embedding")
        if last:
            name = "head" if decoder.head == "lm" else "values"
            total += self._ends(decoder, _one_stage(cut), one, what, dtype, busy, name)
        return total

    def decode_layer(
        self, decoder: Decoder, kind: int, cut: Cut, one: Pass, *, dtype: str, busy: int = 1
    ) -> Seconds:
        """One layer of a decoding pass (`decode_pass`). The engine reads, of every slot, as many positions
        as the longest has: give that one's context for all."""
        return self._layer(decoder, kind, _one_stage(cut), one, "decode", dtype, busy)

    def decode_ends(
        self, decoder: Decoder, cut: Cut, slots: float, *, dtype: str, busy: int = 1, last: bool = True
    ) -> Seconds:
        """What a decoding pass costs beside its layers: the engine's bookkeeping of `slots` samples, and on
        the `last` stage final norm, logits and drawing tokens."""
        one = Pass(tokens=slots, pairs=slots, sequences=slots)
        what = "engine" if last else "engine_middle"
        return self._ends(decoder, _one_stage(cut), one, "decode", dtype, busy, what)

    def update(
        self, elements: float, data: int = 1, *, dtype: str, busy: int = 1, per_node: int | None = None
    ) -> Seconds:
        """An optimizer step after the gradients are there: norm, clipping, AdamW on this rank's part of the
        masters of `elements` parameters, compute weights of all `data` ranks gathered."""

        def roof(size: float, ranks: int, near: int | None) -> float:
            gathered = roofline.collective_seconds(
                self.device, "all_gather", size * ITEMSIZE[dtype], ranks, near
            )
            return roofline.bytes_seconds(self.device, roofline.UPDATE_BYTES * size / ranks) + gathered

        want = roof(elements, data, per_node)
        near = per_node is None or per_node >= data
        known = self._measured
        wanted = {"dtype": dtype, "data": data, **(known.circumstances(busy) if known else {})}
        found = known.best("update", wanted) if known and near else None
        if known is None or found is None:
            return Seconds(want, "catalogue")
        reading = found.read(elements)
        if reading.inside and has(found, wanted):
            return Seconds(reading.seconds)
        base = roof(reading.at[0], int(found.key["data"]), None)
        return Seconds(reading.seconds * want / base * known.crowded(found, busy), "extrapolated")

    def reduce_gradients(
        self, elements: float, data: int, *, dtype: str, per_node: int | None = None
    ) -> Seconds:
        """By how much reducing the gradients of `elements` parameters over `data` ranks makes a minibatch
        longer, where its backward pass hides nothing of it. (On a CPU it hides next to nothing.)"""
        size = elements * (8 if dtype == "float64" else 4)
        return self.collective("reduce_scatter", size, data, per_node)

    def collective(self, what: Collective, size: float, ranks: int, per_node: int | None = None) -> Seconds:
        """A collective over `ranks`, of which `per_node` share each node (None: all). `size` is the bytes
        of the whole tensor: what is reduced, what has been gathered, what one rank sends and keeps of an
        all-to-all."""
        if ranks <= 1 or not size:
            return Seconds(0.0)
        want = roofline.collective_seconds(self.device, what, size, ranks, per_node)
        near = per_node is None or per_node >= ranks
        found = self._measured.best(what, {"ranks": ranks}) if near and self._measured else None
        if found is None:
            return Seconds(want, "catalogue")
        reading = found.read(size)
        if reading.inside and found.key["ranks"] == ranks:
            return Seconds(reading.seconds)
        base = roofline.collective_seconds(self.device, what, reading.at[0], int(found.key["ranks"]), None)
        return Seconds(reading.seconds * want / base, "extrapolated")

    def p2p(self, size: float, *, between: bool = False) -> Seconds:
        """A message of `size` bytes to a rank of the same or (`between`) another node."""
        return self._by_size(
            "p2p", size, lambda x: roofline.message_seconds(self.device, x, between=between), between
        )

    def realloc(self, size: float, *, between: bool = False) -> Seconds:
        """Moving `size` bytes of weights to another rank: packed, sent, unpacked, as the busiest rank
        does it."""
        link = self.device.between if between else self.device.inside

        def roof(x: float) -> float:
            packed = roofline.bytes_seconds(self.device, 2 * x)
            return link.latency + max(x / link.bytes_per_second, 2 * packed)

        return self._by_size("realloc", size, roof, between)

    def copy(self, size: float) -> Seconds:
        """Copying `size` bytes of weights within a rank's memory."""
        return self._by_size("copy", size, lambda x: roofline.bytes_seconds(self.device, 2 * x))

    def host_copy(self, size: float) -> Seconds:
        """Bytes between device and host memory (on a CPU: to memory that is taken anew, and back)."""
        host = self.device.host
        return self._by_size("host_copy", size, lambda x: host.latency + x / host.bytes_per_second)

    def constant(self, name: str) -> Seconds:
        """Seconds of bookkeeping: one of `CONSTANTS`."""
        if self.profile is not None and name in self.profile.constants:
            return Seconds(self.profile.constants[name])
        return Seconds(CONSTANTS[name], "catalogue")

    # ---- layers and ends ----------------------------------------------------------------------------

    def _layer_seconds(
        self, decoder: Decoder, kind: int, cut: Cut, one: Pass, doing: str, dtype: str, busy: int
    ) -> Seconds:
        if doing == "recompute" and self.profile is not None:
            again = self._layer(decoder, kind, cut, one, "forward", dtype, busy)
            return again + self._layer(decoder, kind, cut, one, "backward", dtype, busy)
        if one.context and self._measured is not None and doing in ("infer", "forward", "backward"):
            return self._shared_layer(decoder, kind, cut, one, doing, dtype, busy)
        decoding = doing == "decode"
        size = one.pairs / one.tokens if one.tokens else 0.0
        place = (one.tokens, size if decoding else max(1.0, 2 * size - 1))

        def roof(model: Decoder, layer: int, how: Cut, at: tuple[float, ...]) -> float:
            given = one if at == place and model is decoder else _pass_at(at, decoding, model.windows)
            return self._layer_roof(model, layer, how, given, doing, dtype)

        what = doing if doing in ("decode", "prefill") else "layer"
        asked = _Asked(what, doing if what == "layer" else "", decoder, kind, cut, dtype, busy, place, roof)
        return self._answer(asked)

    def _shared_layer(
        self, decoder: Decoder, kind: int, cut: Cut, one: Pass, doing: str, dtype: str, busy: int
    ) -> Seconds:
        """A layer whose samples share tokens: as if there were the distinct ones alone, and what attention,
        which is computed for all, takes longer."""
        assert self._measured is not None
        whole = one.tokens + one.context
        length = max(1.0, 2 * one.pairs / whole - 1)
        more = self._measured.spread(doing, decoder, kind, dtype, cut.t, busy, one.tokens, whole, length)
        if (
            more is None
        ):  # a profile of a time when this was not measured: all pairs are those of longer samples
            return self._layer(decoder, kind, cut, replace(one, context=0), doing, dtype, busy)
        share = one.tokens / whole
        windowed = tuple((window, pairs * share) for window, pairs in one.windowed)
        alone = replace(one, context=0, pairs=one.pairs * share, windowed=windowed)
        found = self._layer(decoder, kind, cut, alone, doing, dtype, busy)
        return found + Seconds(more[0], "measured" if more[1] else "extrapolated")

    def _layer_roof(self, decoder: Decoder, kind: int, cut: Cut, one: Pass, doing: str, dtype: str) -> float:
        phase, item = _PHASES[doing], ITEMSIZE[dtype]
        work = layer_work(decoder, kind, cut, one, phase, item)
        seconds = roofline.work_seconds(self.device, work, dtype, roofline.KERNELS[doing])
        if cut.t * cut.c * cut.e == 1:
            return seconds
        traffic = layer_traffic(decoder, kind, cut, one, phase, item)
        return seconds + roofline.traffic_seconds(self.device, traffic, cut, self.per_node)

    def _ends_seconds(
        self, decoder: Decoder, cut: Cut, one: Pass, doing: str, dtype: str, busy: int, what: str
    ) -> Seconds:
        if doing == "recompute":  # the ends are computed once
            doing = "backward"
        rows = one.tokens if what in ("embedding", "engine", "engine_middle") else one.head_rows

        def roof(model: Decoder, _: int, how: Cut, at: tuple[float, ...]) -> float:
            own = replace(model, head=decoder.head) if model.head != decoder.head else model
            return self._ends_roof(own, how, at[0], doing, dtype, what)

        name = "" if doing == "decode" else doing
        return self._answer(_Asked(what, name, decoder, -1, cut, dtype, busy, (rows,), roof))

    def _ends_roof(self, decoder: Decoder, cut: Cut, rows: float, doing: str, dtype: str, what: str) -> float:
        phase, item = _PHASES[doing], ITEMSIZE[dtype]
        one = Pass(tokens=rows, pairs=rows, sequences=rows, rows=rows, windowed=_ones(decoder, rows))
        own = CONSTANTS["decode_pass"] if doing == "decode" else 0.0
        wanted = {"embedding": (True, False), "engine_middle": (False, False)}.get(what, (True, True))
        if what in ("head", "values"):
            wanted = (False, True)
        seconds = own
        for name, work in ends_work(decoder, cut, one, phase, item).items():
            if wanted[0 if name.startswith("embedding") else 1]:
                seconds += roofline.work_seconds(self.device, work, dtype, roofline.END_KERNELS)
        if cut.t * cut.c * cut.e > 1:
            for name, traffic in ends_traffic(decoder, cut, one, phase, item).items():
                if wanted[0 if name == "embedding" else 1]:
                    seconds += roofline.traffic_seconds(self.device, traffic, cut, self.per_node)
        return seconds

    def _answer(self, asked: _Asked) -> Seconds:
        """From the nearest table, or from the catalogue where there is none."""
        want = asked.roof(asked.decoder, max(0, asked.kind), asked.cut, asked.place)
        if not want:
            return Seconds(0.0)
        measured = self._measured
        if measured is None:
            return Seconds(want, "catalogue")
        found = measured.nearest(
            asked.what, asked.doing, asked.decoder, asked.kind, asked.dtype, asked.cut.t, asked.busy
        )
        if found is None:
            return Seconds(want, "catalogue")
        table, alike = found
        reading = table.read(*asked.place)
        known = int(table.key["t"])
        plain = asked.cut == Cut(t=known)
        if alike and plain and reading.inside and has(table, measured.circumstances(asked.busy)):
            return Seconds(reading.seconds)
        model = asked.decoder if alike else measured.model(table)
        base = asked.roof(model, max(0, asked.kind) if alike else 0, Cut(t=known), reading.at)
        return Seconds(reading.seconds * want / base * measured.crowded(table, asked.busy), "extrapolated")

    def _by_size(
        self, what: str, size: float, roof: Callable[[float], float], between: bool = False
    ) -> Seconds:
        if not size:
            return Seconds(0.0)
        found = None if between or self._measured is None else self._measured.best(what, {})
        if found is None:
            return Seconds(roof(size), "catalogue")
        reading = found.read(size)
        if reading.inside:
            return Seconds(reading.seconds)
        return Seconds(reading.seconds * roof(size) / roof(reading.at[0]), "extrapolated")


def _one_stage(cut: Cut) -> Cut:
    """What a rank of one stage knows of its cut. (Asked a million times.)"""
    return cut if cut.p == 1 else Cut(cut.t, 1, cut.c, cut.e, cut.sequence_parallel)


def _pass_at(at: tuple[float, ...], decoding: bool, windows: tuple[int, ...]) -> Pass:
    """The pass that was measured at a place."""
    count, length = at
    if decoding:
        return decode_pass([(length, count)], windows)
    return pass_of([(length, count / length)], windows)


def _ones(decoder: Decoder, rows: float) -> tuple[tuple[int, float], ...]:
    return tuple((window, rows) for window in decoder.windows)
