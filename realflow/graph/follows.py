"""Checks of models that follow another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from realflow.graph.schema import Report, nearest
from realflow.graph.types import Call, ModelSpec


def check_follows(models: Mapping[str, ModelSpec], calls: Sequence[Call], report: Report) -> None:
    """A model follows a trained one of its kind, at steps in which that one is trained."""
    trains = {call.model: call for call in calls if call.op == "train"}
    for name, model in models.items():
        follow = model.follows
        if follow is None:
            continue
        path = ("models", name, "follows")
        leader = models.get(follow.model)
        if leader is None:
            report.add((*path, "model"), f"unknown model {follow.model!r}; {nearest(follow.model, models)}")
        elif follow.model == name:
            report.add((*path, "model"), f"{name!r} cannot follow itself; name a trained model")
        elif name in trains:
            report.add(
                path, f"call {trains[name].name} trains {name!r}; a model is trained or follows another"
            )
        elif follow.model not in trains:
            message = f"no call trains {follow.model!r}, so that there is nothing to follow; remove 'follows'"
            report.add((*path, "model"), message)
        elif leader.head != model.head:
            message = f"{follow.model!r} has 'head: {leader.head}' and {name!r} 'head: {model.head}'"
            report.add((*path, "model"), f"{message}; expected the same head")
        elif follow.every % (trains[follow.model].every or 1):
            period = trains[follow.model].every
            message = f"found {follow.every} steps, but {follow.model!r} is trained every {period} steps"
            report.add((*path, "every"), f"{message}; expected a multiple of them")
