"""A measurement by two real ranks, as small as can be, and what the planner makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_config

from planner.decoder import read_decoder
from planner.formulas import Cut, decode_pass, pass_of
from planner.profile import read_profile
from planner.rates import Rates, make_rates
from realflow.cli import main
from realflow.commands.profile import measure
from realflow.planfile import Node
from realflow.profiling.request import Grids, Request, Subject
from realflow.profiling.store import document, machine, write

pytestmark = pytest.mark.timeout(600)  # the first test waits for two ranks

GRIDS = Grids(
    layers=((8, 8), (32, 8), (32, 32)),
    attention=((8, 8), (64, 8), (8, 32), (64, 32)),
    decode=((1, 16), (4, 16), (1, 64), (4, 64)),
    rows=(4, 16),
    tokens=(4, 64),
    slots=(1, 4),
    messages=(1024, 4096),
    weights=(4096, 1 << 16),
)


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> Rates:
    folder = tmp_path_factory.mktemp("profile")
    config = tiny_config("llama", vocab=100).to_dict()
    subjects = (Subject("tiny", config, "bfloat16"),)
    here = {**machine("cpu"), "cores": 2}
    rows = measure(Request(subjects, 2, 2, "cpu", 1000.0, GRIDS, repeats=1), folder)
    assert all(row["seconds"] >= 0 and row["noise"] >= 0 for row in rows)
    path = write(document(here, subjects, rows, {}), folder / "profile.json")
    return make_rates(Node("local", 2, "cpu"), read_profile(path))


def test_everything_that_a_run_needs_was_measured(rates: Rates) -> None:
    decoder = read_decoder(tiny_config("llama", vocab=100).to_dict(), "lm")
    one = pass_of([(8, 4)], rows=16)
    for cut, busy in ((Cut(), 1), (Cut(), 2), (Cut(t=2), 2)):
        for doing in ("infer", "prefill", "forward", "backward", "recompute"):
            found = rates.layer(decoder, 0, cut, one, doing, dtype="bfloat16", busy=busy)
            assert found.source == "measured" and found.value > 0, (cut, busy, doing)
            ends = rates.ends(decoder, cut, one, doing, dtype="bfloat16", busy=busy)
            assert ends.source == "measured" and ends.value > 0, (cut, busy, doing)
        step = rates.decode_layer(decoder, 0, cut, decode_pass([(30, 2)]), dtype="bfloat16", busy=busy)
        assert step.source == "measured" and step.value > 0
        assert rates.decode_ends(decoder, cut, 3, dtype="bfloat16", busy=busy).source == "measured"
    for first, last in ((True, False), (False, True)):
        ends = rates.ends(decoder, Cut(), one, "backward", dtype="bfloat16", busy=2, first=first, last=last)
        assert ends.source == "measured" and ends.value > 0
    assert rates.decode_ends(decoder, Cut(), 3, dtype="bfloat16", busy=2, last=False).source == "measured"
    critic = read_decoder(tiny_config("llama", vocab=100).to_dict(), "value")
    assert rates.ends(critic, Cut(), one, "backward", dtype="bfloat16").source == "measured"


def test_tokens_that_samples_share_were_measured(rates: Rates) -> None:
    decoder = read_decoder(tiny_config("llama", vocab=100).to_dict(), "lm")
    plain = pass_of([(16, 3)], rows=16)
    shared = replace(plain, tokens=20.0, context=28.0)
    for cut, busy in ((Cut(), 1), (Cut(t=2), 2)):
        for doing in ("infer", "forward", "backward", "recompute"):
            found = rates.layer(decoder, 0, cut, shared, doing, dtype="bfloat16", busy=busy)
            assert found.source == "measured" and found.value > 0, (cut, busy, doing)


def test_messages_and_moves_were_measured(rates: Rates) -> None:
    assert rates.collective("all_reduce", 2000, 2).source == "measured"
    assert rates.collective("all_gather", 2000, 2).source == "measured"
    assert rates.reduce_gradients(4000, 2, dtype="bfloat16").source == "measured"
    assert rates.p2p(2000).source == "measured"
    for method in (rates.realloc, rates.copy, rates.host_copy):
        assert method(8192).source == "measured" and method(8192).value > 0
    for name in ("micro_batch", "train_step"):
        assert rates.constant(name).source == "measured"


def test_updates_were_measured_over_data_ranks(rates: Rates) -> None:
    (elements,) = {int(point.at[0]) for table in _updates(rates) for point in table.points[:1]}
    for data in (1, 2):
        found = rates.update(elements, data, dtype="bfloat16", busy=2)
        assert found.source == "measured" and found.value > 0


def _updates(rates: Rates):
    assert rates.profile is not None
    return rates.profile.of("update")


def test_wrong_input_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["profile", "no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
    assert main(["profile", "grpo", "--seconds", "0"]) == 2
    assert "seconds" in capsys.readouterr().err
    assert main(["profile", "grpo", "--devices", "0"]) == 2


@pytest.mark.full
def test_the_command_writes_a_profile_that_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny import tiny_model

    from realflow.profiling.store import default_path

    monkeypatch.setenv("REALFLOW_CACHE", str(tmp_path / "cache"))
    model = tiny_model(tmp_path / "model")
    assert main(["profile", str(model), "--seconds", "5"]) == 0, capsys.readouterr().err
    profile = read_profile(default_path(machine("cpu")))
    assert {"dispatch", "step", "sample", "micro_batch", "train_step"} == set(profile.constants)
    assert profile.constants["dispatch"] > 0 and profile.hash in capsys.readouterr().out
