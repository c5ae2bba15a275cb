"""Broken plan files are refused with their lines."""

from __future__ import annotations

import dataclasses

import pytest
from small_plans import plain_plan

from realflow.errors import InputError
from realflow.planfile import (
    check_plan,
    parse_plan,
    plan_to_yaml,
)

# What is replaced in the file, by what, the line's text that must be named, and words of the message.
_NODE = "    - {name: local, devices: 3, kind: cpu, memory_bytes: null}"
_REALLOC = """  - model: actor
    source: train
    destination: rollout
    bytes: 200
    lower_bound_bytes: 200
    predicted_seconds: null
"""
BROKEN = {
    "unknown key": (
        "format: 1",
        "format: 1\nreallcos: []",
        "reallcos: []",
        "unknown key 'reallcos'; did you mean 'reallocs'",
    ),
    "unknown key of a call": (
        "    slots: 32",
        "    slot: 32",
        "    slot: 32",
        "unknown key 'slot'; did you mean 'slots'",
    ),
    "wrong format": ("format: 1", "format: 9", "format: 9", "this version reads 1"),
    "rank outside": (
        "    ranks: [0, 1]",
        "    ranks: [0, 7]",
        "    ranks: [0, 7]",
        "rank 7 is outside the cluster",
    ),
    "rank twice": ("    ranks: [0, 1]", "    ranks: [0, 0]", "    ranks: [0, 0]", "rank 0 is given twice"),
    "negative rank": (
        "    ranks: [0, 1]",
        "    ranks: [0, -1]",
        "    ranks: [0, -1]",
        "expected ranks, such as",
    ),
    "ranks that are text": (
        "    ranks: [0, 1]",
        "    ranks: all",
        "    ranks: all",
        "expected ranks, such as",
    ),
    "no ranks": ("    ranks: [0, 1]", "    ranks: []", "    ranks: []", "expected ranks, such as"),
    "a huge range": (
        "    ranks: [0, 1]",
        "    ranks: 0-9999999",
        "    ranks: 0-9999999",
        "expected ranks, such as",
    ),
    "layout of other size": (
        "layout: d2t1p1",
        "layout: d3t1p1",
        "layout: d3t1p1",
        "d3t1p1 needs 3 ranks, but 2 are given",
    ),
    "layout that is none": ("layout: d2t1p1", "layout: 2x2", "layout: 2x2", "expected letters with sizes"),
    "layout that is a number": ("layout: d2t1p1", "layout: 2", "layout: 2", "expected letters with sizes"),
    "ranks that fall": (
        "    ranks: [0, 1]",
        "    ranks: [1, 0]",
        "    ranks: [1, 0]",
        "expected rising ranks: 0-1",
    ),
    "a function in parts": (
        "ranks: [0]\n    layout: d1t1p1",
        "ranks: [0, 1]\n    layout: d1t2p1",
        "layout: d1t2p1",
        "d1t2p1 cuts a model, but reward is a function: use d2",
    ),
    "expert parallel": ("layout: d2t1p1", "layout: d1e2", "layout: d1e2", "reserved and cannot run yet"),
    "context parallel": ("layout: d2t1p1", "layout: d1c2", "layout: d1c2", "reserved and cannot run yet"),
    "unknown engine": ("engine: native", "engine: natvie", "engine: natvie", "did you mean 'native'"),
    "wrong engine": (
        "engine: native",
        "engine: train",
        "engine: train",
        "train cannot run op generate; expected native or vllm",
    ),
    "engine to come": ("engine: native", "engine: vllm", "engine: vllm", "vllm cannot run yet"),
    "unknown after": (
        "    slots: 32\n    after: keep",
        "    slots: 32\n    after: offlaod",
        "    after: offlaod",
        "expected one of keep, free, offload; did you mean 'offload'?",
    ),
    "a function that offloads": (
        "engine: python",
        "engine: python\n    after: offload",
        "after: offload",
        "reward is a function and holds no weights: use keep",
    ),
    "freed and not trained": (
        "engine: infer\n    micro_batch_tokens: 4096\n    after: keep",
        "engine: infer\n    micro_batch_tokens: 4096\n    after: free",
        "after: free",
        "ref is not trained, so that no reallocation brings its weights again; use keep or offload",
    ),
    "freed by training": (
        "engine: train\n    micro_batch_tokens: 4096\n    after: keep",
        "engine: train\n    micro_batch_tokens: 4096\n    after: free",
        "after: free",
        "train has the newest weights of actor, which other calls get from it",
    ),
    "freed where training keeps": (
        "ranks: [0, 1]\n    layout: d2t1p1\n    engine: native\n    micro_batch_tokens: 4096\n    slots: 32\n"
        "    after: keep",
        "ranks: [2]\n    layout: d1t1p1\n    engine: native\n    micro_batch_tokens: 4096\n    slots: 32\n"
        "    after: free",
        "after: free",
        "rollout uses the very weights that train trains",
    ),
    "unknown schedule": (
        'schedule: "1f1b"',
        "schedule: 1f2b",
        "schedule: 1f2b",
        "expected one of 1f1b, zero_bubble; did you mean '1f1b'?",
    ),
    "zero bubble without stages": (
        'schedule: "1f1b"',
        "schedule: zero_bubble",
        "schedule: zero_bubble",
        "zero_bubble fills the gaps of a pipeline, and d1t1p1 has none: use 1f1b",
    ),
    "sequence parallel alone": (
        "sequence_parallel: false",
        "sequence_parallel: true",
        "sequence_parallel: true",
        "sequence_parallel divides tokens over a tensor group, and d1t1p1 has none: leave it out",
    ),
    "recompute as text": (
        "recompute: false",
        "recompute: maybe",
        "recompute: maybe",
        "expected true or false",
    ),
    "a rollout that recomputes": (
        "engine: native",
        "engine: native\n    recompute: true",
        "recompute: true",
        "only train calls have it, and rollout is generate: use false",
    ),
    "a schedule of inference": (
        "engine: infer",
        "engine: infer\n    schedule: zero_bubble",
        "schedule: zero_bubble",
        "only train calls have it, and ref is infer: use 1f1b",
    ),
    "slots of 0": ("    slots: 32", "    slots: 0", "    slots: 0", "expected a whole number >= 1"),
    "tokens as text": (
        "micro_batch_tokens: 4096",
        "micro_batch_tokens: many",
        "    micro_batch_tokens: many",
        "expected a whole number",
    ),
    "missing call": (
        "  credit:",
        "  credti:",
        "calls:",
        "calls: is missing; every call of the graph needs ranks",
    ),
    "unknown call": (
        "  credit:",
        "  credti:",
        "  credti:",
        "the graph has no call credti; did you mean credit?",
    ),
    "a call twice": ("  credit:", "  reward:", None, "given twice"),
    "a missing layout": ("    layout: d2t1p1\n", "", "  rollout:", "'layout' is missing"),
    "missing realloc": (
        _REALLOC,
        "  []\n",
        "reallocs:",
        "actor from train to rollout is missing: rollout (d2t1p1 on 0-1) lacks weights that train (d1t1p1 on",
    ),
    "realloc not needed": (
        "destination: rollout",
        "destination: ref",
        "  - model: actor",
        "actor from train to ref is not needed: ref uses the model ref; remove it from reallocs",
    ),
    "realloc to an unknown call": (
        "destination: rollout",
        "destination: rolout",
        "  - model: actor",
        "is not needed: the graph has no call rolout (calls: ",
    ),
    "realloc from another call": (
        "source: train",
        "source: ref",
        "  - model: actor",
        "new weights of actor come from train, not from ref",
    ),
    "realloc of a model that nothing trains": (
        "- model: actor",
        "- model: ref",
        "  - model: ref",
        "is not needed: no call trains ref",
    ),
    "realloc to a model that does not follow": (
        "destination: rollout",
        "follower: ref",
        "  - model: actor",
        "actor from train to ref, which follows it, is not needed: ref does not follow actor in the graph",
    ),
    "bytes below the bound": (
        "    bytes: 200",
        "    bytes: 100",
        "  - model: actor",
        "bytes 100 is below lower_bound_bytes 200",
    ),
    "no nodes": (
        _NODE,
        "    []",
        "cluster:",
        "has no nodes; expected such as {name: local, devices: 2, kind: cpu}",
    ),
    "devices as text": (
        "devices: 3",
        "devices: three",
        _NODE.replace("3", "three"),
        "expected a whole number from 1 to 4096",
    ),
    "a link that carries nothing": (
        "memory_bytes: null}",
        "memory_bytes: null, inside: 0}",
        _NODE.replace("null}", "null, inside: 0}"),
        "expected bytes a second, more than 0, or null",
    ),
    "too many devices": ("devices: 3", "devices: 1000000000", None, "expected a whole number from 1 to 4096"),
    "graph broken": (
        "steps: 45\n  seed",
        "steps: 0\n  seed",
        "  steps: 0",
        "graph.steps: found 0, expected a whole number >= 1",
    ),
    "seconds below 0": (
        "step_seconds: null",
        "step_seconds: -1",
        "  step_seconds: -1",
        "expected a number of at least 0, or null",
    ),
    "memory of another rank": (
        "  0: {weights: 5}",
        "  9: {weights: 5}",
        "memory:",
        "rank 9 is outside the cluster",
    ),
    "an unknown cause of memory": (
        "  0: {weights: 5}",
        "  0: {wieghts: 5}",
        "  0: {wieghts: 5}",
        "memory.0.wieghts: unknown key 'wieghts'; did you mean 'weights'?",
    ),
    "a hash without quotes": (
        "cards: {}",
        "cards: {actor: 1234567890123456}",
        "cards: {actor: 1234567890123456}",
        'expected a hash in quotes, such as "0123456789abcdef"; put it in quotes, else YAML',
    ),
    "memory twice": (
        "  0: {weights: 5}",
        "  0: {weights: 5}\n  0-1: {weights: 5}",
        "  0-1: {weights: 5}",
        "has a row already",
    ),
    "memory as text": (
        "  0: {weights: 5}",
        "  0: {weights: much}",
        "  0: {weights: much}",
        "a whole number of bytes",
    ),
    "duplicate key": ("format: 1", "format: 1\nformat: 1", None, "given twice"),
    "alias": ("format: 1", "format: &a 1", None, "anchors are not read"),
    "no graph": ("graph:\n", "graf:\n", None, "'graph' is missing"),
    "deadline of 0": ("factor: 20.0", "factor: 0", "  factor: 0", "expected more than 0"),
    "not a mapping": (None, "- 1\n- 2\n", "- 1", "expected a plan file"),
    "empty": (None, "", None, "expected a plan file"),
    "deep": (None, "[" * 100_000, None, "levels deep"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plans(case: str) -> None:
    old, new, line, message = BROKEN[case]
    text = plan_to_yaml(plain_plan())
    if old is None:
        text = new
    else:
        assert old in text, "the table no longer fits the format"
        text = text.replace(old, new, 1)
    with pytest.raises(InputError) as caught:
        parse_plan(text, file="plan.yaml")
    assert message in str(caught.value)
    problem = next(problem for problem in caught.value.problems if message in str(problem))
    assert problem.file == "plan.yaml"
    if line is not None:
        assert problem.line is not None
        assert text.splitlines()[problem.line - 1].strip() == line.strip()


def test_all_problems_are_told_together() -> None:
    text = plan_to_yaml(plain_plan())
    for old, new in (
        ("layout: d2t1p1", "layout: d3t1p1"),
        ("engine: python", "engine: cobra"),
        ("ranks: [2]", "ranks: [8]"),
    ):
        text = text.replace(old, new, 1)
    with pytest.raises(InputError) as caught:
        parse_plan(text)
    assert len(caught.value.problems) == 3
    lines = [problem.line for problem in caught.value.problems]
    assert lines == sorted(lines)


def test_a_plan_made_by_hand_is_checked() -> None:
    check_plan(plain_plan())
    broken = dataclasses.replace(plain_plan(), reallocs=())
    with pytest.raises(InputError, match=r"actor from train to rollout is missing: .* add this line"):
        check_plan(broken)


def test_the_line_that_a_missing_move_is_told_with_mends_the_file() -> None:
    text = plan_to_yaml(plain_plan())
    with pytest.raises(InputError) as caught:
        parse_plan(text.replace(_REALLOC, "  []\n", 1))
    (problem,) = caught.value.problems
    line = problem.message.partition("realflow plan: ")[2]
    assert parse_plan(text.replace(_REALLOC, f"  {line}\n", 1)).reallocs[0].destination == "rollout"


def test_an_unknown_key_is_told_alone() -> None:
    """What seems to lack may lie under it."""
    text = plan_to_yaml(plain_plan()).replace("\nreallocs:", "\nreallcos:", 1)
    with pytest.raises(InputError) as caught:
        parse_plan(text)
    (problem,) = caught.value.problems
    assert "unknown key 'reallcos'; did you mean 'reallocs'?" in problem.message
