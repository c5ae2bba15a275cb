"""Countdown, format, length, reasoning-gym's scorers, and several rewards as one."""

from __future__ import annotations

import json
import math
import operator
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realflow.errors import InputError
from realflow.graph import load_graph
from realflow.rewards.combine import weighted
from realflow.rewards.countdown import arithmetic, countdown, tagged
from realflow.rewards.format import format as form
from realflow.rewards.format import in_tags
from realflow.rewards.gym import _harden, _wire, check_formula, gym, score
from realflow.rewards.length import overlong

# ---------------------------------------------------------------------------------------------- countdown


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<answer>(44 - 19) * 2</answer>", 0.0),
        ("<think>x</think> <answer>44 + 19 + 35</answer>", 1.0),
        ("<answer>1</answer> no: <answer>44 + 19 + 35 = 98</answer>", 1.0),
        ("<answer>44 + 19 + 35 = 99</answer>", 1.0),
        ("<answer>98</answer>", 0.0),
        ("<answer>44 + 44 + 10</answer>", 0.0),
        ("44 + 19 + 35", 0.0),
        ("<answer>44 + 19 + 35", 0.0),
        ("<answer>__import__('os').system('x')</answer>", 0.0),
        ("<answer>44 + 19 + 35 + 0*(lambda: 1)()</answer>", 0.0),
        ("<answer>44+19+35.0</answer>", 0.0),
        ("<answer>-(-44 - 19 - 35)</answer>", 1.0),
        ("<answer>35 + (44 × 19) ÷ 19</answer>", 0.0),
        ("<answer>9**9**9**9</answer>", 0.0),
        ("<answer>" + "(" * 390 + "</answer>", 0.0),
        ("<answer>True + 97</answer>", 0.0),
        ("<answer>44 / (19 - 19)</answer>", 0.0),
    ],
)
def test_countdown(text, reward):
    assert countdown([text], [[44, 19, 35]], [98]) == [reward]


def test_countdown_options():
    some = "<answer>44 + 19</answer>"
    assert countdown([some], [[44, 19, 35]], [63]) == [1.0]
    assert countdown([some], [[44, 19, 35]], [63], use_all=True) == [0.0]
    assert countdown([some], [[44, 19, 35]], [64], format_score=0.1) == [0.1]
    assert countdown(["<answer>no</answer>"], [[44, 19, 35]], [64], format_score=0.1) == [0.0]
    for numbers, target in (([1.5], 2), ("12", 2), ([1], None), ([True], 1)):
        with pytest.raises(ValueError, match="whole numbers"):
            countdown([some], [numbers], [target])


def joined(parts):
    (left, a, used), sign, (right, b, more) = parts
    value = {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](a, b)
    return f"({left} {sign} {right})", value, used + more


TREES = st.recursive(
    st.integers(0, 99).map(lambda n: (str(n), Fraction(n), [n])),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(joined),
    max_leaves=6,
)


@given(TREES)
def test_arithmetic_is_exact(tree):
    text, value, used = tree
    assert arithmetic(text) == (value, used)
    assert countdown([f"<answer>{text}</answer>"], [used], [int(value)]) == [1.0]
    assert countdown([f"<answer>{text}</answer>"], [used], [int(value) + 1]) == [0.0]
    if used:
        assert countdown([f"<answer>{text}</answer>"], [used[1:]], [int(value)]) == [0.0]


@given(st.text("<>/answer 1"))
def test_tags_of_any_text(text):
    found = tagged(text)
    assert found is None or f"<answer>{found}</answer>" in text


# ------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<think>a</think>\n<answer>b</answer>", True),
        ("  <think></think><answer></answer>\n", True),
        ("x<think>a</think><answer>b</answer>", False),
        ("<think>a</think>x<answer>b</answer>", False),
        ("<think>a</think><answer>b</answer>x", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<think>a", False),
        ("", False),
    ],
)
def test_tags(text, good):
    assert form([text])["rewards"] == [float(good)]
    assert in_tags(text, ["think", "answer"]) == good


def test_pattern():
    found = form(["yes: 12", "no"], pattern=r"yes: \d+", seconds=20.0)
    assert found == {
        "rewards": [1.0, 0.0],
        "metrics": {"reward/format/timeout": 0, "reward/format/missing": 0},
    }


