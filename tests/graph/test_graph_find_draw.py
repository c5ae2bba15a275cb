"""Finding graphs by name or path; pictures and words of graphs."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.errors import InputError
from realflow.graph import explain_batch, find_graph, load_graph, shipped_graphs, to_mermaid, to_svg
from realflow.graph.draw import edges
from realflow.graph.layered import arrange
from realflow.graph.words import most_prompts, notes


def test_shipped_graphs_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"grpo", "ppo", "sft"} <= set(shipped_graphs())
    assert find_graph("grpo").name == "grpo.yaml"
    (tmp_path / "grpo.yaml").write_text("name: mine\n")
    assert find_graph("grpo.yaml") == Path("grpo.yaml")
    assert find_graph("grpo") != Path("grpo.yaml")
    assert find_graph(tmp_path / "grpo.yaml") == tmp_path / "grpo.yaml"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("grop", "did you mean 'grpo'?"),
        ("grpo.yaml", "the shipped graph is called 'grpo'"),
        ("./mine.yaml", "no such file; expected a graph file, or a shipped graph: "),
        ("folder/", "expected a graph file"),
        ("zzzzzz", "known: "),
        ("", "neither a file nor a shipped graph"),
    ],
)
def test_what_is_not_found_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError) as caught:
        find_graph(name)
    assert part in str(caught.value)


@pytest.mark.parametrize("name", ["grpo", "ppo", "sft"])
def test_svg_shows_every_call_and_field_and_needs_nothing_else(name: str) -> None:
    graph = load_graph(find_graph(name))
    svg = to_svg(graph)
    root = ElementTree.fromstring(svg)
    text = " ".join(root.itertext())
    for call in graph.calls:
        assert call.name in text
        assert call.decl.name in text or call.op == "generate"
        for field in call.reads.values():
            assert field in text
    assert not re.search(r"(href|src|url\(http|@import|<script)", svg)
    assert len(root.findall(".//{*}marker")) == 1
    assert svg.count('class="edge"') == len(edges(graph))


def test_mermaid() -> None:
    text = to_mermaid(load_graph(find_graph("grpo")))
    assert text.startswith("flowchart TD\n")
    assert 'n1 -- "tokens, loss_mask, logprobs" --> n5' in text
    assert 'n0 -- "prompt" --> n1' in text
    assert "actor generates" in text


def test_mermaid_and_svg_escape_what_users_write() -> None:
    mapping = {
        "name": "x",
        "models": {"a": {"path": "p", "optimizer": {}}},
        "data": {
            "source": "jsonl", "path": '"<b>#&.jsonl', "tokenize": "a",
            "fields": {"prompt": "p", "completion": "c"},
            "batch": "2 prompts",
        },
        "calls": {"train": {"model": "a", "op": "train", "use": "losses.sft"}},
        "steps": 1,
    }  # fmt: skip
    graph = load_graph(mapping)
    assert "#quot;#lt;b#gt;#35;#amp;.jsonl" in to_mermaid(graph)
    assert '"<b>#&.jsonl' in " ".join(ElementTree.fromstring(to_svg(graph)).itertext())


def test_explain_batch() -> None:
    text = explain_batch(load_graph(find_graph("grpo")))
    assert "8 prompts × 8 samples each = 64 samples a step, 45 steps" in text
    assert "2 minibatches of 32 samples (4 prompts)" in text
    assert "2 a step, 90 in the run" in text
    assert "at most 1024 new tokens" in text
    assert "16 prompts = 16 samples a step" in explain_batch(load_graph(find_graph("sft")))
    assert "4000 rows, equal 'question' counted once, of which train is 70%" in text
    assert "2800 distinct ones at most" in text and "split over several" not in text
    few = explain_batch(
        load_graph(find_graph("grpo"), ["minibatches=2", "samples=2", "steps=1", "prompts=1"])
    )
    assert "1 prompt × 2 samples" in few and ", 1 step\n" in few
    assert "samples of a prompt are split over several" in few


@pytest.mark.parametrize("lines", [0, 1, 7])
def test_rows_of_a_small_jsonl_file_are_counted(tmp_path: Path, lines: int) -> None:
    (tmp_path / "data.jsonl").write_text('{"p": 1, "c": 2}\n' * lines + "\n")
    text = (
        "name: x\nmodels: {a: {path: p, optimizer: {}}}\nsteps: 3\n"
        "data: {source: jsonl, path: data.jsonl, tokenize: a, batch: 2 prompts,\n"
        "  fields: {prompt: p, completion: c}}\n"
        "calls: {train: {model: a, op: train, use: losses.sft}}\n"
    )
    (tmp_path / "graph.yaml").write_text(text)
    graph = load_graph(tmp_path / "graph.yaml")
    assert most_prompts(graph) == lines
    assert ("the same ones come again" in "".join(notes(graph))) == (lines < 2)
    (tmp_path / "data.jsonl").unlink()
    assert most_prompts(graph) is None and "is known when jsonl is opened" in explain_batch(graph)
    with pytest.raises(InputError, match=r"graph.yaml:4: data.path: .*data.jsonl: no such file"):
        load_graph(tmp_path / "graph.yaml")


def test_a_notebook_shows_the_drawing_and_short_texts() -> None:
    graph = load_graph(find_graph("grpo"))
    assert graph._repr_svg_() == to_svg(graph)
    assert repr(graph) == "Graph('grpo', calls=[rollout, reward, ref, credit, train], steps=45)"


@st.composite
def acyclic(draw: st.DrawFn) -> tuple[dict[str, float], list[tuple[str, str]]]:
    count = draw(st.integers(1, 9))
    widths = {f"c{i}": draw(st.floats(20, 200)) for i in range(count)}
    pairs = [(f"c{i}", f"c{j}") for j in range(count) for i in range(j)]
    return widths, draw(st.lists(st.sampled_from(pairs), unique=True, max_size=12)) if pairs else []


@given(acyclic())
def test_boxes_and_labels_never_overlap(graph: tuple[dict[str, float], list[tuple[str, str]]]) -> None:
    widths, edges = graph
    gap = 10.0
    layout = arrange(widths, edges, [50.0] * len(edges), gap)
    placed = [(layout.boxes[name], width) for name, width in widths.items()]
    placed += [(route[1], 50.0) for route in layout.routes]
    for index, (point, width) in enumerate(placed):
        assert layout.left - 1e-6 <= point.x - width / 2 and point.x + width / 2 <= layout.right + 1e-6
        for other, room in placed[:index]:
            if other.row == point.row:
                assert abs(other.x - point.x) >= (width + room) / 2 + gap - 1e-6
    for (a, b), route in zip(edges, layout.routes, strict=True):
        assert (route[0], route[-1]) == (layout.boxes[a], layout.boxes[b])
        assert [point.row for point in route] == list(range(route[0].row, route[-1].row + 1))
        assert route[1].row % 2 == 1
