"""What a person fixes of single calls: `rollout=d4t2p1@0-7`, `train=d2t4`, `ref=@8-15:offload`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from planner.layouts import read_choice, words_of
from planner.options.models import Models
from planner.options.values import Ask, Pin
from planner.options.ways import Wishes, most_replicas
from realflow.errors import InputError, Problem
from realflow.graph.types import Call
from realflow.planfile import Cluster
from realflow.planfile.flags import FLAGS, OF_TRAINING

OPTION = "--fix"


def parse_pins(fixed: Mapping[str, str], devices: int) -> dict[str, Pin]:
    """Call -> what is fixed of it (`d4t2p1@0-7:offload`), on so many devices. Raises InputError."""
    pins: dict[str, Pin] = {}
    for name, given in fixed.items():
        where = f"{OPTION} {name}={given}"
        try:
            chosen = read_choice(given, devices)
        except InputError as error:
            raise InputError([replace(problem, where=where) for problem in error.problems]) from error
        place = None
        if "@" in given:
            place = range(chosen.ranks[0], chosen.ranks[-1] + 1)
            if chosen.ranks != tuple(place):
                message = "the search places calls on runs of devices, such as @0-7; give --layout for others"
                raise InputError(Problem(message, where=where))
        pins[name] = Pin(chosen.layout, place, Wishes(flags=chosen.flags), where)
    return pins


def check_pins(models: Models, cluster: Cluster, ask: Ask) -> list[Problem]:
    """What is wrong with pins, each by itself."""
    problems = []
    names = [call.name for call in models.graph.calls]
    for name, pin in ask.pins.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            message = f"the graph has no call {name}{hint} (calls: {', '.join(names)})"
        else:
            message = _problem(models, cluster, models.graph.call(name), pin)
        if message:
            problems.append(Problem(message, where=pin.text))
    return problems


def _problem(models: Models, cluster: Cluster, call: Call, pin: Pin) -> str:
    """Why a call cannot run as it is pinned; empty where it can."""
    if call.model is None:
        return f"{call.name} is a function: it takes no device, and nothing of it can be fixed"
    for word in words_of(pin.wishes.flags):
        if call.op != "train" and FLAGS[word][0] in OF_TRAINING:
            return f"only train calls have {word}, and {call.name} is {call.op}: remove it"
    if pin.wishes.flags.get("after") == "free" and (
        call.op == "train" or call.model not in models.graph.trained()
    ):
        return (
            f"no reallocation brings {call.name}'s weights again, so that they cannot be freed: use offload"
        )
    layout = pin.layout
    if layout is None:
        return ""
    reasons = models.refusals(call.model, layout)
    if reasons:
        return f"{layout} cannot cut {call.model}: {'; '.join(reasons)}"
    most = most_replicas(models.graph, call)
    if layout.dp > most:
        return _too_many(models, call, layout.dp, most)
    return _across_nodes(cluster, pin)


def _across_nodes(cluster: Cluster, pin: Pin) -> str:
    """Why no node can hold a tensor group of a pin; empty where one can."""
    assert pin.layout is not None
    tensor = pin.layout.tp
    if pin.place is not None:
        starts = range(pin.place.start, pin.place.stop, tensor)
        nodes = [index for index, node in enumerate(cluster.nodes) for _ in range(node.devices)]
        if any(nodes[start] != nodes[start + tensor - 1] for start in starts):
            return f"tensor groups lie inside a node, but those of t{tensor} from rank {starts[0]} on do not"
    elif all(node.devices % tensor and node.devices < pin.layout.size for node in cluster.nodes):
        return f"tensor groups lie inside a node: t{tensor} does not divide the devices of one"
    return ""


def _too_many(models: Models, call: Call, replicas: int, most: int) -> str:
    """More replicas than a step has work for."""
    graph = models.graph
    if call.op == "generate":
        have, need = f"{graph.prompts} prompt{'s' * (graph.prompts > 1)} a step", f"{replicas} prompts"
    elif call.whole_groups:
        have = f"{most} prompt{'s' * (most > 1)} in each minibatch, whose samples stay together"
        need = f"{replicas * call.minibatches} prompts"
    else:
        have = f"{most} samples in each minibatch"
        need = f"{-(-replicas * call.minibatches // graph.samples)} prompts"
    return (
        f"{call.name} has {have}, too few for {replicas} replicas: d{most} is the most that have "
        f"something to do; or give at least {need}"
    )
