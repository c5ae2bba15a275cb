"""A user's reward from a graph file to its values, in each signature."""

import pytest

from realflow.engines.functions import load_callable, run_function
from realflow.graph import load_graph

MODULE = """
def trl(completions, answer, **columns):
    assert columns["prompt"] == ["a", "b"], columns
    return [float(c == a) for c, a in zip(completions, answer)]

async def ids(completions, completion_ids):
    return [float(len(row)) for row in completion_ids]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth)}
"""
GRAPH = """
name: user
models:
  actor: {path: somewhere, optimizer: {name: adamw, lr: 1e-5}}
data: {source: jsonl, path: a.jsonl, fields: {prompt: prompt, answer: answer}}
calls:
  rollout: {model: actor, op: generate, batch: 2 prompts, samples: 2, max_new_tokens: 4}
  reward: {op: function, use: "rewards_of_e:FUNCTION"}
  credit: {op: function, use: advantages.grpo}
  train: {model: actor, op: train, use: losses.ppo_clip}
steps: 1
"""


@pytest.mark.parametrize(("name", "expected"), [("trl", [1, 0]), ("ids", [1, 2]), ("compute_score", [1, 0])])
def test_user_reward(tmp_path, name, expected):
    import torch

    (tmp_path / "rewards_of_e.py").write_text(MODULE)
    (tmp_path / "graph.yaml").write_text(GRAPH.replace("FUNCTION", name))
    (tmp_path / "a.jsonl").write_text("")
    graph = load_graph(tmp_path / "graph.yaml")
    call = graph.call("reward")
    values = {
        "completion": ["1", "2"],
        "prompt": ["a", "b"],
        "answer": ["1", "3"],
        "tokens": [torch.tensor([5, 6]), torch.tensor([5, 6, 7])],
        "loss_mask": [torch.tensor([False, True]), torch.tensor([False, True, True])],
    }
    found = run_function(
        load_callable(call.decl.name, tmp_path),
        call,
        [0, 1],
        {field: values[field] for field in call.reads.values()},
        [2, 3],
        graph.extents,
        graph.dtypes,
    )
    assert found == {"rewards": expected}
