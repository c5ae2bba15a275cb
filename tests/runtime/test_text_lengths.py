"""Texts of the data that are too long, several sources and system messages, as workers and runs see them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import execute, samples, write_graph
from tiny import tiny_model
from transformers import AutoTokenizer

from realflow.api import plan
from realflow.data.source import open_source
from realflow.data.text import encode_pair
from realflow.errors import InputError
from realflow.graph import load_graph
from realflow.runtime.fields import DataFields, make_data
from realflow.runtime.hosts import Hosts
from realflow.runtime.streams import Streams

PAIRS = """\
name: pairs
models:
  actor: {{path: {model}, dtype: float64, optimizer: {{lr: 1e-3}}}}
data:
  source: jsonl
  path: {data}
  fields: {{prompt: prompt, {texts}}}
  tokenize: actor
  max_length: 60
  batch: 24 prompts
calls:
  train: {{model: actor, op: train, use: losses.sft}}
steps: 1
"""
LONG = [4, 9, 10, 17]
"""Rows whose completion is too long."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model", dtype="float64", seed=3)


def pairs(folder: Path, model: Path, texts: str = "completion: good", **data: Any) -> DataFields:
    """The data of a graph that trains on 24 pairs, on the one rank of its plan."""
    rows = [
        {"prompt": f"{i}", "good": ("no " * 20 if i in LONG else "yes") + f"{i}", "bad": f"no {i}"}
        for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "pairs.yaml"
    path.write_text(PAIRS.format(model=model, data=folder / "pairs.jsonl", texts=texts))
    graph = load_graph(path)
    made = plan(replace(graph, data=replace(graph.data, **data)), devices=1, layouts="d1")
    return make_data(made, Hosts(made, 0, torch.device("cpu"), {}))


def stats(data: DataFields, ids: list[int]) -> dict[str, list[float]]:
    return data.lengths.of_samples(data.lengths._graph.call("train"), ids, data.values)


def test_pairs_that_are_too_long_are_cut_and_counted(tmp_path: Path, model: Path) -> None:
    for over in (None, "truncate"):
        data = pairs(tmp_path, model, over=over)
        tokens = data.values("tokens", range(24))
        assert max(map(len, tokens)) == 60 and sum(len(one) == 60 for one in tokens) == len(LONG)
        assert stats(data, list(range(24))) == {"data/truncated": [4.0, 24.0, 0.0, 1.0]}
        assert stats(data, []) == {}


def test_a_pair_that_just_fits_is_not_counted(tmp_path: Path, model: Path) -> None:
    longest = max(len(one) for one in pairs(tmp_path, model, max_length=999).values("tokens", range(24)))
    data = pairs(tmp_path, model, max_length=longest)
    assert stats(data, list(range(24))) == {"data/truncated": [0.0, 24.0, 0.0, 0.0]}


def test_pairs_that_are_too_long_are_refused(tmp_path: Path, model: Path) -> None:
    data = pairs(tmp_path, model, over="error")
    with pytest.raises(InputError, match="more than max_length 60"):
        data.values("tokens", range(24))


def test_pairs_that_are_too_long_are_dropped_with_all_their_columns(tmp_path: Path, model: Path) -> None:
    data = pairs(tmp_path, model, over="drop")
    rows = [data.row(g) for g in range(24)]
    assert {row["prompt"] for row in rows} == {str(i) for i in range(24) if i not in LONG}
    assert max(len(one) for one in data.values("tokens", range(24))) < 60
    assert stats(data, list(range(24))) == {"data/dropped": [4.0, 24.0, 0.0, 1.0]}


def test_of_two_texts_both_must_be_short(tmp_path: Path, model: Path) -> None:
    data = pairs(tmp_path, model, "chosen: good, rejected: bad", over="drop")
    assert {data.row(g)["prompt"] for g in range(24)} == {str(i) for i in range(24) if i not in LONG}
    assert max(len(one) for one in data.values("tokens", range(48))) < 60
    assert stats(data, list(range(48))) == {"data/dropped": [8.0, 48.0, 0.0, 1.0]}
    cut = pairs(tmp_path, model, "chosen: good, rejected: bad", over="truncate")
    assert stats(cut, list(range(48))) == {"data/truncated": [4.0, 48.0, 0.0, 1.0]}


def test_a_system_message_is_part_of_pairs(tmp_path: Path, model: Path) -> None:
    data = pairs(tmp_path, model, system="count", max_length=200)
    row = data.row(3)
    tokenizer = AutoTokenizer.from_pretrained(model)
    wanted, _ = encode_pair(tokenizer, row["prompt"], row["completion"], True, system="count")
    assert data.values("tokens", [3])[0].tolist() == wanted
    assert tokenizer.decode(wanted).startswith("<|im_start|>system\ncount<|im_end|>")


SOURCES = """\
  fields: {{prompt: prompt, answer: answer}}
  system: add
  max_length: 80
  over: {over}
  sources:
  - {{source: jsonl, path: {folder}/prompts.jsonl, name: short, weight: 2}}
  - {{source: jsonl, path: {folder}/others.jsonl, name: mixed, fields: {{prompt: extra.q}}}}
"""


def several(folder: Path, over: str) -> Path:
    """The small graph on two sources; each second prompt of the other one has more than 80 tokens."""
    path = write_graph(folder)
    rows = [{"extra": {"q": f"{'1+' * (30 * (i % 2))}{i}="}, "answer": str(i)} for i in range(10)]
    (folder / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = path.read_text()
    begin, end = text.index("  source: jsonl\n"), text.index("calls:\n")
    path.write_text(text[:begin] + SOURCES.format(folder=folder, over=over) + text[end:])
    return path


def test_a_run_drops_long_prompts_of_one_source_and_names_the_sources(tmp_path: Path) -> None:
    graph = several(tmp_path, "drop")
    run_dir = execute(graph, tmp_path / "run", 2, ("steps=2",)).run_dir
    rows = samples(run_dir)
    found = {row["group_id"]: (row["source"], row["prompt"]) for row in rows.values()}
    source = open_source(load_graph(graph).data, seed=1)
    drawn = {g: source.row(g) for g in range(12)}
    assert {g: name for g, (name, _) in found.items()} == {g: row["source"] for g, row in drawn.items()}
    assert sum(name == "short" for name, _ in found.values()) == 8, "two of three"
    long = [g for g, row in drawn.items() if row["prompt"].startswith("1+")]
    assert long and all((found[g][1] == drawn[g]["prompt"]) == (g not in long) for g in drawn)
    assert not any(prompt.startswith("1+") for _, prompt in found.values())
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    dropped = [sum(6 * step <= g < 6 * step + 6 for g in long) for step in range(2)]
    assert [row["data/dropped"] for row in metrics] == dropped
    assert [row["data/dropped_ratio"] for row in metrics] == pytest.approx([n / 6 for n in dropped])


def test_long_prompts_keep_their_end(tmp_path: Path) -> None:
    graph = load_graph(several(tmp_path, "truncate"))
    made = plan(graph, devices=1, layouts="d1")
    hosts = Hosts(made, 0, torch.device("cpu"), {})
    data = make_data(made, hosts)
    streams = Streams(made, 0, hosts, None, data, None)  # type: ignore[arg-type]
    call = graph.call("rollout")
    tokenizer = hosts.tokenizer("actor")
    for g in range(12):
        text = tokenizer.decode(streams._prompt(call, g).tokens)
        assert text.endswith(f"{data.row(g)['prompt']}<|im_end|>\n<|im_start|>assistant\n")
        long = data.row(g)["prompt"].startswith("1+")
        assert text.startswith("<|im_start|>system\nadd<|im_end|>") != long
        assert streams._cut[g] == long
    found = data.lengths.of_prompts(call, streams._cut)
    assert found["data/truncated"][:2] == [float(sum(streams._cut.values())), 12.0]
