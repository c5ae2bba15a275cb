"""Plan files: what is written is read back exactly, and the rules of calls."""

from __future__ import annotations

import dataclasses
import itertools
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from small_plans import GRAPHS, plain_plan

from realflow.errors import InputError
from realflow.layout import Layout
from realflow.planfile import (
    CallPlan,
    Cluster,
    Node,
    Plan,
    TimelineEntry,
    idle_ranks,
    needed_reallocs,
    parse_plan,
    plan_to_yaml,
    read_plan,
    write_plan,
)
from realflow.planfile.check import ENGINES_OF, SCHEDULES, rule_problems
from realflow.planfile.ranks import format_ranks, parse_ranks
from realflow.planfile.types import CAUSES

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
words = st.text(string.ascii_letters + string.digits + "_-. 1e:#'\"", min_size=1, max_size=12).filter(
    str.strip
)
names = st.sampled_from(
    ["node01", "on", "1e-5", "0x1f", "null", "gpu-a.cluster", "ü", "~", "12", "a b", "yes"]
)
speeds = st.none() | st.floats(1e3, 1e13)
seconds = st.none() | st.floats(0, 1e9)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)
)


def layouts_of(size: int) -> list[Layout]:
    """Every layout of so many ranks."""
    return [
        Layout(size // (tp * pp), tp, pp)
        for tp in range(1, size + 1)
        for pp in range(1, size + 1)
        if size % (tp * pp) == 0
    ]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that may run: every graph, cluster, set of ranks, number and text."""
    graph = GRAPHS[draw(st.sampled_from(sorted(GRAPHS)))]
    nodes = [
        Node(
            name,
            draw(st.integers(1, 24)),
            draw(st.sampled_from(["cpu", "cuda"])),
            draw(st.none() | st.integers(1, 2**50)),
            draw(speeds),
            draw(speeds),
        )
        for name in draw(st.lists(names, min_size=1, max_size=3, unique=True))
    ]
    world = sum(node.devices for node in nodes)
    rank_sets = st.lists(st.integers(0, world - 1), min_size=1, max_size=20, unique=True).map(
        lambda ranks: tuple(sorted(ranks))
    )
    calls = {}
    for call in graph.calls:
        ranks = draw(rank_sets)
        layout = Layout(dp=len(ranks))
        if call.op != "function":
            layout = draw(st.sampled_from(layouts_of(len(ranks))))
        flags = {}
        if call.op == "train":
            flags = {
                "schedule": draw(st.sampled_from(SCHEDULES)) if layout.pp > 1 else "1f1b",
                "recompute": draw(st.booleans()),
                "sequence_parallel": layout.tp > 1 and draw(st.booleans()),
            }
        calls[call.name] = CallPlan(
            ranks=ranks,
            layout=layout,
            after=draw(st.sampled_from(["keep", "offload"])) if call.op != "function" else "keep",
            **flags,
            engine=ENGINES_OF[call.op][0],
            micro_batch_tokens=draw(st.integers(1, 2**20)),
            slots=draw(st.integers(1, 100)),
            predicted_seconds=draw(seconds),
        )
    reallocs = [
        dataclasses.replace(
            realloc, bytes=count + 7, lower_bound_bytes=count, predicted_seconds=draw(seconds)
        )
        for count, (realloc, _) in enumerate(needed_reallocs(graph, calls))
    ]
    causes = st.dictionaries(st.sampled_from(CAUSES), st.integers(0, 2**50), max_size=3)
    start = draw(st.floats(0, 1e3))
    return Plan(
        graph=graph,
        cluster=Cluster(tuple(nodes)),
        calls=calls,
        cards=dict.fromkeys(graph.models, "1234567890123456"),
        reallocs=tuple(reallocs),
        memory=(memory := draw(st.dictionaries(st.integers(0, world - 1), causes, max_size=6))),
        moments={rank: draw(words) for rank in memory if draw(st.booleans())},
        timeline=tuple(
            TimelineEntry(what, draw(rank_sets), start, start + 1)
            for what in draw(st.lists(words, max_size=2))
        ),
        step_seconds=draw(seconds),
        gap=draw(seconds),
        deadline_factor=draw(st.floats(1, 100)),
        deadline_floor_seconds=draw(st.floats(0.5, 1e5)),
        hashes=draw(st.dictionaries(words, words, max_size=2)),
        notes=tuple(draw(st.lists(texts, max_size=3))),
        extra=draw(st.dictionaries(words, values, max_size=3)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans())
def test_what_is_written_is_read_back(plan: Plan) -> None:
    text = plan_to_yaml(plan)
    assert parse_plan(text) == plan
    assert plan_to_yaml(parse_plan(text)) == text


@given(st.lists(st.integers(0, 10**5), min_size=1, max_size=30).map(tuple))
def test_ranks_roundtrip(ranks: tuple[int, ...]) -> None:
    assert parse_ranks(format_ranks(ranks)) == ranks


@pytest.mark.parametrize(
    "text", ["", "a", "1-", "3-1", "-1", "1,,2", "0-99999999", "1 2", "0-131071,0-131071"]
)
def test_texts_that_are_no_ranks(text: str) -> None:
    assert parse_ranks(text) is None


def test_a_file_is_written_and_read(tmp_path: Path) -> None:
    path = write_plan(plain_plan(), tmp_path / "plan.yaml")
    assert read_plan(path) == plain_plan()
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.yaml"], "nothing is left beside it"
    with pytest.raises(InputError, match="cannot be written"):
        write_plan(plain_plan(), tmp_path / "missing" / "plan.yaml")


def test_a_cluster_of_a_thousand_devices_fits_a_file() -> None:
    graph, world = GRAPHS["grpo"], 1024
    ranks = tuple(range(world))
    calls = {call.name: CallPlan(ranks, Layout(dp=world), ENGINES_OF[call.op][0]) for call in graph.calls}
    nodes = tuple(Node(f"n{index}", 8, "cuda") for index in range(world // 8))
    plan = Plan(graph, Cluster(nodes), calls, memory={rank: {"weights": 1} for rank in ranks})
    text = plan_to_yaml(plan)
    assert parse_plan(text) == plan
    assert len(text) < 20_000


def test_idle_ranks() -> None:
    assert idle_ranks(plain_plan()) == ()
    assert idle_ranks(dataclasses.replace(plain_plan(), cluster=Cluster((Node("local", 5),)))) == (3, 4)


layouts = st.builds(Layout, st.integers(1, 2), st.integers(1, 2), st.integers(1, 2))


@st.composite
def any_calls(draw: st.DrawFn) -> CallPlan:
    """Calls of which many keep the rules."""
    layout = draw(layouts)
    rising = st.lists(st.integers(0, 3), min_size=min(layout.size, 4), max_size=layout.size, unique=True).map(
        sorted
    )
    ranks = draw(rising | rising | rising | st.lists(st.integers(0, 4), min_size=1, max_size=4))
    return CallPlan(
        tuple(ranks),
        layout,
        "native",
        after=draw(st.sampled_from(["keep", "offload", "free", "free"])),
        schedule=draw(st.sampled_from(["1f1b", *SCHEDULES])),
        recompute=draw(st.sampled_from([False, False, True])),
        sequence_parallel=draw(st.sampled_from([False, False, True])),
    )


def keeps_rules(name: str, op: str, call: CallPlan, train: CallPlan) -> bool:
    """The rules of one call of grpo on 4 devices, said once more."""
    size = call.layout.dp * call.layout.tp * call.layout.pp
    if (
        len(call.ranks) != size
        or any(a >= b for a, b in itertools.pairwise(call.ranks))
        or max(call.ranks) > 3
    ):
        return False
    if op == "train":
        bubble = call.schedule == "1f1b" or call.layout.pp == 2
        return call.after != "free" and bubble and (call.layout.tp == 2 or not call.sequence_parallel)
    if call.schedule != "1f1b" or call.recompute or call.sequence_parallel:
        return False
    if op == "function":
        return call.layout.tp == call.layout.pp == 1 and call.after == "keep"
    if call.after != "free":
        return True
    sized = (call.layout.tp, call.layout.pp) == (train.layout.tp, train.layout.pp)

    def at(where: CallPlan, rank: int) -> tuple[int, int]:
        index, layout = where.ranks.index(rank), where.layout
        return index % layout.tp, index // (layout.tp * layout.dp)

    inside = set(call.ranks) <= set(train.ranks)
    return name == "rollout" and not (
        sized and inside and all(at(call, r) == at(train, r) for r in call.ranks)
    )


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["rollout", "reward", "ref", "train"]), any_calls(), layouts)
def test_rules_of_calls_are_these_and_no_others(name: str, call: CallPlan, trained: Layout) -> None:
    graph = GRAPHS["grpo"]
    train = CallPlan(tuple(range(trained.size))[:4], trained, "train")
    if trained.size > 4:
        train = CallPlan((0, 1), Layout(dp=2), "train")
    calls = {other.name: CallPlan((0,), Layout(), ENGINES_OF[other.op][0]) for other in graph.calls}
    op = graph.call(name).op
    calls |= {"train": train, name: dataclasses.replace(call, engine=ENGINES_OF[op][0])}
    plan = Plan(graph, Cluster((Node("local", 4),)), calls)
    event(f"{name} keeps them: {keeps_rules(name, op, call, calls['train'])}")
    assert (rule_problems(plan) == []) == keeps_rules(name, op, call, calls["train"])


def test_a_file_says_that_params_are_settled() -> None:
    head, _, graph = plan_to_yaml(plain_plan()).partition("\ngraph:\n")
    assert "params" in graph and head.endswith("editing them changes nothing.")
