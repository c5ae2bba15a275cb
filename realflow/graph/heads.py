"""What a model gives follows from its head; checks that calls ask for nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from realflow.graph.builtins import BUILTINS
from realflow.graph.schema import Report
from realflow.graph.types import Call, Head, ModelSpec

LOSS_OUTPUTS: Mapping[Head, tuple[str, ...]] = {
    "lm": ("logprobs", "entropy"),
    "value": ("values",),
    "reward": ("scores",),
}
"""Head -> the model outputs that a loss can be given while it trains such a model."""

INFER_OUTPUTS: Mapping[Head, str] = {"lm": "logprobs", "value": "values", "reward": "rewards"}
"""Head -> the built-in output that an infer call computes from it."""


def check_heads(models: Mapping[str, ModelSpec], calls: Sequence[Call], report: Report) -> None:
    """Every call asks its model for what its head gives."""
    for call in calls:
        if call.model is None:
            continue
        model = models[call.model]
        if call.op == "generate" and model.head != "lm":
            message = f"generates, which needs 'head: lm', but {_found(model, report)}"
            report.add(("calls", call.name, "model"), message)
        elif call.op == "infer" and call.decl.name != INFER_OUTPUTS[model.head]:
            report.add(("calls", call.name, "use"), _wrong_output(call, model, report))
        elif call.op == "train":
            given = LOSS_OUTPUTS[model.head]
            missing = [need for need in call.decl.needs if need not in given]
            if missing:
                report.add(("calls", call.name, "use"), _wrong_loss(call, model, missing, report))


def _found(model: ModelSpec, report: Report) -> str:
    line = report.document.line(("models", model.name))
    place = f" (line {line})" if line is not None else ""
    return f"model {model.name}{place} has 'head: {model.head}'"


def _wrong_output(call: Call, model: ModelSpec, report: Report) -> str:
    wanted = next((head for head, output in INFER_OUTPUTS.items() if output == call.decl.name), "lm")
    return (
        f"{call.decl.name} needs 'head: {wanted}', but {_found(model, report)}; expected "
        f"'use: {INFER_OUTPUTS[model.head]}' here, or another model"
    )


def _wrong_loss(call: Call, model: ModelSpec, missing: Sequence[str], report: Report) -> str:
    outputs = " and ".join(map(repr, missing))
    heads = [head for head, given in LOSS_OUTPUTS.items() if set(missing) <= set(given)]
    whose = f"which 'head: {heads[0]}' gives" if heads else "which no one head gives"
    fitting = [
        name
        for name, decl in BUILTINS.items()
        if decl.kind == "loss" and set(decl.needs) <= set(LOSS_OUTPUTS[model.head])
    ]
    advice = f"losses for it: {', '.join(fitting)}"
    return f"{call.decl.name} needs {outputs}, {whose}, but {_found(model, report)}; {advice}"
