"""What a measurement is asked to do, and how its rows become a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from planner.profile import read_profile
from realflow.commands.profile import find_subjects
from realflow.errors import InputError
from realflow.profiling.bench import Bench
from realflow.profiling.models import Models, needed, streamed_layers, trained_layers
from realflow.profiling.request import Grids, Request, Setting, Subject, powers, smaller
from realflow.profiling.store import default_path, document, machine, tables, write
from realflow.profiling.worker import jobs

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "layer_types": ["a", "b", "a", "b", "a", "b"],
    "eos_token_id": 7,
}


def request(ranks: int, cores: int, device: str = "cpu") -> Request:
    return Request((Subject("m", CONFIG, "bfloat16"),), ranks, cores, device, 10.0)


def test_settings_are_those_that_runs_meet() -> None:
    assert request(1, 2).settings() == (Setting(2, 1),)
    assert request(2, 2).settings() == (Setting(2, 1), Setting(1, 1), Setting(1, 2), Setting(1, 2, 2))
    four = request(4, 8).settings()
    assert (
        Setting(2, 4) in four
        and Setting(8, 1) in four
        and Setting(2, 4, 4) in four
        and Setting(4, 2, 2) in four
    )
    assert all(1 <= one.busy <= 4 and one.threads >= 1 for one in four) and len(set(four)) == len(four)
    assert request(4, 2).settings()[-1] == Setting(1, 4, 4)
    assert request(4, 64, "cuda").settings() == (Setting(1, 1), Setting(1, 2, 2), Setting(1, 4, 4))


def test_powers() -> None:
    assert [powers(most) for most in (1, 2, 3, 6, 8)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_a_request_is_read_as_it_was_written() -> None:
    asked = Request(
        (Subject("m", CONFIG, "float32"),), 2, 2, "cpu", 3.5, Grids(rows=(1, 2), layers=((1, 1),))
    )
    assert Request.from_json(asked.to_json()) == asked


def test_smaller_configs() -> None:
    found = smaller(CONFIG, layers=2, vocab=10)
    assert (found["num_hidden_layers"], found["vocab_size"], found["layer_types"]) == (2, 10, ["a", "b"])
    assert found["eos_token_id"] is None and CONFIG["eos_token_id"] == 7
    assert smaller(CONFIG, layers=8)["layer_types"] == ["a", "b"] * 4
    assert smaller(CONFIG, layers=8)["vocab_size"] == 300


def test_layers_fill_the_caches_but_are_no_more_than_the_model_has() -> None:
    tiny = Subject("tiny", CONFIG, "bfloat16")
    assert streamed_layers(tiny) == trained_layers(tiny) == 6
    large = Subject("large", {**CONFIG, "hidden_size": 4096, "intermediate_size": 11008}, "bfloat16")
    assert streamed_layers(large) == trained_layers(large) == 1
    asked = needed(tiny, Grids())
    assert (1, None) in asked and all(layers >= 1 for layers, _ in asked)
    many = {trained_layers(tiny, tokens): tokens for tokens in (1, 512, 1024, 1 << 20)}
    assert list(many) == [6, 4, 2] and many[2] == 1 << 20, "fewer layers for long passes, but never one"
    assert {layers for layers, vocab in asked if vocab} == {1, 2, 6}


def test_ranks_without_a_core_come_last_and_messages_first(tmp_path: Path) -> None:
    four = request(4, 2).settings()
    crowded = [one.busy * one.threads > 2 for one in four]
    assert crowded == sorted(crowded) and any(crowded) and not crowded[0]
    plain = {name: value for name, value in CONFIG.items() if name != "layer_types"}
    subject = Subject("m", plain, "bfloat16")
    asked = Request((subject,), ranks=4, cores=2, device="cpu", seconds=10.0)
    models = Models(tmp_path, torch.device("cpu"))
    models.write(subject, asked.grids)
    bench = Bench(0, 4, torch.device("cpu"), 0.0)
    order = [(job.what, job.setting.busy) for job in jobs(asked, bench, models)]
    assert order.index(("reduce_scatter", 2)) < order.index(("layer", 1)) < order.index(("all_reduce", 4))
    assert max(i for i, (_, busy) in enumerate(order) if busy == 2) < order.index(("all_gather", 4))
    assert sum(what == "p2p" for what, _ in order) == len(asked.grids.messages)


def rows() -> list[dict[str, object]]:
    key = {"dtype": "bfloat16", "data": 1, "threads": 1, "busy": 1, "t": 1}
    row = {"what": "update", "key": key, "axes": ["elements"], "at": [100], "seconds": 0.2, "noise": 0.1}
    step = {"what": "train_step", "key": {"doing": "micro_batch"}, "axes": ["rows"], "at": [64], "noise": 0.0}
    return [
        {**row, "at": [200], "seconds": 0.5},
        row,
        {**row, "seconds": 0.4, "noise": 0.3},
        {**step, "seconds": 0.001},
        {**step, "seconds": 0.003},
        {**step, "key": {"doing": "minibatch"}, "seconds": 0.004},
    ]


def test_rows_become_tables() -> None:
    table, *others = tables(rows()[:3])
    assert not others
    assert table["points"] == [[100, pytest.approx(0.3), pytest.approx(0.2)], [200, 0.5, 0.1]]


def test_what_is_stored_is_what_the_planner_reads(tmp_path: Path) -> None:
    here = machine("cpu")
    path = write(
        document(here, [Subject("m", CONFIG, "bfloat16")], rows(), {"dispatch": 0.5}), tmp_path / "p.json"
    )
    profile = read_profile(path)
    assert profile.cores == here["cores"] >= 1 and profile.machine == here
    assert profile.constants == {"micro_batch": 0.002, "train_step": 0.004, "dispatch": 0.5}
    assert profile.of("update")[0].read(100).seconds == pytest.approx(0.3) and not profile.of("train_step")
    assert profile.models["m"]["config"]["hidden_size"] == 64
    assert profile.hash == json.loads(path.read_text())["hash"] and not list(tmp_path.glob("*.tmp"))


def test_profiles_of_other_machines_lie_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REALFLOW_CACHE", str(tmp_path))
    here = machine("cpu")
    assert (
        default_path(here) == default_path(machine("cpu"))
        and default_path(here).parent == tmp_path / "profiles"
    )
    assert default_path({**here, "cores": here["cores"] + 1}) != default_path(here)


def test_models_of_equal_shape_are_measured_once(tmp_path: Path) -> None:
    for name, layers in (("a", 2), ("b", 2), ("c", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    found = find_subjects([str(tmp_path / name) for name in "abc"], [], "bfloat16")
    assert [one.name for one in found] == ["a", "c"]
    (tmp_path / "x" / "a").mkdir(parents=True)
    (tmp_path / "x" / "a" / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 32}))
    named = find_subjects([str(tmp_path / "a"), str(tmp_path / "x" / "a")], [], "float32")
    assert [one.name for one in named] == ["a-float32", "a-float32+"]
    with pytest.raises(InputError):
        find_subjects([str(tmp_path / "nothing")], [], "bfloat16")
