"""Checks of models (who trains them) and of batch sizes (what divides)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from realflow.graph.schema import Report, nearest
from realflow.graph.types import Call, DataSpec, ModelSpec

_AGAINST_GROUP = (
    "advantages.grpo",
    "advantages.dr_grpo",
    "advantages.rloo",
    "advantages.lite_ppo",
    "credit.reinforce_pp_baseline",
)
"""Built-ins that subtract a mean over the group: of one sample nothing is left."""


def check_models(
    models: Mapping[str, ModelSpec], calls: Sequence[Call], data: DataSpec, report: Report
) -> None:
    """Each model is used, and is trained by one call just where it has an optimizer."""
    trains: dict[str, Call] = {}
    for call in calls:
        if call.op != "train" or call.model is None:
            continue
        if call.model in trains:
            first = trains[call.model]
            message = f"trains {call.model!r}, which call {first.name} trains too; a model has one train call"
            report.add(("calls", call.name, "model"), message)
        elif models[call.model].optimizer is None:
            message = (
                f"trains {call.model!r}, which has no optimizer; add 'optimizer' under models.{call.model}"
            )
            report.add(("calls", call.name, "model"), message)
        trains.setdefault(call.model, call)
    used = {call.model for call in calls} | {data.tokenize}
    unclear = any(call.model is None and (call.op != "function" or not call.decl.name) for call in calls)
    for name, model in models.items():
        if unclear:  # a call whose model is not known (which is reported) may be the one that uses it
            continue
        if name not in used:
            report.add(("models", name), "no call uses this model; remove it, or name it in a call")
        elif model.optimizer is not None and name not in trains:
            report.add(
                ("models", name, "optimizer"),
                f"no call trains {name!r}; remove the optimizer or add a train call",
            )
        elif model.lora is not None and name not in trains:
            report.add(
                ("models", name, "lora"),
                f"no call trains {name!r}, whose adapters are for that; remove 'lora' or add a train call",
            )
    if data.tokenize is not None and data.tokenize not in models:
        report.add(("data", "tokenize"), f"unknown model {data.tokenize!r}; {nearest(data.tokenize, models)}")


def check_sizes(calls: Sequence[Call], data: DataSpec, report: Report) -> tuple[int, int]:
    """Prompts of a step and samples of a prompt, from the generate call or the data.

    Returns `(1, 1)` where they cannot be told (which is reported).
    """
    rollouts = [call for call in calls if call.op == "generate"]
    if not rollouts:
        if data.batch is None and "batch" not in report.document.value.get("data", {}):
            report.add(
                ("data",), "'batch' is missing; without a generate call it says how many prompts make a step"
            )
        prompts, samples, sized = _data_sizes(data, report)
    else:
        if data.batch is not None:
            message = "call " + rollouts[0].name + " says how many prompts make a step; remove 'batch' here"
            report.add(("data", "batch"), message)
        if data.pairs:
            message = (
                f"pairs have two samples a prompt, but call {rollouts[0].name} draws its own; name the texts "
                "under 'fields' otherwise than 'chosen' and 'rejected', or remove the call"
            )
            report.add(("data", "tokenize"), message)
        prompts, samples, sized = _rollout_sizes(rollouts, report)
    for call in calls:
        if sized and call.op == "train" and not _divides(prompts, samples, call):
            report.add(
                ("calls", call.name, "minibatches"),
                f"found {call.minibatches}, expected {_rule(prompts, samples, call)}",
            )
    if sized and rollouts and samples == 1:
        for call in calls:
            if call.decl.name in _AGAINST_GROUP:
                report.add(
                    ("calls", call.name),
                    f"{call.decl.name} compares the samples of a prompt, but call {rollouts[0].name} draws "
                    "1 of each, so that every advantage would be 0; set 'samples' there to 2 or more",
                )
    return prompts, samples


def _data_sizes(data: DataSpec, report: Report) -> tuple[int, int, bool]:
    """Prompts and samples (of pairs two) of the data's batch, and whether they could be told."""
    samples = 2 if data.pairs else 1
    if data.batch is None:
        return 1, samples, False
    count = data.batch.count
    if data.batch.unit == "samples" and count % samples:
        message = f"found {data.batch}, but a pair is two samples; expected an even number"
        report.add(("data", "batch"), message)
        return 1, samples, False
    return (count // samples if data.batch.unit == "samples" else count), samples, True


def _rule(prompts: int, samples: int, call: Call) -> str:
    """Into how many minibatches a step can be divided."""
    whole = f"a number that divides the {prompts} prompts of a step (whole groups)"
    if call.whole_groups:
        return f"{whole}: {call.decl.name} looks at the samples of a prompt together"
    if samples == 1:
        return f"a number that divides the {prompts} samples of a step"
    return f"{whole}, or one above {prompts} that divides its {prompts * samples} samples"


def _rollout_sizes(rollouts: Sequence[Call], report: Report) -> tuple[int, int, bool]:
    """Prompts and samples of the generate calls, which must agree, and whether they could be told."""
    sizes = []
    for call in rollouts:
        if call.batch is None:
            continue
        count, samples = call.batch.count, call.samples
        if call.batch.unit == "samples":
            if count % samples:
                message = f"found {count} samples, but {samples} samples a prompt do not divide it"
                report.add(("calls", call.name, "batch"), message)
                continue
            count //= samples
        sizes.append((call, count, samples))
    for call, count, samples in sizes[1:]:
        first, *wanted = sizes[0]
        if [count, samples] != wanted:
            report.add(
                ("calls", call.name, "batch"),
                f"{count} prompts of {samples} samples, but call {first.name} has {wanted[0]} of "
                f"{wanted[1]}; all generate calls of a graph have the same",
            )
    return (sizes[0][1], sizes[0][2], True) if len(sizes) == len(rollouts) else (1, 1, False)


def _divides(prompts: int, samples: int, call: Call) -> bool:
    """Minibatches hold whole groups while there are enough of them, and then samples, if its loss can."""
    if call.minibatches <= prompts or call.whole_groups:
        return prompts % call.minibatches == 0
    return prompts * samples % call.minibatches == 0
