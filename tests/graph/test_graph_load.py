"""Graphs that are right: what they become, that they survive being written, and at what cost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph, shipped_graphs
from realflow.graph.types import Amount, Graph
from realflow.graph.yamlfile import dump_yaml, parse_yaml

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)
NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True)
NUMBERS = st.floats(0, 1e6, allow_nan=False)


@st.composite
def graphs(draw: st.DrawFn) -> dict:
    """Mappings of graphs that are right: RL with any of its parts, or supervised."""

    def maybe(**values: st.SearchStrategy) -> dict:
        return {key: draw(value) for key, value in values.items() if draw(st.booleans())}

    optimizer = maybe(
        lr=NUMBERS,
        betas=st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
        eps=st.floats(1e-12, 1),
        weight_decay=NUMBERS,
        clip_norm=st.floats(0.1, 9),
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
        warmup_steps=st.integers(0, 9),
        min_lr=st.just(0.0),
    )
    model = {"path": draw(WORDS), **maybe(dtype=st.sampled_from(["float32", "float64"]))}
    train = {
        "model": "actor",
        "op": "train",
        "minibatches": draw(st.sampled_from([1, 2, 4])),
        **maybe(normalise=st.sampled_from(["token", "sequence"])),
    }
    top = {
        "name": draw(NAMES),
        "steps": draw(st.integers(1, 99)),
        **maybe(
            seed=st.integers(0, 2**40),
            max_staleness=st.integers(0, 4),
            params=st.dictionaries(NAMES, WORDS | NUMBERS | st.lists(st.integers()), max_size=3),
            checkpoint=st.just({"every": "3 steps"}),
        ),
    }
    data = {
        "source": "jsonl",
        "path": "/" + draw(WORDS),
        **maybe(shuffle=st.booleans(), unique=WORDS),
    }
    if "unique" in data and draw(st.booleans()):
        data["split"] = {"test": draw(st.floats(0.01, 0.99)), "use": draw(st.sampled_from(["train", "test"]))}
    if draw(st.booleans()):
        data |= {
            "tokenize": "actor",
            "fields": {"prompt": draw(WORDS), "completion": draw(WORDS)},
            "batch": "4 prompts",
            **maybe(max_length=st.integers(2, 99), chat=st.booleans()),
        }
        calls = {"train": {**train, "use": "losses.sft"}}
        return {**top, "models": {"actor": {**model, "optimizer": optimizer}}, "data": data, "calls": calls}
    data["fields"] = {"prompt": draw(WORDS), "answer": draw(WORDS)}
    rollout = {
        "model": "actor",
        "op": "generate",
        "batch": "4 prompts",
        "samples": draw(st.integers(2, 4)),
        "max_new_tokens": draw(st.integers(1, 99)),
        **maybe(stop=st.lists(WORDS, max_size=3), chat=st.booleans(), temperature=st.floats(0.1, 2)),
    }
    options = maybe(
        clip_low=st.floats(0, 1),
        dual_clip=st.floats(1.01, 9),
        kl=st.sampled_from(["k1", "k2"]),
        kl_coef=NUMBERS,
    )
    calls = {
        "train": {**train, "use": "losses.ppo_clip", "options": options},
        "credit": {"op": "function", "use": "advantages.grpo", "reads": {"rewards": "score"}},
        "ref": {"model": "ref", "op": "infer", "use": "logprobs", "writes": {"logprobs": "ref_logprobs"}},
        "reward": {
            "op": "function",
            "use": "rewards.boxed",
            "writes": {"rewards": "score"},
            **maybe(timeout=st.floats(0.1, 99)),
        },
        "check": {"op": "function", "use": "rewards.last_number", **maybe(every=st.just("5 steps"))},
        "rollout": rollout,
    }
    models = {"actor": {**model, "optimizer": optimizer}, "ref": model}
    return {
        **top,
        "models": models,
        "data": data,
        "calls": {k: calls[k] for k in draw(st.permutations(list(calls)))},
    }


def escaped(value: object) -> object:
    """What a user would write for text that holds `${`."""
    return json.loads(json.dumps(value).replace("${", "$${"))


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_a_graph_survives_being_written(mapping: dict) -> None:
    graph = load_graph(escaped(mapping))
    plain = graph_to_mapping(graph)
    assert load_graph(plain) == graph
    assert load_graph(dump_yaml(plain)) == graph
    assert load_graph(json.loads(json.dumps(plain))) == graph
    assert graph_to_mapping(load_graph(plain)) == plain


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_calls_are_in_topological_order_and_complete(mapping: dict) -> None:
    graph = load_graph(escaped(mapping))
    written = set(graph.data.fields) | ({"tokens", "loss_mask"} if graph.data.tokenize else set())
    for call in graph.calls:
        assert set(call.reads.values()) <= written, call.name
        assert {use.name for use in call.decl.reads if not use.optional} <= set(call.reads)
        assert set(call.options) == set(call.decl.options) | ({"normalise"} if call.op == "train" else set())
        written |= set(call.writes.values())
    assert set(graph.extents) == set(graph.dtypes) == written


def test_grpo() -> None:
    graph = load_graph(find_graph("grpo"))
    assert [call.name for call in graph.calls] == ["rollout", "reward", "ref", "credit", "train"]
    assert (graph.prompts, graph.samples, graph.steps, graph.checkpoint_every) == (8, 8, 45, 20)
    assert (graph.data.unique, graph.data.test, graph.data.use, graph.data.size) == (
        "question",
        0.3,
        "train",
        4000,
    )
    rollout, train = graph.call("rollout"), graph.call("train")
    assert rollout.batch == Amount(8, "prompts")
    assert rollout.sampling is not None and rollout.sampling.max_new_tokens == 16
    assert train.reads == {
        "tokens": "tokens",
        "loss_mask": "loss_mask",
        "old_logprobs": "logprobs",
        "advantages": "advantages",
        "ref_logprobs": "ref_logprobs",
    }
    assert train.options["kl_coef"] == 0.001 and train.options["normalise"] == "token"
    assert train.minibatches == 2
    optimizer = graph.models["actor"].optimizer
    assert optimizer is not None and optimizer.lr == 1e-5
    assert graph.extents["completion"] == "sample" and graph.extents["answer"] == "prompt"
    place = graph.models["actor"].place
    assert (place.where, place.file) == ("models.actor.path", str(find_graph("grpo")))
    assert place.line is not None and place.params == ("model",)
    assert find_graph("grpo").read_text().splitlines()[place.line - 1].strip().startswith("path: ${model}")


def test_every_param_of_the_shipped_graphs_is_used_and_can_be_set() -> None:
    for name, path in shipped_graphs().items():
        graph = load_graph(path)
        assert graph.name == name
        assert graph.folder == ""  # nothing in it depends on where it lies
        again = load_graph(
            path, [f"{key}={json.dumps(value)}" for key, value in graph.params.items() if key != "model"]
        )
        assert again == graph
    graph = load_graph(
        find_graph("grpo"), ["steps=3", "prompts=4", "temperature=0.7", "lr=2e-6", "model=./here"]
    )
    assert (graph.steps, graph.prompts, graph.models["ref"].path) == (3, 4, "./here")
    assert {call.name: call.temperature for call in graph.calls if call.op in ("train", "infer")} == {
        "train": 0.7,
        "ref": 0.7,
    }


def test_sft() -> None:
    graph = load_graph(find_graph("sft"))
    (train,) = graph.calls
    assert train.reads == {"tokens": "tokens", "loss_mask": "loss_mask"}
    assert graph.data.batch == Amount(16, "prompts")
    assert (graph.prompts, graph.samples, graph.extents["tokens"]) == (16, 1, "token")


def base(**changes: dict) -> dict:
    """The calls of grpo, with keys of calls changed or whole calls added."""
    mapping = graph_to_mapping(load_graph(find_graph("grpo")))
    for name, change in changes.items():
        mapping["calls"][name] = {**mapping["calls"].get(name, {}), **change}
    return mapping


def test_an_optional_read_is_taken_where_something_writes_it() -> None:
    mapping = base()
    del mapping["calls"]["ref"], mapping["models"]["ref"], mapping["calls"]["train"]["options"]
    assert "ref_logprobs" not in load_graph(mapping).call("train").reads
    mapping["calls"]["train"]["options"] = {"kl_coef": 0.1}
    with pytest.raises(InputError, match="nothing writes 'ref_logprobs'"):
        load_graph(mapping)


def test_batch_in_samples_and_groups_cut_only_when_they_must_be() -> None:
    assert load_graph(base(rollout={"batch": "24 samples"}, train={"minibatches": 3})).prompts == 3
    assert load_graph(base(rollout={"batch": "3 prompts"}, train={"minibatches": 24})).samples == 8
    with pytest.raises(InputError, match="divides the 3 prompts of a step"):
        load_graph(base(rollout={"batch": "3 prompts"}, train={"minibatches": 2}))


def test_greedy_and_cut_sampling_are_fine_where_no_trainer_reads_their_logprobs() -> None:
    graph = load_graph(
        base(rollout={"top_k": 50, "temperature": 0.5}, train={"use": "losses.sft", "options": {}}, ref={})
    )
    assert graph.call("train").temperature == 0.5
    graph = load_graph(base(rollout={"temperature": 0}, train={"use": "losses.sft", "options": {}}))
    assert graph.call("train").temperature == 1.0


def test_two_rollouts_keep_their_tokens_apart() -> None:
    names = ("tokens", "logprobs", "loss_mask", "versions", "finish_reason", "group_id", "completion")
    second = {
        "model": "actor",
        "op": "generate",
        "batch": "8 prompts",
        "samples": 8,
        "max_new_tokens": 4,
        "temperature": 0.3,
        "writes": {name: f"eval_{name}" for name in names},
        "every": "10 steps",
    }
    score = {
        "op": "function",
        "use": "rewards.boxed",
        "reads": {"completion": "eval_completion"},
        "writes": {"rewards": "eval_rewards"},
        "every": "10 steps",
    }
    graph = load_graph(base(second=second, score=score))
    assert graph.call("train").temperature == 1.0
    assert graph.call("second").every == 10
    with pytest.raises(InputError, match="reads token fields of different tokens"):
        load_graph(
            base(
                second={**second, "every": "1 steps"},
                score=score,
                train={"reads": {"old_logprobs": "eval_logprobs"}},
            )
        )
    with pytest.raises(InputError, match="all generate calls of a graph have the same"):
        load_graph(base(second={**second, "samples": 2}, score=score))
    with pytest.raises(InputError, match=r"writes only every 10 steps; give it 'every: 10 steps'"):
        load_graph(base(second=second, score={**score, "every": "4 steps"}))


def test_a_reward_with_columns_gets_every_column(tmp_path: Path) -> None:
    (tmp_path / "columns_of_the_data.py").write_text("def score(completions, **columns): ...\n")
    mapping = base(reward={"use": "columns_of_the_data:score"})
    mapping["data"]["fields"]["entry"] = "entry"
    file = tmp_path / "graph.yaml"
    file.write_text(dump_yaml(mapping))
    graph = load_graph(file)
    assert graph.call("reward").reads == {
        "completions": "completion",
        "prompts": "prompt",
        "prompt": "prompt",
        "answer": "answer",
        "entry": "entry",
    }
    assert graph.folder == str(tmp_path)
    assert load_graph(graph_to_mapping(graph)) == graph


def test_columns_take_the_dtype_of_their_readers(tmp_path: Path) -> None:
    (tmp_path / "typed_columns.py").write_text(
        "from realflow.graph import function\n"
        "@function(reads={'target': 'sample float'}, writes={'bonus': 'sample float'})\ndef f(target): ...\n"
        "@function(reads={'target': 'sample text'}, writes={'malus': 'sample float'})\ndef g(target): ...\n"
    )
    mapping = base(bonus={"op": "function", "use": "typed_columns:f"})
    mapping["data"]["fields"]["target"] = "answer"
    mapping["folder"] = str(tmp_path)
    assert load_graph(mapping).dtypes["target"] == "float"
    mapping["calls"]["malus"] = {"op": "function", "use": "typed_columns:g"}
    with pytest.raises(InputError, match="as text, another call as float"):
        load_graph(mapping)


def test_a_graph_inside_another_file_keeps_its_lines() -> None:
    text = "format: 1\ngraph:\n  name: x\n  steps: 0\n"
    with pytest.raises(InputError) as caught:
        load_graph(parse_yaml(text, "plan.yaml").under("graph"))
    assert "plan.yaml:4: graph.steps: found 0, expected a whole number >= 1" in str(caught.value)


def test_a_path_given_as_text_is_explained() -> None:
    with pytest.raises(InputError, match="is a path, expected YAML text"):
        load_graph("grpo.yaml")


def test_reading_and_drawing_take_no_torch_and_no_time() -> None:
    script = (
        "import sys, time; start = time.process_time()\n"
        "from realflow.graph import find_graph, graph_to_mapping, load_graph\n"
        "from realflow.graph import to_mermaid, to_svg, explain_batch\n"
        "graph = load_graph(find_graph('grpo'), ['steps=2'])\n"
        "seconds = time.process_time() - start\n"
        "to_svg(graph), to_mermaid(graph), explain_batch(graph), graph_to_mapping(graph)\n"
        "heavy = {'torch', 'numpy', 'transformers', 'reasoning_gym'} & set(sys.modules)\n"
        "print(seconds, sorted(heavy))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    seconds, heavy = out.stdout.split(" ", 1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 0.5


def test_graph_answers_about_its_calls() -> None:
    graph: Graph = load_graph(find_graph("grpo"))
    writer = graph.writer("logprobs")
    assert writer is not None and writer.name == "rollout"
    assert graph.writer("answer") is None
    assert [call.name for call in graph.readers("tokens")] == ["ref", "train"]
    assert {name: call.name for name, call in graph.trained().items()} == {"actor": "train"}
