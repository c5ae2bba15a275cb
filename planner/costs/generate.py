"""Seconds of a generate call: rounds of decoding, prefills, and what it costs beside its passes."""

from __future__ import annotations

from collections.abc import Sequence

from planner.costs.rollout import History, Prefill, Round
from planner.costs.setting import Setting
from planner.costs.values import CallCost, Tally
from planner.formulas import Pass, decode_pass, pass_of
from planner.rates import Seconds

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
    windows = setting.decoder.windows
    groups = min(float(setting.cut.p), max(1.0, one.running))
    made = decode_pass([(one.longest, one.running / groups)], windows)

    def stages(busy: int) -> list[Seconds]:
        alike = {run.alike: run for run in setting.stages}
        known = {key: setting.decode_pass(run, made, busy) for key, run in alike.items()}
        return [known[run.alike] for run in setting.stages]

    if setting.cut.p == 1:
        return setting.shared(lambda busy: stages(busy)[0])

    def whole(busy: int) -> Seconds:
        times = stages(busy)
        way = setting.crossing(made, "decode") * (setting.cut.p - 1)
        back = setting.rates.p2p(_DRAWN * made.sequences, between=setting.apart)
        return _later(_largest(times) * groups, _total(times) + way + back)

    return setting.shared(whole, groups / setting.cut.p)


def _prefill(setting: Setting, prefill: Prefill) -> Seconds:
    """Prompts go through all stages; while one stage prefills a group, the others serve other groups."""
    if not prefill.passes:
        return Seconds(0.0)
    one = pass_of(prefill.lengths, setting.decoder.windows, rows=0)

    def whole(busy: int) -> Seconds:
        alike = {run.alike: index for index, run in enumerate(setting.stages)}
        known = {key: _prefill_pass(setting, index, one, busy) for key, index in alike.items()}
        times = [known[run.alike] for run in setting.stages]
        slowest = _largest(times)
        return _total(times) + slowest * (prefill.passes - 1)

    return setting.shared(whole)


def _prefill_pass(setting: Setting, index: int, one: Pass, busy: int) -> Seconds:
    return setting.stage_pass(setting.stages[index], one, "prefill", busy)


def _largest(times: Sequence[Seconds]) -> Seconds:
    return max(times, key=lambda seconds: seconds.value)


def _later(one: Seconds, other: Seconds) -> Seconds:
    return one if one.value >= other.value else other


def _total(times: Sequence[Seconds]) -> Seconds:
    return sum(times, Seconds(0.0))
