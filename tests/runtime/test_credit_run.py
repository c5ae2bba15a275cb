"""Every function between rewards and losses in one small real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import OPTIONS, execute, samples, write_graph

CREDIT = "  credit:\n    op: function\n    use: advantages.grpo\n"
CALLS = """\
  prox: {model: actor, op: infer, use: logprobs, writes: {logprobs: prox_logprobs}}
  weights: {op: function, use: mismatch.importance}
  monitor: {op: function, use: mismatch.monitor}
  again: {model: actor, op: infer, use: logprobs, options: {alone: true}, writes: {logprobs: again_logprobs}}
  noise: {op: function, use: mismatch.noise_floor}
  coef: {op: function, use: running.adaptive_kl, options: {kl_coef: 0.05}}
  credit: {op: function, use: credit.reinforce_pp_baseline}
  plain: {op: function, use: credit.reinforce_pp, writes: {advantages: plain}}
  free: {op: function, use: credit.critic_free, writes: {advantages: free}, options: {solved: 0.3}}
  lite: {op: function, use: advantages.lite_ppo, writes: {advantages: lite}}
  best: {op: function, use: select.best_of, options: {keep: 2}}
  mixed: {op: function, use: select.mixed, writes: {selected: mixed}}
  greedy:
    model: actor
    op: generate
    batch: 6 prompts
    samples: 4
    max_new_tokens: 8
    temperature: 0
    writes:
      tokens: greedy_tokens
      logprobs: greedy_logprobs
      loss_mask: greedy_mask
      versions: greedy_versions
      finish_reason: greedy_finish
      group_id: greedy_group
      completion: greedy_completion
  greedy_reward:
    op: function
    use: my_rewards:letters
    reads: {completions: greedy_completion}
    writes: {rewards: greedy_rewards}
  remax: {op: function, use: advantages.remax, writes: {advantages: remax}}
"""


def graph(folder: Path) -> Path:
    """The small graph with all the calls above; those that nothing reads are run all the same."""
    path = write_graph(folder)
    text = path.read_text()
    assert CREDIT in text and OPTIONS in text
    path.write_text(text.replace(CREDIT, CALLS).replace(OPTIONS, ""))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("credit")
    graph(folder)
    return folder


@pytest.fixture(scope="module")
def ran(folder: Path) -> Path:
    """A step on two ranks."""
    execute(folder / "tiny.yaml", folder / "on-2", 2, ("steps=1",))
    return folder / "on-2"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_call_has_metrics_that_make_sense(ran: Path) -> None:
    for step in metrics(ran):
        assert step["mismatch/abs_mean"] < 1e-5 and step["mismatch/q99"] < 1e-5
        assert step["mismatch/frac_outside"] == 0
        assert 0 <= step["mismatch/noise/abs_mean"] <= step["mismatch/noise/q99"] < 1e-12
        assert step["mismatch/noise/frac_outside"] == 0
        assert step["weights/weights/max"] == pytest.approx(1, abs=1e-5)
        for name in ("critic/advantages", "plain/plain", "free/free"):
            assert abs(step[f"{name}/mean"]) < 1e-6 and step[f"{name}/max"] > 0 > step[f"{name}/min"]
        assert step["best/selected/mean"] == 0.5  # two of four
        assert 0 <= step["mixed/mixed/mean"] <= 1
        assert step["lite/lite/max"] > 0 > step["lite/lite/min"]


def test_greedy_answers_are_the_baseline(ran: Path) -> None:
    for step in metrics(ran):
        wanted = step["critic/rewards/mean"] - step["greedy_reward/greedy_rewards/mean"]
        assert step["remax/remax/mean"] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.full
def test_one_rank_finds_what_two_find(folder: Path, ran: Path) -> None:
    execute(folder / "tiny.yaml", folder / "on-1", 1, ("steps=1",))
    one, two = samples(folder / "on-1"), samples(ran)
    assert one.keys() == two.keys()
    assert all(one[name]["completion"] == two[name]["completion"] for name in one)
    names = ("critic/advantages/max", "plain/plain/max", "free/free/max", "lite/lite/max", "remax/remax/mean")
    for first, second in zip(metrics(folder / "on-1"), metrics(ran), strict=True):
        for name in (*names, "actor/pg_loss", "actor/grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-6, abs=1e-9), name