def test_a_pattern_that_never_ends_is_missing_and_stops_nothing():
    start = time.monotonic()
    found = form(["a" * 60 + "b", "aa"], pattern="(a+)+", seconds=1.0)
    assert found["rewards"] == [None, 1.0]
    assert found["metrics"]["reward/format/timeout"] == 0.5
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("options", [{"tags": ["a"], "pattern": "a"}, {"tags": "think"}, {"tags": []},
                                     {"tags": ["a", "a"]}, {"pattern": "("}, {"seconds": 0.0}])  # fmt: skip
def test_formats_that_are_refused(options):
    with pytest.raises(InputError, match=r"rewards\.format"):
        form(["x"], **options)


# ------------------------------------------------------------------------------------------------- length


def test_overlong():
    """DAPO's own numbers: expected 16384, cache 4096, so 20480 at most."""
    lengths = [16384, 16385, 18432, 20480, 100]
    mask = torch.ones(sum(lengths), dtype=torch.bool)
    found = overlong(mask, torch.tensor(lengths), limit=20480, buffer=4096, factor=1.0)
    assert found == pytest.approx([0.0, -1 / 4096, -0.5, -1.0, 0.0], abs=1e-12)


@given(
    st.lists(st.lists(st.booleans(), max_size=30), min_size=1, max_size=5),
    st.integers(1, 20),
    st.floats(0, 3),
)
def test_overlong_counts_what_the_policy_wrote(masks, buffer, factor):
    lengths = torch.tensor([len(mask) for mask in masks])
    packed = torch.tensor([bit for mask in masks for bit in mask], dtype=torch.bool)
    found = overlong(packed, lengths, limit=25, buffer=buffer, factor=factor)
    for mask, reward in zip(masks, found, strict=True):
        over = sum(mask) - (25 - buffer)
        assert reward == pytest.approx(-max(0, over) / buffer * factor, abs=1e-12)


# --------------------------------------------------------------------------------------------------- several

NAN = math.nan


def test_weighted():
    a, b = torch.tensor([1.0, 0.0, NAN, NAN]), torch.tensor([0.5, NAN, 1.0, NAN])
    found = weighted(a, b, weights=[1, 0.2], names=["math", "form"])
    assert found["rewards"] == [pytest.approx(1.1), None, None, None]
    assert found["metrics"] == {
        "reward/math": 0.5, "reward/math/missing": 0.5, "reward/form": 0.75, "reward/form/missing": 0.5
    }  # fmt: skip
    left = weighted(a, b, weights=[1, 0.2], missing="part")["rewards"]
    assert left == [pytest.approx(1.1), 0.0, pytest.approx(1.2), None]
    assert weighted(a)["rewards"] == [1.0, 0.0, None, None]


THREE = st.tuples(*[st.floats(-10, 10)] * 3)


@given(st.lists(THREE, min_size=1), THREE)
def test_weighted_sums(rows, weights):
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    for missing in ("sample", "part"):
        found = weighted(*columns, weights=list(weights), missing=missing)["rewards"]
        wanted = [sum(w * x for w, x in zip(weights, row, strict=True)) for row in rows]
        assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("options", [{"weights": [1]}, {"weights": 3}, {"weights": [1, "2"]},
                                     {"weights": [1, NAN]},
                                     {"names": ["a"]}, {"names": ["a", "a"]}, {"names": "ab"}])  # fmt: skip
def test_weights_that_are_refused(options):
    with pytest.raises(InputError, match=r"rewards\.weighted"):
        weighted(torch.tensor([1.0]), torch.tensor([1.0]), **options)


def test_several_rewards_in_a_graph(tmp_path):
    (tmp_path / "graph.yaml").write_text("""
name: several
models:
  actor: {path: somewhere, optimizer: {name: adamw, lr: 1e-5}}
data: {source: jsonl, path: a.jsonl, fields: {prompt: prompt, answer: answer}}
calls:
  rollout: {model: actor, op: generate, batch: 2 prompts, samples: 2, max_new_tokens: 64}
  right: {op: function, use: rewards.last_number, writes: {rewards: right}}
  form: {op: function, use: rewards.format, options: {tags: [think, answer]}, writes: {rewards: form}}
  long: {op: function, use: rewards.overlong, options: {limit: 64, buffer: 16}, writes: {rewards: long}}
  reward:
    op: function
    use: rewards.weighted
    reads: {first: right, second: form, third: long}
    options: {weights: [1, 0.2, 1], names: [right, form, long]}
  credit: {op: function, use: advantages.grpo}
  train: {model: actor, op: train, use: losses.ppo_clip}
steps: 1
""")
    (tmp_path / "a.jsonl").write_text("")
    call = load_graph(tmp_path / "graph.yaml").call("reward")
    assert call.reads == {"first": "right", "second": "form", "third": "long"}


