"""Plan files: what is written is read back exactly, and broken ones are refused with their lines."""

from __future__ import annotations

import dataclasses
import itertools
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from realflow.errors import InputError
from realflow.graph import find_graph, load_graph
from realflow.layout import Layout
from realflow.planfile import (
    CallPlan,
    Cluster,
    Node,
    Plan,
    ReallocPlan,
    TimelineEntry,
    check_plan,
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

GRAPHS = {name: load_graph(find_graph(name)) for name in ("grpo", "sft")}

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


def plain_plan() -> Plan:
    """grpo with rollout on ranks 0 and 1, training and ref on 2."""
    graph = GRAPHS["grpo"]
    where = {"rollout": (0, 1), "train": (2,), "ref": (2,)}
    calls = {
        call.name: CallPlan(
            where.get(call.name, (0,)), Layout(dp=len(where.get(call.name, (0,)))), ENGINES_OF[call.op][0]
        )
        for call in graph.calls
    }
    reallocs = (ReallocPlan("actor", "train", "rollout", 200, 200),)
    return Plan(graph, Cluster((Node("local", 3),)), calls, reallocs=reallocs, memory={0: {"weights": 5}})


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


def test_a_file_says_that_params_are_settled() -> None:
    head, _, graph = plan_to_yaml(plain_plan()).partition("\ngraph:\n")
    assert "params" in graph and head.endswith("editing them changes nothing.")
