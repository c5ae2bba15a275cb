"""Scores of problems, sources and all; missing rewards; two evaluations; tables."""

from __future__ import annotations

import json
import random

import pytest
from answers import drawn

from realflow.errors import InputError
from realflow.evaluation import table
from realflow.evaluation.samples import from_line, from_record, to_line
from realflow.evaluation.summary import difference, per_problem, summary, to_mapping

MIXED = [
    *drawn(0, [1, 0, 0, 0], greedy=1.0),
    *drawn(1, [1, 1, 1, 1], greedy=0.0),
    *drawn(2, [0, 0, 0, 0], source="codes", greedy=0.0),
    *drawn(3, [1, 1, 0, 0], source="codes", greedy=1.0),
]


def test_scores_of_sources_and_of_all() -> None:
    found = summary(MIXED, ks=(1, 2, 4))
    assert found.names == ("reward", "pass@1", "pass@2", "pass@4", "greedy") and found.whole
    assert [line.name for line in found.lines] == ["codes", "sums", "all"]
    codes, sums, everything = found.lines
    assert everything is found.all and everything.problems == 4 and everything.samples == 20
    value = {name: line.value for name, line in everything.scores.items()}
    assert value["pass@1"] == value["reward"] == pytest.approx((0.25 + 1 + 0 + 0.5) / 4)
    assert value["pass@2"] == pytest.approx((0.5 + 1 + 0 + 5 / 6) / 4)
    assert value["pass@4"] == pytest.approx(3 / 4) and value["greedy"] == pytest.approx(1 / 2)
    assert sums.scores["pass@1"].value == pytest.approx(0.625)
    assert codes.scores["pass@1"].value == pytest.approx(0.25)
    assert everything.cut == 4 and everything.missing == 0
    assert everything.mean_tokens == pytest.approx((10 + 11 + 12 + 13 + 10) / 5)


def test_one_source_is_not_told_twice() -> None:
    assert [line.name for line in summary(drawn(0, [1, 0]), ks=(1,)).lines] == ["all"]


def test_a_missing_reward_is_counted_and_never_a_zero() -> None:
    found = summary(
        [*drawn(0, [1, None, None, None]), *drawn(1, [None] * 4), *drawn(2, [1, 0, 0, 1])], ks=(1, 4)
    )
    line = found.all
    assert line.missing == 7 and line.samples == 12 and line.problems == 3
    assert line.scores["pass@1"].value == pytest.approx((1 + 0.5) / 2) and line.scores["pass@1"].problems == 2
    assert line.scores["pass@4"].problems == 1  # one sample says nothing of four
    as_zero = summary([*drawn(0, [1, 0, 0, 0]), *drawn(1, [0] * 4), *drawn(2, [1, 0, 0, 1])], ks=(1,))
    assert as_zero.all.scores["pass@1"].value == pytest.approx(0.25)  # the control
    notes = table.notes(found, limit=64)
    assert "7 of 12 answers have no reward" in notes[0]
    (cells,) = table.rows(found)[1]
    assert "7 (58.3%)" in cells and any("(of 2)" in cell for cell in cells)


def test_partial_rewards_have_a_mean_and_solve_from_a_threshold_on() -> None:
    samples = drawn(0, [0.2, 0.9, 1.0, 0.0])
    assert not summary(samples, ks=(1,)).whole
    low = per_problem(samples, ks=(1,), solved=0.9)["sums/0"]
    assert low.scores == pytest.approx({"reward": 0.525, "pass@1": 0.5})
    assert per_problem(samples, ks=(1,))["sums/0"].scores["pass@1"] == pytest.approx(0.25)


def test_the_order_of_samples_changes_nothing() -> None:
    mixed = [*MIXED, *drawn(9, [None, 1, 0, 0.5])]
    other = random.Random(0).sample(mixed, len(mixed))
    first, second = (per_problem(samples, ks=(1, 2)) for samples in (mixed, other))
    assert first == second and set(first) == {"sums/0", "sums/1", "codes/2", "codes/3", "sums/9"}
    assert to_mapping(summary(other, ks=(1, 2)))["names"] == to_mapping(summary(mixed, ks=(1, 2)))["names"]


def test_a_difference_is_over_the_problems_that_both_have() -> None:
    ours = [s for place in range(20) for s in drawn(place, [1, 1, place % 2, 0], greedy=1.0)]
    theirs = [s for place in range(2, 24) for s in drawn(place, [1, 0, place % 2, 0])]
    found = difference(ours, theirs, ks=(1, 4))
    assert found.only == (2, 4) and found.lines[-1].problems == 18
    assert found.names == ("reward", "pass@1", "pass@4")  # there is no greedy answer in the other
    assert found.lines[-1].scores["pass@1"].value == pytest.approx(0.25)
    assert found.lines[-1].scores["pass@4"].value == pytest.approx(0.0)
    cells = table.difference_rows(found, whole=True)[1][0]
    assert cells[2] == "+0.250" and cells[3] == "+0.000"
    assert "2 problems are in this evaluation alone and 4 in the other" in table.difference_notes(found, 1)[0]
    reverse = difference(theirs, ours, ks=(1,))
    assert reverse.lines[-1].scores["pass@1"].value == pytest.approx(-0.25)


def test_a_difference_needs_common_problems_and_a_summary_samples() -> None:
    with pytest.raises(InputError, match="no problem in common"):
        difference(drawn(0, [1]), drawn(1, [1]), ks=(1,))
    with pytest.raises(InputError, match="no samples"):
        summary([], ks=(1,))


def test_tables() -> None:
    heads, body = table.rows(summary(MIXED, ks=(1, 4)))
    assert heads == ["source", "problems", "pass@1", "pass@4", "greedy", "missing", "cut off", "tokens"]
    text = table.markdown((heads, body))
    assert text.splitlines()[1] == "| --- | " + " | ".join(["---:"] * 7) + " |"
    assert text.splitlines()[-1].startswith("| all | 4 | 0.438 [")
    assert table.markdown((["a|b"], [["x\ny"]])).splitlines()[0] == "| a\\|b |"
    assert "20% of the answers were cut off at 13 tokens" in table.notes(summary(MIXED, ks=(1,)), limit=13)[0]


def test_a_line_is_read_back() -> None:
    for sample in [*MIXED, *drawn(7, [None, 0.25])]:
        assert from_line(json.loads(json.dumps(to_line(sample)))) == sample
    whole = to_line(MIXED[0])
    for broken in (
        {**whole, "reward": "high"},
        {**whole, "number": True},
        {**whole, "greedy": 0},
        {key: value for key, value in whole.items() if key != "seed"},
    ):
        with pytest.raises(InputError, match=r"out/samples\.jsonl: found"):
            from_line(broken, where="out/samples.jsonl")


def test_a_record_of_a_run_becomes_a_sample() -> None:
    row = {
        "step": 0, "sample_id": 11, "group_id": 2, "prompt": "?", "problem_id": "aime/7", "source": "aime",
        "draw_id": 7 << 32, "completion": "4", "finish_reason": "stop", "rewards": 1, "length": 3,
        "prompt_length": 9,
    }  # fmt: skip
    found = from_record(row, samples=4, greedy=False, seed=5)
    assert (found.number, found.draw_id, found.reward, found.seed) == (3, (7 << 32) + 3, 1.0, 5)
    assert from_record({**row, "rewards": None}, samples=1, greedy=True, seed=5).reward is None