# ------------------------------------------------------------------------------------------------------- gym

TASKS = [
    "spell_backward",
    "spiral_matrix",
    "puzzle24",
    "simple_integration",
    "countdown",
    "prime_factorization",
]


def rows(task, count=2):
    from reasoning_gym.factory import create_dataset

    dataset = create_dataset(task, seed=3, size=count)
    return dataset, [dataset[index] for index in range(count)]


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_reasoning_gym(task):
    dataset, entries = rows(task)
    for entry in entries:
        for answer in (entry["answer"], f"{entry['answer']} ", "12"):
            if answer is not None:
                assert score(task, answer, _wire().encode(entry)) == dataset.score_answer(answer, entry)


def outcome(scorer, *args):
    """A score, or what the scorer raised: some do on answers that they cannot read."""
    try:
        return scorer(*args)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return type(error)


@pytest.mark.full
def test_every_task_scores_as_by_itself():
    """Through JSON and with the evaluating parts replaced: of all tasks, the right answer and a wrong one."""
    from reasoning_gym.factory import DATASETS

    seen = 0
    for task in sorted(set(DATASETS) - {"composite"}):
        dataset, (entry,) = rows(task, 1)
        sent = json.loads(json.dumps(_wire().encode(entry)))
        for answer in (entry["answer"], "12"):
            if answer is not None:
                ours, theirs = (
                    outcome(score, task, answer, sent),
                    outcome(dataset.score_answer, answer, entry),
                )
                assert ours == theirs, task
                seen += 1
    assert seen > 150


def test_gym():
    _, entries = rows("spell_backward", 3)
    texts = [
        f"so <answer>{entries[0]['answer']}</answer>",
        entries[1]["answer"],
        "<answer>zzzzzzzzz</answer>",
    ]
    found = gym(texts, entries, seconds=60.0)
    assert found["rewards"][:2] == [1.0, 1.0] and found["rewards"][2] < 1
    assert found["metrics"] == {"reward/gym/timeout": 0, "reward/gym/error": 0}
    _, primes = rows("prime_factorization", 1)
    assert gym(["no number"], primes, seconds=60.0)["rewards"] == [None]  # its scorer raises on such
    assert gym(["no number"], primes, seconds=60.0, on_timeout="wrong")["rewards"] == [0.0]
    with pytest.raises(ValueError, match="scorer of prime_factorization failed: ValueError"):
        gym(["no number"], primes, seconds=60.0, on_timeout="error")


@pytest.mark.parametrize(
    "entry", [None, {"answer": "1"}, {"answer": "1", "metadata": {"source_dataset": "spel"}}]
)
def test_rows_without_a_task_are_an_error(entry):
    with pytest.raises(ValueError, match=r"entry|no task 'spel'"):
        gym(["1"], [entry])


EVIL = "__import__('pathlib').Path({file!r}).touch()"


@pytest.mark.parametrize("task", ["spiral_matrix", "string_insertion", "binary_matrix", "n_queens",
                                  "puzzle24", "countdown", "simple_integration", "polynomial_multiplication",
                                  "intermediate_integration", "number_sorting"])  # fmt: skip
def test_no_scorer_executes_an_answer(task, tmp_path):
    file = tmp_path / "made"
    _, (entry,) = rows(task, 1)
    try:
        found = score(task, EVIL.format(file=str(file)), _wire().encode(entry))
    except (ValueError, SyntaxError, TypeError, AttributeError):
        found = 0.0
    assert found < 1 and not file.exists()


def test_scorers_would_have_executed_it(tmp_path):
    """The control: with Python's own eval in its place again, it does."""
    import reasoning_gym.algorithmic.spiral_matrix as module

    file = tmp_path / "made"
    dataset, (entry,) = rows("spiral_matrix", 1)
    _harden()
    kept = vars(module).pop("eval")
    try:
        dataset.score_answer(EVIL.format(file=str(file)), entry)
    except TypeError:
        pass
    finally:
        vars(module)["eval"] = kept
    assert file.exists()


@pytest.mark.parametrize(
    "text", ["x**2 + 3*x - 1/2 + C", "sin(x)*exp(-2.5*x)", "(1 + 2) * 3", "sqrt(x) + pi"]
)
def test_formulas(text):
    check_formula(text)


@pytest.mark.parametrize(
    "text", ["x.real", "(1).real", "open('a')", "__x", "a[0]", "exec", "lambda: 1", "x;y", "_"]
)
def test_what_is_no_formula(text):
    with pytest.raises(ValueError, match="no plain formula"):
        check_formula(text)
