"""Graphs and plans built by hand, for tests of the runtime that need no files."""

from __future__ import annotations

from realflow.graph.types import (
    Call,
    DataSpec,
    FieldUse,
    FunctionDecl,
    Graph,
    ModelSpec,
    OptimizerSpec,
    Sampling,
)
from realflow.layout import Layout
from realflow.planfile import CallPlan, Cluster, Node, Plan, ReallocPlan

GENERATED = (
    FieldUse("tokens", "tokens", "token", "int"),
    FieldUse("logprobs", "logprobs", "token", "float"),
    FieldUse("completion", "completion", "sample", "text"),
    FieldUse("loss_mask", "loss_mask", "token", "bool"),
)


def _call(
    name: str, op: str, reads: tuple[FieldUse, ...], writes: tuple[FieldUse, ...], **more: object
) -> Call:
    scope = more.pop("scope", "sample")
    kind = {"function": "function", "train": "loss", "infer": "output", "generate": "function"}[op]
    decl = FunctionDecl(name, kind, reads, writes, scope=scope)  # type: ignore[arg-type]
    return Call(
        name,
        op,  # type: ignore[arg-type]
        decl,
        reads={use.name: use.field for use in reads},
        writes={use.name: use.field for use in writes},
        **more,  # type: ignore[arg-type]
    )


def grpo(
    *, steps: int = 3, prompts: int = 4, samples: int = 2, minibatches: int = 2, evaluate: int | None = None
) -> Graph:
    """rollout -> reward -> credit -> train, with a reference model, and perhaps a periodic call."""
    tokens, logprobs = GENERATED[0], GENERATED[1]
    rewards = FieldUse("rewards", "rewards", "sample", "float")
    advantages = FieldUse("advantages", "advantages", "sample", "float")
    reference = FieldUse("ref_logprobs", "ref_logprobs", "token", "float")
    calls = [
        _call("rollout", "generate", (), GENERATED, model="actor", samples=samples, sampling=Sampling(8)),
        _call("reward", "function", (GENERATED[2],), (rewards,)),
        _call("ref", "infer", (tokens,), (reference,), model="ref"),
        _call("credit", "function", (rewards,), (advantages,), scope="group"),
        _call(
            "train",
            "train",
            (tokens, logprobs, advantages, reference),
            (),
            model="actor",
            minibatches=minibatches,
        ),
    ]
    if evaluate is not None:
        count = FieldUse("count", "count", "sample", "float")
        calls.append(_call("audit", "function", (rewards,), (count,), scope="batch", every=evaluate))
    written = [use for call in calls for use in call.decl.writes]
    return Graph(
        name="scene",
        models={
            "actor": ModelSpec("actor", "tiny", optimizer=OptimizerSpec()),
            "ref": ModelSpec("ref", "tiny"),
        },
        data=DataSpec("jsonl", {"prompt": "prompt"}),
        calls=tuple(calls),
        steps=steps,
        prompts=prompts,
        samples=samples,
        extents={use.field: use.extent for use in written},
        dtypes={use.field: use.dtype for use in written},
    )


def place(graph: Graph, devices: int, ranks: dict[str, tuple[int, ...]], **more: object) -> Plan:
    """A plan with every call data parallel on the ranks given (default: all)."""
    everyone = tuple(range(devices))
    engines = {"generate": "native", "train": "train", "infer": "infer", "function": "python"}
    calls = {
        call.name: CallPlan(
            ranks.get(call.name, everyone),
            Layout(dp=len(ranks.get(call.name, everyone))),
            engines[call.op],  # type: ignore[arg-type]
            slots=2,
        )
        for call in graph.calls
    }
    reallocs = tuple(
        ReallocPlan(str(call.model), train.name, call.name, 1, 1)
        for model, train in graph.trained().items()
        for call in graph.calls
        if call.model == model
        and call.name != train.name
        and set(calls[call.name].ranks) - set(calls[train.name].ranks)
    )
    return Plan(graph, Cluster((Node("local", devices),)), calls, reallocs=reallocs, **more)  # type: ignore[arg-type]
