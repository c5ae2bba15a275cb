"""The data section: several sources, columns, lengths and system messages; what is wrong is named."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.errors import InputError
from realflow.graph import graph_to_mapping, load_graph
from realflow.graph.words import explain_batch, notes

CALLS = """\
calls:
  rollout: {model: actor, op: generate, batch: 8 prompts, samples: 2, max_new_tokens: 16}
  reward: {op: function, use: rewards.last_number}
steps: 2
"""
HEAD = "name: mixed\nmodels: {actor: {path: some-model}}\n"
SOURCES = """\
data:
  fields: {prompt: question, answer: answer}
  sources:
  - {source: reasoning_gym, task: chain_sum, weight: 3, options: {max_terms: 2}}
  - {source: jsonl, path: /data/math.jsonl, name: math, fields: {answer: extra.answer}}
  - {source: hf, path: /data/saved, split_name: train, weight: 0.5, unique: question, split: {test: 0.1}}
  max_length: 300
  over: drop
  system: Think first.
"""


def read(data: str, calls: str = CALLS):
    return load_graph(HEAD + data + calls)


def problems(data: str, calls: str = CALLS) -> str:
    with pytest.raises(InputError) as caught:
        read(data, calls)
    return str(caught.value)


def test_sources_are_read() -> None:
    data = read(SOURCES).data
    assert [(part.name, part.weight) for part in data.sources] == [
        ("chain_sum", 3),
        ("math", 1),
        ("saved", 0.5),
    ]
    assert dict(data.fields) == {"prompt": "prompt", "answer": "answer", "source": "source"}
    assert dict(data.sources[1].data.fields) == {"prompt": "question", "answer": "extra.answer"}
    assert (data.sources[2].data.split_name, data.sources[2].data.test) == ("train", 0.1)
    assert (data.max_length, data.over, data.system, data.parts[0].task) == (
        300, "drop", "Think first.", "chain_sum",
    )  # fmt: skip


def test_the_name_of_the_source_is_a_field_for_calls() -> None:
    reads = (
        "  by: {op: function, use: rewards.last_number, reads: {answer: source}, writes: {rewards: r}}\nsteps"
    )
    graph = read(SOURCES, CALLS.replace("steps", reads))
    assert graph.call("by").reads["answer"] == "source"
    assert graph.extents["source"] == "prompt"


def test_a_reward_in_verls_signature_is_told_the_source(tmp_path: Path) -> None:
    (tmp_path / "verls_own.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
    )
    path = tmp_path / "mixed.yaml"
    sources = SOURCES[: SOURCES.index("  - {source: jsonl")] + "  - {source: reasoning_gym, task: gcd}\n"
    reads = 'use: "verls_own:compute_score", reads: {data_source: source}'
    path.write_text(HEAD + sources + CALLS.replace("use: rewards.last_number", reads))
    assert load_graph(path).call("reward").reads["data_source"] == "source"


def test_sources_in_words() -> None:
    graph = read(SOURCES)
    assert "the sources (67% chain_sum, 22% math, 11% saved) are opened" in explain_batch(graph)
    assert notes(graph) == []
    assert "67% chain_sum" in graph._repr_svg_()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"source": st.just("jsonl"), "path": st.just("/data/a.jsonl")},
            optional={
                "weight": st.floats(1e-3, 1e3) | st.integers(1, 9),
                "size": st.integers(1, 99),
                "fields": st.fixed_dictionaries({"answer": st.sampled_from(["a", "b.c", "answer"])}),
                "unique": st.just("question"),
            },
        ),
        min_size=1,
        max_size=4,
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "over": st.sampled_from(["drop", "truncate", "error"]),
            "max_length": st.integers(2, 999),
            "system": st.text("abc $", min_size=1).filter(str.strip),
            "shuffle": st.booleans(),
        },
    ),
)
def test_a_graph_of_several_sources_survives_being_written(sources: list, others: dict) -> None:
    named = [{**source, "name": f"s{place}"} for place, source in enumerate(sources)]
    plain = {**graph_to_mapping(read(SOURCES)), "data": {"fields": {"prompt": "question", "answer": "x"}}}
    plain["data"] |= {"sources": named, **others}
    graph = load_graph(plain)
    written = graph_to_mapping(graph)
    assert load_graph(written) == graph
    assert graph_to_mapping(load_graph(written)) == written


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        ("  max_length", "  path: a.jsonl\n  max_length", "with several 'sources' each has its own 'path'"),
        ("weight: 3,", "weight: 0,", "data.sources.0.weight: found 0, expected a number above 0"),
        ("weight: 3,", "wieght: 3,", "unknown key 'wieght'; did you mean 'weight'"),
        ("weight: 3,", "shuffle: false,", "'shuffle' is said once for all sources, under 'data'"),
        ("name: math", "name: chain_sum", "the name 'chain_sum' is taken by another source"),
        ("name: math", "name: a b", "expected a name of letters"),
        ("{answer: extra.answer}", "{level: level}", "the source chain_sum has no field 'level'"),
        ("{answer: extra.answer}", "{source: level}", "'source' is the name of the source here"),
        ("task: chain_sum", "task: chain_sums", "did you mean 'chain_sum'"),
        ("split_name: train,", "task: x,", "the source hf takes no 'task'"),
        ("over: drop", "over: dorp", "did you mean 'drop'"),
        ("answer: answer", "answer: anser", "has no column 'anser'"),
    ],
)
def test_what_is_wrong_with_sources(change: str, to: str, message: str) -> None:
    assert change in SOURCES
    assert message in problems(SOURCES.replace(change, to))


def test_sources_that_are_no_list() -> None:
    fields = "data:\n  fields: {prompt: q, answer: a}\n"
    assert "is empty; expected a list of sources" in problems(f"{fields}  sources: []\n")
    assert "expected a list of sources" in problems(f"{fields}  sources: {{a: 1}}\n")
    assert "expected a mapping" in problems(f"{fields}  sources: [jsonl]\n")
    one = "{source: jsonl, path: /a, fields: {prompt: q}}"
    assert "'fields' is missing" in problems(f"data:\n  sources: [{one}, {{source: jsonl, path: /b}}]\n")
    assert "it belongs to one of several 'sources'" in problems(
        f"{fields}  source: jsonl\n  path: /a\n  weight: 2\n"
    )


def test_system_and_lengths_are_of_text() -> None:
    one = "data: {source: jsonl, path: /a, fields: {prompt: q, answer: a}, batch: 2 prompts, KEY}\n"
    alone = (
        "calls:\n  reward: {op: function, use: rewards.last_number, reads: {completion: prompt}}\nsteps: 1\n"
    )
    for key, message in (
        ("max_length: 9", "limits tokens of the data, but no call generates"),
        ("over: drop", "says what becomes of what is too long, but no call generates"),
        ("system: hi", "puts a message before each prompt, but no call generates"),
    ):
        assert message in problems(one.replace("KEY", key), alone)
    sft = "data: {source: jsonl, path: /a, fields: {prompt: q, completion: a}, tokenize: actor, KEY}\n"
    assert "remove 'chat: false' or it" in problems(sft.replace("KEY", "system: hi, chat: false"))
    assert "longer than 'max_length'; set that too" in problems(sft.replace("KEY", "over: drop"))
    plain = CALLS.replace("samples: 2,", "samples: 2, chat: false,")
    system = "data: {source: jsonl, path: /a, fields: {prompt: q, answer: a}, system: hi}\n"
    assert "found false, but data.system is a message before each prompt" in problems(system, plain)


def test_files_of_all_sources_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "a-1.jsonl").write_text("{}")
    (tmp_path / "b").mkdir()
    path = tmp_path / "mixed.yaml"

    def found(*sources: str) -> str:
        fields = "  fields: {prompt: q, answer: a}\n  sources:\n"
        entries = "".join(f"  - {{{source}, name: s{i}}}\n" for i, source in enumerate(sources))
        path.write_text(f"{HEAD}data:\n{fields}{entries}{CALLS}")
        try:
            load_graph(path)
        except InputError as error:
            return str(error)
        return ""

    good = ("source: jsonl, path: a-1.jsonl", "source: jsonl, path: a-*.jsonl", "source: hf, path: b")
    assert found(*good) == ""
    wrong = found(
        *good, "source: jsonl, path: b", "source: parquet, path: b-*.parquet", "source: hf, path: c"
    )
    assert "data.sources.3.path" in wrong and "this is a folder; expected a jsonl file" in wrong
    assert "data.sources.4.path" in wrong and "no file is named so" in wrong
    assert "data.sources.5.path" in wrong and "no such folder" in wrong
    assert "sources.0" not in wrong
    assert "this is a file; expected the folder of a saved dataset" in found("source: hf, path: a-1.jsonl")
