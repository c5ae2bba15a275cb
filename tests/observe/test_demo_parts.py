"""The demo's own parts: held-out questions, answers by plain code, the interval, the record."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import make_graph, make_plan

from realflow.graph.types import DataSpec
from realflow.observe.metrics import MetricsLog

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def load(name: str):
    """A script of experiments/ as a module."""
    spec = importlib.util.spec_from_file_location(f"demo_{Path(name).stem}", EXPERIMENTS / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def evaluate():
    return load("demo/evaluate.py")


@pytest.fixture(scope="module")
def answers():
    return load("demo/answers.py")


SHARES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60)


@settings(max_examples=30, deadline=None)
@given(SHARES)
def test_the_interval_holds_the_mean_and_turns_with_its_sign(evaluate, pairs):
    before, after = zip(*pairs, strict=True)
    low, high = evaluate.paired_interval(before, after, draws=2000)
    differences = [b - a for a, b in pairs]
    assert min(differences) - 1e-9 <= low <= high <= max(differences) + 1e-9
    back = evaluate.paired_interval(after, before, draws=2000)
    assert back == pytest.approx((-high, -low), abs=1e-9)


def test_the_interval_covers_as_often_as_it_says(evaluate):
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        before = draw.random(60)
        low, high = evaluate.paired_interval(before, before + draw.normal(0.1, 0.2, 60), draws=500)
        covered += low <= 0.1 <= high
    assert 0.90 <= covered / 200 <= 0.99
    # Control: unpaired, the questions' own spread would hide a difference that is always there.
    low, high = evaluate.paired_interval(before, before + 0.1)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_reward_line_compares_both_ends(tmp_path):
    demo = load("demo/demo.py")
    with MetricsLog(tmp_path) as log:
        for step in range(12):
            log.step(step, {"critic/rewards/mean": step / 10})
    assert (
        demo.reward_line(tmp_path) == "reward      0.200 at the start, 0.900 at the end (+0.700; mean of 5)"
    )


def test_a_run_of_two_steps_is_halved(tmp_path):
    demo = load("demo/demo.py")
    with MetricsLog(tmp_path) as log:
        log.step(0, {"critic/rewards/mean": 0.25})
        log.step(1, {"critic/rewards/mean": float("nan")})
        assert "nothing to compare" in demo.reward_line(tmp_path)
        log.step(1, {"critic/rewards/mean": 0.5})
    assert "0.250 at the start, 0.500 at the end" in demo.reward_line(tmp_path)


def test_sixty_questions_are_held_out_and_never_trained_on(answers):
    from realflow.data.source import open_source

    spec = DataSpec(
        "reasoning_gym",
        {"prompt": "question", "answer": "answer"},
        task="chain_sum",
        options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        size=4000,
        unique="question",
        test=0.3,
    )
    plan = dataclasses.replace(make_plan(), graph=dataclasses.replace(make_graph(), data=spec))
    questions = answers.held_out(plan)
    source = open_source(spec, seed=1)
    trained = {source.row(place)["prompt"] for place in range(len(source))}
    assert len(questions) == 60 and len(trained) == 140
    assert not trained & {question.prompt for question in questions}


def test_no_checkpoint_is_said(answers, tmp_path):
    with pytest.raises(ValueError, match="no saved actor"):
        answers.checkpoints(tmp_path, make_plan())


def test_padding_changes_no_greedy_answer_and_seeds_repeat(answers, tmp_path):
    from tiny import tiny_model

    tiny_model(tmp_path / "model", seed=3)
    questions = [answers.Question(text, "") for text in ("1", "1 + 2 =", "what is 3 plus 4?")]
    together = answers.generate(tmp_path / "model", questions, max_new_tokens=6)
    alone = [answers.generate(tmp_path / "model", [q], max_new_tokens=6)[0] for q in questions]
    assert together == alone
    drawn = [
        answers.generate(tmp_path / "model", questions, samples=4, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(texts) for texts in drawn[0]] == [4, 4, 4]


def test_a_record_tells_machine_versions_and_commit(tmp_path):
    record = load("record.py")
    path = record.record(tmp_path / "new" / "table.json", {"speed": 1.5})
    content = json.loads(path.read_text())
    assert content["results"] == {"speed": 1.5}
    assert content["machine"]["cores"] >= 1 and content["versions"]["python"].startswith("3.")
    assert {"date", "commit"} <= set(content)
    with pytest.raises(ValueError):
        record.record(tmp_path / "new" / "table.json", {"speed": float("nan")})
    assert [entry.name for entry in path.parent.iterdir()] == ["table.json"]
