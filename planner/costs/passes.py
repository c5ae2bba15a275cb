"""Seconds of infer and train calls: micro-batches through the stages, and what a minibatch ends with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from planner.adapters import BACKWARD, FORWARD, decoder_low
from planner.costs.batches import Dispatch, Pack
from planner.costs.setting import Setting
from planner.costs.stages import StageRun, pipelined, stage_classes
from planner.costs.values import CallCost, Tally
from planner.formulas import Pass, gradient_traffic
from planner.formulas.values import Traffic
from planner.rates import Doing, Seconds, Source, worse

_SINGLE = 8
"""Micro-batches of a replica that are costed one by one; of more the mean one is."""

BUCKET = 8 * 2**20
"""Elements of gradients that are reduced at a time: the engine's default, said again because planning imports
no torch; `tests/plan` compares them."""

Passes = Callable[[int, Pass, int], Sequence[Seconds]]
"""(stage, micro-batch, ranks busy at once) -> its passes there."""


def infer_cost(setting: Setting, divided: Dispatch) -> CallCost:
    """The seconds of the slowest replica's micro-batches."""
    tally = Tally()
    tally.add("dispatch", setting.rates.constant("dispatch"))
    tally.add("fields", setting.fetched(divided.tokens))

    def passes(stage: int, one: Pass, busy: int) -> Sequence[Seconds]:
        return (setting.stage_pass(setting.stages[stage], one, "infer", busy),)

    for packs, mean in zip(divided.packs, divided.means, strict=True):
        _micro_batches(setting, tally, packs, mean, divided.repeats, divided.minibatches, passes, "forward")
    return tally.cost(*setting.assumptions)


def train_cost(setting: Setting, divided: Dispatch) -> CallCost:
    """The seconds of all minibatches of the slowest replica, each with its optimizer step."""
    tally = Tally()
    tally.add("dispatch", setting.rates.constant("dispatch"))
    tally.add("fields", setting.fetched(divided.tokens))
    back: Doing = "recompute" if setting.how.recompute else "backward"

    ahead, share = (1.0, 1.0) if setting.lora is None else (FORWARD, BACKWARD)
    if setting.lora is not None and back == "recompute":  # a forward pass, half as long, and a backward pass
        share = (FORWARD + 2 * BACKWARD) / 3

    def passes(stage: int, one: Pass, busy: int) -> Sequence[Seconds]:
        run = setting.stages[stage]
        forward = setting.stage_pass(run, one, "forward", busy) * ahead
        return forward, setting.stage_pass(run, one, back, busy) * share

    schedule = setting.how.schedule
    for packs, mean in zip(divided.packs, divided.means, strict=True):
        last = _micro_batches(
            setting, tally, packs, mean, divided.repeats, divided.minibatches, passes, schedule
        )
        _update(setting, tally, divided.minibatches, last)
    return tally.cost(*setting.assumptions)


def _micro_batches(
    setting: Setting,
    tally: Tally,
    packs: Sequence[Pack],
    mean: Pack,
    repeats: float,
    times: float,
    passes: Passes,
    schedule: str,
) -> list[float]:
    """`times` minibatches of these micro-batches (which are so in the mean), each of them `repeats` times,
    through the stages. Returns the seconds of one backward pass on each."""
    if not packs:
        return [0.0] * len(setting.stages)
    stages = len(setting.stages)
    single = packs if len(packs) <= _SINGLE and repeats == 1 else (mean,)
    each = len(packs) * repeats / len(single)
    count = len(packs) * repeats
    windows = setting.decoder.windows
    computed = [pack.computed(windows, _rows(setting, pack)) for pack in single]
    at_once = min(1.0, count / (count + stages - 1))
    firsts, of = stage_classes(setting.decoder, setting.cut.p)  # stages that are alike take equally long
    found = [[_at_once(setting, passes, first, one, at_once) for one in computed] for first in firsts]
    source: Source = "measured"
    for row in found:
        for pair in row:
            for seconds in pair:
                source = worse(source, seconds.source)
    ways = [[sum(_value(pair, which) for pair in row) * each / count for row in found] for which in (0, 1)]
    forwards, backwards = ([way[one] for one in of] for way in ways)
    busiest = max(forward + backward for forward, backward in zip(*ways, strict=True)) * count
    whole = pipelined(forwards, backwards, count, schedule)
    tally.add("compute", Seconds(busiest * times, source))
    if stages > 1:
        tally.add("bubble", Seconds(max(0.0, whole - busiest) * times, source))
        crossed = (stages - 1) * (1 if schedule == "forward" else 2)
        crossing = setting.crossing(mean.computed(windows, 0), "forward")
        tally.add("messages", crossing * (crossed * times))
    tally.add("micro_batches", setting.rates.constant("micro_batch") * (count * times))
    return backwards


