"""Why nothing fits, and the smallest change that would: for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from planner.hardware import node_device
from planner.options.build import build
from planner.options.models import Models
from planner.options.values import Ask, Least, Pin, TooLarge
from planner.search import Infeasible, Work, solve
from realflow.errors import InputError, Problem
from realflow.graph.types import Call, Graph
from realflow.planfile import Cluster, Node
from realflow.planfile.flags import FLAGS

DOUBLINGS = 7
"""How often the devices are doubled at most, to see whether more of them would do."""
HALVINGS = 4
"""How often responses are halved at most."""
MEMORIES = (1.0625, 1.125, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)
"""Times the memory that devices are tried with."""
FULL = 8
"""Devices of a full node."""
TRIED = Work(solver=1.0, rounds=300)
"""What the search for a plan that fits may do."""


def refuse_call(models: Models, cluster: Cluster, ask: Ask, error: TooLarge) -> InputError:
    """A call fits into no device, however it is cut."""
    least = error.least
    causes = {"weights": least.needed.weights, **least.needed.own}
    for cause, size in least.needed.active.items():
        causes[cause] = causes.get(cause, 0) + size
    cause, size = max(causes.items(), key=lambda item: item[1])
    total = sum(causes.values())
    words = _words(least, models.graph.call(error.call).op == "generate")
    message = (
        f"{error.call} does not fit into any device, whatever its layout: even {words} needs "
        f"{_gib(total)}, most of it {cause} ({_gib(size)}), and a {least.kind} device has {_gib(least.room)} "
        f"for calls: {_gib(total - least.room)} too few"
    )
    return InputError(Problem(f"{message}. {_change(models, cluster, ask)}", where=_where(ask, error.call)))


def refuse_together(models: Models, cluster: Cluster, ask: Ask, error: Infeasible) -> InputError:
    """Calls fit one by one, but not together."""
    pinned = [ask.pins[name].text for name in error.calls if name in ask.pins]
    names = " and ".join(error.calls)
    if not error.short:
        message = f"no plan with {names} was found that fits; give it more effort (--effort high)"
        return InputError(Problem(message, where="memory"))
    message = f"{names} do not fit together: the fullest device lacks {_gib(error.short)}"
    if pinned:
        message += f" with what is fixed ({', '.join(pinned)}); fix less of it"
    return InputError(Problem(f"{message}. {_change(models, cluster, ask)}", where="memory"))


def _where(ask: Ask, call: str) -> str:
    return ask.pins[call].text if call in ask.pins else f"calls.{call}"


def _words(least: Least, generates: bool) -> str:
    way = least.way
    words = [word for word, (key, value) in FLAGS.items()
             if getattr(way, key) == value and word not in ("1f1b", "keep")]  # fmt: skip
    amount = (
        f"{way.slots} slot{'s' * (way.slots != 1)}"
        if generates
        else f"{way.micro_batch_tokens} tokens a micro-batch"
    )
    return f"{way.layout}{':' * bool(words)}{','.join(words)} with {amount}"


def _change(models: Models, cluster: Cluster, ask: Ask) -> str:
    """The smallest change of each kind that would make it fit, in a sentence."""
    found: list[str] = []
    for changes in (_unpinned(ask), _fewer_tokens(models), _more_devices(cluster), _more_memory(cluster)):
        for words, change in changes:
            if _fits(change.get("models", models), change.get("cluster", cluster), change.get("ask", ask)):
                found.append(words)
                break
        if found and ask.pins:
            break  # the least that can change
    if not found:
        return (
            f"No shorter response, no number of such devices and no {MEMORIES[-1]:g} times their memory that "
            "was tried would do: take a smaller model."
        )
    return f"It would fit with {', or with '.join(found)}."


Change = tuple[str, dict[str, object]]


def _fits(models: object, cluster: object, ask: object) -> bool:
    assert isinstance(models, Models) and isinstance(cluster, Cluster) and isinstance(ask, Ask)
    try:
        solve(build(models, cluster, replace(ask, meshes="powers")).problem, work=TRIED)
    except (TooLarge, Infeasible, InputError):
        return False
    return True


def _fewer_tokens(models: Models) -> Iterator[Change]:
    """Shorter responses: by the param, where that is what gives their length."""
    graph = models.graph
    drawn = {call.name: call.sampling.max_new_tokens for call in graph.calls if call.sampling}
    most = max(drawn.values(), default=0)
    is_param = graph.params.get("max_new_tokens") == most
    for halving in range(1, HALVINGS + 1):
        new = most >> halving
        if new >= 16:
            shorter = replace(models, graph=with_new_tokens(graph, new))
            names = " and ".join(name for name, tokens in drawn.items() if tokens > new)
            words = f"max_new_tokens={new}" if is_param else f"{new} as the max_new_tokens of {names}"
            yield words, {"models": shorter}


def with_new_tokens(graph: Graph, new: int) -> Graph:
    """A graph whose rollouts draw at most so many tokens."""

    def cut(call: Call) -> Call:
        if call.sampling is None or call.sampling.max_new_tokens <= new:
            return call
        return replace(call, sampling=replace(call.sampling, max_new_tokens=new))

    return replace(graph, calls=tuple(map(cut, graph.calls)))


def _unpinned(ask: Ask) -> Iterator[Change]:
    """Without what is fixed."""
    if ask.pins:
        yield "nothing fixed (without --fix)", {"ask": replace(ask, pins=dict[str, Pin]())}


def _more_devices(cluster: Cluster) -> Iterator[Change]:
    """Twice as many, again and again: nodes, or devices in the only node while it is not full."""
    total = len(cluster.devices)
    grows = len(cluster.nodes) == 1 and total < FULL
    for doubling in range(1, DOUBLINGS + 1):
        count = total << doubling
        if grows and count > FULL:
            count = -(-count // FULL) * FULL
        yield f"{count} devices like these", {"cluster": resized(cluster, count)}


def _more_memory(cluster: Cluster) -> Iterator[Change]:
    """Devices with more memory, of which the largest is named."""
    sizes = [node_device(node).memory_bytes for node in cluster.nodes]
    known = [size for size in sizes if size is not None]
    for times in MEMORIES if known else ():
        yield (
            f"{_gib_up(max(known), times)} GiB of memory for each device",
            {"cluster": enlarged(cluster, times)},
        )


def _gib_up(size: int, times: float) -> str:
    """So many times a size in GiB: as `enlarged` has it."""
    return f"{_hundredths(size, times) / 100:.2f}"


def _hundredths(size: int, times: float) -> int:
    return math.ceil(size * times * 100 / 2**30)


def enlarged(cluster: Cluster, times: float) -> Cluster:
    """A cluster whose devices have so many times the memory, in hundredths of GiB."""
    nodes = []
    for node in cluster.nodes:
        size = node_device(node).memory_bytes
        more = None if size is None else _hundredths(size, times) * 2**30 // 100
        nodes.append(replace(node, memory_bytes=more))
    return Cluster(tuple(nodes))


def resized(cluster: Cluster, devices: int) -> Cluster:
    """A cluster with another number of devices: of its last kind of node more, or of its first nodes fewer.

    A single node of fewer than `FULL` devices grows to that before there are more. Raises InputError where
    whole nodes do not give that number.
    """
    nodes: list[Node] = []
    left = devices
    for node in cluster.nodes:
        if left >= node.devices:
            nodes.append(node)
            left -= node.devices
    last = cluster.nodes[-1]
    if len(cluster.nodes) == 1 and last.devices < FULL:
        width = min(FULL, devices)
        nodes, left = [replace(last, devices=width)], devices - width
        last = nodes[0]
    if not nodes:
        return Cluster((replace(cluster.nodes[0], devices=devices),))
    while left >= last.devices:
        nodes.append(replace(last, name=f"{last.name}-{len(nodes)}"))
        left -= last.devices
    if left:
        message = f"found {devices}; expected whole nodes of {last.devices} devices"
        raise InputError(Problem(message, where="gpus"))
    return Cluster(tuple(nodes))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
