"""Graphs and plans built by hand, for tests of the runtime that need no files."""

from __future__ import annotations

from dataclasses import replace

from realflow.graph.evaluate import EVAL, SCORE
from realflow.graph.refill import REFILL
from realflow.graph.types import (
    Call,
    DataSpec,
    Evaluate,
    FieldUse,
    FunctionDecl,
    Graph,
    ModelSpec,
    OptimizerSpec,
    Refill,
    Sampling,
)
from realflow.layout import Layout
from realflow.planfile import CallPlan, Cluster, Node, Plan, needed_reallocs

GENERATED = (
    FieldUse("tokens", "tokens", "token", "int"),
    FieldUse("logprobs", "logprobs", "token", "float"),
    FieldUse("completion", "completion", "sample", "text"),
    FieldUse("loss_mask", "loss_mask", "token", "bool"),
)


def _call(
    name: str, op: str, reads: tuple[FieldUse, ...], writes: tuple[FieldUse, ...], **more: object
) -> Call:
    scope, renamed = more.pop("scope", "sample"), more.pop("renamed", "{}")
    state = more.pop("state", {})
    kind = {"function": "function", "train": "loss", "infer": "output", "generate": "function"}[op]
    decl = FunctionDecl(name, kind, reads, writes, scope=scope, state=state)  # type: ignore[arg-type]
    return Call(
        name,
        op,  # type: ignore[arg-type]
        decl,
        reads={use.name: use.field for use in reads},
        writes={use.name: str(renamed).format(use.field) for use in writes},
        **more,  # type: ignore[arg-type]
    )


def grpo(
    *,
    steps: int = 3,
    prompts: int = 4,
    samples: int = 2,
    minibatches: int = 2,
    evaluate: int | None = None,
    second: int | None = None,
    train_every: int | None = None,
    probe: str | None = None,
    keeps: int | None = None,
    refill: int | None = None,
    graded: str | None = None,
    examine: int | None = None,
    keep_best: bool = False,
) -> Graph:
    """rollout -> reward -> credit -> train, with a reference model.

    `evaluate` is the period of a call that reads rewards, `second` that of another rollout `greedy`
    (its fields have other names) with a call `grade` that reads its text, in the order of the graph
    before everything else; `train_every` that of training. `probe` is the model of a call of that name
    that infers on the rollout's tokens, and whose results nobody reads. `keeps` is the period of a call
    `adapt` that keeps, from step to step, in which steps it has run. `refill` is in how many rounds groups
    may be replaced, by their rewards and, where `graded` names a model, by what it infers too. `examine`
    is the period of an evaluation of 5 prompts with 3 samples each, with `keep_best`.
    """
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
            every=train_every,
        ),
    ]
    if second is not None:
        said = FieldUse("completion", "greedy_completion", "sample", "text")
        grade = FieldUse("grade", "grade", "sample", "float")
        more = {"model": "actor", "samples": samples, "sampling": Sampling(8, temperature=0), "every": second}
        calls.insert(0, _call("greedy", "generate", (), GENERATED, renamed="greedy_{}", **more))
        calls.insert(1, _call("grade", "function", (said,), (grade,), every=second))
    if evaluate is not None:
        count = FieldUse("count", "count", "sample", "float")
        calls.append(_call("audit", "function", (rewards,), (count,), scope="batch", every=evaluate))
    if probe is not None:
        probed = FieldUse("probed", "probed", "token", "float")
        calls.append(_call("probe", "infer", (tokens,), (probed,), model=probe))
    judged = (rewards,)
    if graded is not None:
        graded_by = FieldUse("graded", "graded", "sample", "float")
        calls.append(_call("judge", "infer", (tokens,), (graded_by,), model=graded))
        judged = (rewards, graded_by)
    if refill is not None:
        stays = FieldUse("mixed", "mixed", "sample", "bool")
        decides = _call(REFILL, "function", judged, (stays,), scope="group")
        at = [call.name for call in calls].index("rollout")
        calls[at] = replace(calls[at], refill=Refill(decides, refill))
    if keeps is not None:
        coef = FieldUse("coef", "coef", "sample", "float")
        more = {"scope": "batch", "every": keeps, "state": {"steps": []}}
        calls.append(_call("adapt", "function", (rewards,), (coef,), **more))
    written = {call.writes[use.name]: use for call in calls for use in call.decl.writes}
    spec = None if examine is None else Evaluate(examine, keep_best, _examination(steps))
    return Graph(
        evaluate=spec,
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
        extents={field: use.extent for field, use in written.items()},
        dtypes={field: use.dtype for field, use in written.items()},
    )


def _examination(steps: int) -> Graph:
    draws = _call(EVAL, "generate", (), GENERATED, renamed=f"{EVAL}.{{}}", model="actor", samples=3,
                  sampling=Sampling(8))  # fmt: skip
    said = FieldUse("completion", f"{EVAL}.completion", "sample", "text")
    scores = _call(SCORE, "function", (said,), ())
    fields = {draws.writes[use.name]: use for use in GENERATED}
    return Graph(
        name="scene",
        models={"actor": ModelSpec("actor", "tiny")},
        data=DataSpec("jsonl", {"prompt": "prompt"}),
        calls=(draws, scores),
        steps=steps,
        prompts=5,
        samples=3,
        extents={field: use.extent for field, use in fields.items()},
        dtypes={field: use.dtype for field, use in fields.items()},
    )


def place(
    graph: Graph,
    devices: int,
    ranks: dict[str, tuple[int, ...]],
    layouts: dict[str, str] | None = None,
    after: dict[str, str] | None = None,
    **more: object,
) -> Plan:
    """A plan with every call on the ranks given (default: all), data parallel unless `layouts` says more."""
    everyone, layouts, after = tuple(range(devices)), layouts or {}, after or {}
    engines = {"generate": "native", "train": "train", "infer": "infer", "function": "python"}
    calls = {
        call.name: CallPlan(
            ranks.get(call.name, everyone),
            Layout.parse(layouts.get(call.name, f"d{len(ranks.get(call.name, everyone))}")),
            engines[call.op],  # type: ignore[arg-type]
            slots=2,
            after=after.get(call.name, "keep"),  # type: ignore[arg-type]
        )
        for call in graph.calls
    }
    reallocs = tuple(
        replace(realloc, bytes=len(edge.destinations), lower_bound_bytes=len(edge.destinations))
        for realloc, edge in needed_reallocs(graph, calls)
    )
    return Plan(graph, Cluster((Node("local", devices),)), calls, reallocs=reallocs, **more)  # type: ignore[arg-type]