def _at_once(setting: Setting, passes: Passes, stage: int, one: Pass, share: float) -> list[Seconds]:
    """The passes of a micro-batch where the given share of the stages is at work."""
    known = {1: passes(stage, one, 1)}

    def single(busy: int, index: int) -> Seconds:
        if busy not in known:
            known[busy] = passes(stage, one, busy)
        return known[busy][index]

    return [setting.shared(partial(single, index=index), share) for index in range(len(known[1]))]


def _value(passes: Sequence[Seconds], index: int) -> float:
    return passes[index].value if index < len(passes) else 0.0


def _rows(setting: Setting, pack: Pack) -> float:
    """Rows of the head: tokens that are scored, of a reward model the last of each sequence."""
    if setting.decoder.head == "value":
        return pack.tokens
    if setting.decoder.head == "reward" and setting.call.decl.name != "values":
        return pack.sequences
    if "loss_mask" in setting.call.reads and pack.scored:
        return pack.scored
    return pack.tokens - pack.sequences


def _optimizer(setting: Setting, elements: int, data: int, busy: int) -> Seconds:
    per_node = setting.data_per_node
    return setting.rates.update(elements, data, dtype=setting.dtype, busy=busy, per_node=per_node)


def _beyond(setting: Setting, reduced: Seconds, elements: int, backward: float) -> Seconds:
    """What the backward pass of the last micro-batch leaves of reducing the gradients: the last bucket in any
    case. The cores of a CPU are busy with that pass, and hide nothing."""
    if setting.rates.device.runtime == "cpu":
        return reduced
    buckets = max(1, -(-elements // BUCKET))
    left = reduced.value - backward * (1 - 1 / buckets)
    return Seconds(max(left, reduced.value / buckets), reduced.source)


def _sums(setting: Setting, run: StageRun, data: int) -> Sequence[Traffic]:
    """What a stage sends for its gradients once a minibatch; of adapters the sums over tensor ranks."""
    if setting.lora is None:
        return gradient_traffic(setting.decoder, setting.cut, run.first, run.stop, data, setting.itemsize)
    low = decoder_low(setting.decoder, setting.cut, run.first, run.stop, setting.lora)
    tp = setting.cut.t
    return [Traffic("all_reduce", "t", tp, 4 * low.partial)] if low.partial else []


def _update(setting: Setting, tally: Tally, times: float, backwards: Sequence[float]) -> None:
    """What a minibatch ends with, on the stage that takes longest; `backwards` are the seconds of its last
    backward pass on each."""
    data, rates = setting.how.layout.dp * setting.cut.c, setting.rates
    tally.add("train_step", rates.constant("train_step") * times)
    found = []
    for run, backward in {
        run.alike: (run, back) for run, back in zip(setting.stages, backwards, strict=True)
    }.values():
        elements = setting.trained(run)
        reduced = rates.reduce_gradients(elements, data, dtype=setting.dtype, per_node=setting.data_per_node)
        reduced = _beyond(setting, reduced, elements, backward)
        update = setting.shared(partial(_optimizer, setting, elements, data))
        sums = Seconds(0.0)
        for message in _sums(setting, run, data):
            if message.operation == "all_reduce":  # over tensor ranks, and of a tied table
                per_node = 1 if message.axis == "ends" and setting.apart else None
                sums += rates.collective("all_reduce", message.bytes, message.ranks, per_node) * message.count
        found.append((reduced if data > 1 else Seconds(0.0), sums, update))
    slowest = max(found, key=lambda parts: sum(part.value for part in parts))
    for name, seconds in zip(("reduce", "sums", "optimizer"), slowest, strict=True):
        tally.add(name, seconds * times)
