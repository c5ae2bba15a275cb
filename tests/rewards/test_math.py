"""`rewards.math`: rewards and metrics of completions, what hangs, what cannot be read, options, graphs."""

import time
from pathlib import Path

import pytest

from realflow.engines.functions import load_callable, run_call
from realflow.errors import InputError, RunError
from realflow.graph import load_graph
from realflow.graph.builtins import BUILTINS
from realflow.rewards import MODULES
from realflow.rewards import math as module
from realflow.rewards.math import math

HANG = r"\boxed{\sum_{k=1}^{1000000000} \sin(k^2)}"
UNREADABLE = r"\heartsuit \rightsquigarrow \spadesuit"


def told(found, *names):
    return [found["metrics"][f"reward/math/{name}"] for name in names]


def test_rewards_and_metrics():
    completions = [
        r"\boxed{x^2 - 1}",
        "the answer is 5",
        r"\boxed{6}",
        "I do not know it.",
        "1",
        r"\boxed{1}",
    ]
    found = math(completions, ["(x-1)(x+1)", 5.0, 5, "3", None, ["2", "1"]])
    assert found["rewards"] == [1.0, 1.0, 0.0, 0.0, None, 1.0]
    assert told(found, "missing", "no_truth", "unanswered", "timeout", "error") == [1 / 6, 1 / 6, 1 / 6, 0, 0]


def test_plain_pairs_need_no_worker(monkeypatch):
    monkeypatch.setattr(module, "_pool", None)
    assert math([r"\boxed{1,000}", "x", "0.5"], [1000, "x", ".50"])["rewards"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("on_timeout", "reward"), [("missing", None), ("wrong", 0.0)])
def test_what_hangs_ends_at_its_limit_and_is_no_silent_zero(on_timeout, reward):
    completions = [HANG, r"\boxed{x+1}", HANG, r"\boxed{x+2}"]
    start = time.monotonic()
    found = math(completions, ["5", "1+x", "7", "1+x"], seconds=1.0, on_timeout=on_timeout)
    assert found["rewards"] == [reward, 1.0, reward, 0.0]
    assert told(found, "timeout", "missing") == [0.5, 0.5 if reward is None else 0.0]
    assert time.monotonic() - start < 60


def test_what_hangs_may_be_an_error():
    with pytest.raises(RunError, match=r"1000000000.*'5': took longer than 1 s"):
        math([HANG], ["5"], seconds=1.0, on_timeout="error")


def test_a_worker_that_dies_is_an_error_and_is_replaced(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(module, "FUNCTION", "pool_functions:act")
    module._pool.cache_clear()
    try:
        found = math([r"\boxed{kill}", r"\boxed{give}", r"\boxed{raise}", r"\boxed{give}"], ["x"] * 4)
        assert found["rewards"] == [None, 1.0, None, 1.0]
        assert told(found, "error", "missing", "timeout") == [0.5, 0.5, 0.0]
        with pytest.raises(RunError, match=r"'kill' with 'x': the worker died \(signal 9\)"):
            math([r"\boxed{kill}"], ["x"], on_timeout="error")
    finally:
        module._pool.cache_clear()


def test_a_truth_that_cannot_be_read_is_missing():
    found = math([r"\boxed{5}", rf"\boxed{{{UNREADABLE}}}"], [UNREADABLE] * 2, on_timeout="wrong")
    assert found["rewards"] == [None, 1.0] and told(found, "no_truth", "error") == [0.5, 0.0]


def test_options():
    with pytest.raises(InputError, match=r"on_timeout must be missing, wrong, error, not 'zero'"):
        math(["1"], ["1"], on_timeout="zero")
    for options in ({"seconds": 0}, {"workers": 0}):
        with pytest.raises(InputError, match=r"rewards\.math"):
            math(["1"], ["1"], **options)
    with pytest.raises(ValueError):
        math(["1", "2"], ["1"])


def test_graphs_find_it():
    assert load_callable("rewards.math") is math
    declared = {name.removeprefix("rewards.") for name in BUILTINS if name.startswith("rewards.")}
    assert declared <= set(MODULES)


GRAPH = """
name: answers
models:
  actor: {path: somewhere, optimizer: {name: adamw, lr: 1e-5}}
data: {source: jsonl, path: a.jsonl, fields: {prompt: prompt, answer: answer}}
calls:
  rollout: {model: actor, op: generate, batch: 2 prompts, samples: 2, max_new_tokens: 4}
  reward: {op: function, use: rewards.math, options: {seconds: 4.0, on_timeout: wrong}}
  credit: {op: function, use: advantages.grpo}
  train: {model: actor, op: train, use: losses.ppo_clip}
steps: 1
"""


def test_in_a_graph(tmp_path):
    (tmp_path / "graph.yaml").write_text(GRAPH)
    (tmp_path / "a.jsonl").write_text("")
    graph = load_graph(tmp_path / "graph.yaml")
    call = graph.call("reward")
    values = {"completion": [r"\boxed{x+1}", "5", "six"], "answer": ["1+x", None, 5]}
    arguments = [0, 1, 2], values, [1, 1, 1], graph.extents, graph.dtypes
    found = run_call(load_callable("rewards.math"), call, *arguments)
    assert found.fields == {"rewards": [1.0, None, 0.0]}
    assert found.metrics["reward/math/no_truth"] == found.metrics["reward/math/missing"] == 1 / 3
    (tmp_path / "graph.yaml").write_text(GRAPH.replace("on_timeout: wrong", "on_timeout: zero"))
    with pytest.raises(InputError, match="on_timeout"):
        load_graph(tmp_path / "graph.yaml")
