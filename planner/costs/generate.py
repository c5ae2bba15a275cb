"""Seconds of a generate call: rounds of decoding, prefills, and what it costs beside its passes."""

from __future__ import annotations

from collections.abc import Sequence

from planner.costs.rollout import History, Prefill, Round
from planner.costs.setting import Setting
from planner.costs.stages import stage_classes
from planner.costs.values import CallCost, Tally
from planner.formulas import decode_pass, pass_of
from planner.rates import Seconds, Source, worse

_DRAWN = 16
"""Bytes that come back from the last stage for each sample: its token and log probability."""


def generate_cost(setting: Setting, history: History) -> CallCost:
    """The seconds of the replica that ends last."""
    tally = Tally()
    rates = setting.rates
    tally.add("dispatch", rates.constant("dispatch"))
    tally.add("samples", rates.constant("sample") * history.samples)
    for one in history.rounds:
        tally.add("decode", _round(setting, one) * one.count)
    tally.add("prefill", _prefill(setting, history.prefill))
    return tally.cost(*setting.assumptions)


def _round(setting: Setting, one: Round) -> Seconds:
    """Every running sample gets a token: of a pipeline, each group of slots makes a pass.

    A stage makes the passes of all groups one after the other, and a group's next pass needs the tokens
    of its last: the round takes the longer of the two.
    """
    groups = min(float(setting.cut.p), max(1.0, one.running))
    made = decode_pass([(one.longest, one.running / groups)], setting.decoder.windows)
    firsts, of = stage_classes(setting.decoder, setting.cut.p, decoding=True)

    def stages(busy: int) -> list[Seconds]:
        return [setting.decode_pass(setting.stages[first], made, busy) for first in firsts]

    if setting.cut.p == 1:
        return setting.shared(lambda busy: stages(busy)[0])

    def whole(busy: int) -> Seconds:
        times = stages(busy)
        way = setting.crossing(made, "decode") * (setting.cut.p - 1)
        back = setting.rates.p2p(_DRAWN * made.sequences, between=setting.apart)
        return _later(_largest(times) * groups, _total(times, of) + way + back)

    return setting.shared(whole, groups / setting.cut.p)


def _prefill(setting: Setting, prefill: Prefill) -> Seconds:
    """Prompts go through all stages; while one stage prefills a group, the others serve other groups."""
    if not prefill.passes:
        return Seconds(0.0)
    one = pass_of(prefill.lengths, setting.decoder.windows, rows=0)
    firsts, of = stage_classes(setting.decoder, setting.cut.p)

    def whole(busy: int) -> Seconds:
        times = [setting.stage_pass(setting.stages[first], one, "prefill", busy) for first in firsts]
        return _total(times, of) + _largest(times) * (prefill.passes - 1)

    return setting.shared(whole)


def _largest(times: Sequence[Seconds]) -> Seconds:
    return max(times, key=lambda seconds: seconds.value)


def _later(one: Seconds, other: Seconds) -> Seconds:
    return one if one.value >= other.value else other


def _total(times: Sequence[Seconds], of: Sequence[int]) -> Seconds:
    """Of all stages, each of class `of` with its time."""
    source: Source = "measured"
    for seconds in times:
        source = worse(source, seconds.source)
    values = [seconds.value for seconds in times]
    return Seconds(sum(values[one] for one in of), source)
