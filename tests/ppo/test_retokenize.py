"""A reward model with a tokenizer of its own: refused unless its call reads text, and then right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppo_tiny import samples, tiny_scorer
from tiny import CHARACTERS, EOS, tiny_model, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from realflow.api import plan, run
from realflow.cli import main
from realflow.data.text import encode_prompt
from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph
from realflow.graph.retokenize import OF_TEXT
from realflow.graph.types import Call, Retokenize
from realflow.models.vocabularies import vocabulary_problems
from realflow.planfile import read_plan, write_plan
from realflow.runtime.retokenize import Texts

END = "</s>"
GRAPH = """\
name: judged
params: {{dtype: float64, steps: 1, max_length: 400, over: error}}
models:
  actor: {{path: {actor}, dtype: "${{dtype}}", optimizer: {{lr: 1e-3}}}}
  judge: {{path: {judge}, dtype: "${{dtype}}", head: reward}}
data:
  source: jsonl
  path: {data}
  fields: {{prompt: question}}
  system: Be brief
calls:
  rollout: {{model: actor, op: generate, batch: 6 prompts, samples: 4, max_new_tokens: 16}}
  reward: {{model: judge, op: infer, use: rewards{retokenize}}}
  credit: {{op: function, use: advantages.grpo}}
  train: {{model: actor, op: train, use: losses.ppo_clip}}
steps: ${{steps}}
"""
TEXT = ', retokenize: {max_length: "${max_length}", over: "${over}"}'


def judges_tokenizer() -> PreTrainedTokenizerFast:
    """The characters of the tiny tokenizer under other numbers, pairs of letters as one token, another end
    token and another chat template."""
    spelt = {" ": "\u0120", "\n": "\u010a"}
    merges = [("a", "b"), ("ab", "ab"), ("0", "+")]
    names = ["<unk>", END, *reversed([spelt.get(one, one) for one in CHARACTERS]), *map("".join, merges)]
    ids = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", END)])
    template = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[answer] {% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token=END,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An actor, a judge that counts otherwise, questions, and the graph with text and without."""
    found = tmp_path_factory.mktemp("judged")
    actor = tiny_model(found / "actor", dtype="float64", seed=3)
    judge = tiny_scorer(found / "judge", seed=4)
    judges_tokenizer().save_pretrained(judge)
    rows = [{"question": f"{'ab' * (i % 5)}{i}0+{i % 3}="} for i in range(24)]
    (found / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in {"text": TEXT, "tokens": ""}.items():
        text = GRAPH.format(actor=actor, judge=judge, data=found / "prompts.jsonl", retokenize=value)
        (found / f"{name}.yaml").write_text(text)
    return found


# ---- what is refused ------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_without_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder / "tokens.yaml")]) == 2
    told = capsys.readouterr().err
    assert "token 0 of actor is '<pad>', token 0 of judge is '<unk>'" in told
    assert "with 'retokenize: true' the call reads their text" in told
    assert main(["check", str(folder / "text.yaml")]) == 0
    with pytest.raises(InputError, match="retokenize: true"):
        plan(load_graph(folder / "tokens.yaml"), devices=1, layouts="d1")


def test_ppo_with_another_judge_has_a_critic_that_starts_from_the_actor(folder: Path) -> None:
    """What docs/rewards.md says: the critic reads tokens, so it cannot start from such a reward model."""
    settings = [f"model={folder / 'actor'}", f"reward_model={folder / 'judge'}"]
    found = graph_to_mapping(load_graph(find_graph("ppo"), settings))
    found["calls"]["reward"]["retokenize"] = True
    found["models"]["critic"]["path"] = str(folder / "judge")
    where = {problem.where for problem in vocabulary_problems(load_graph(found))}
    assert where == {"models.critic.path"}
    found["models"]["critic"]["path"] = str(folder / "actor")
    assert vocabulary_problems(load_graph(found)) == []


def test_the_planner_counts_with_the_policys_lengths(folder: Path, tmp_path: Path) -> None:
    """As with a judge of the same tokenizer that reads tokens, but for the bytes of these; and a plan file
    keeps it."""
    same = tiny_scorer(tmp_path / "judge", seed=4)
    text = (folder / "tokens.yaml").read_text().replace(str(folder / "judge"), str(same))
    graphs = {"tokens": load_graph(text), "text": load_graph(folder / "text.yaml")}
    plans = {name: plan(graph, devices=2) for name, graph in graphs.items()}
    layouts = {name: made.calls["reward"].layout for name, made in plans.items()}
    assert layouts["text"] == layouts["tokens"]
    seconds = {name: made.calls["reward"].predicted_seconds for name, made in plans.items()}
    assert seconds["text"] == pytest.approx(seconds["tokens"], rel=0.02)
    write_plan(plans["text"], tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml").graph == graphs["text"]


# ---- what is read ---------------------------------------------------------------------------------


def call(**spec: Any) -> Call:
    return Call("reward", "infer", OF_TEXT, model="judge", retokenize=Retokenize(**spec))


def batches(texts: Texts, rows: list[dict[str, Any]], budget: int = 100) -> dict[int, list[int]]:
    """Sample -> its tokens."""
    columns = {name: [row[name] for row in rows] for name in ("prompt", "completion", "finish_reason")}
    found: dict[int, list[int]] = {}
    for batch in texts.batches(columns, range(len(rows)), budget)[0]:
        parts = batch.fields["tokens"].split(batch.lengths.tolist())
        found |= {sample: part.tolist() for sample, part in zip(batch.ids, parts, strict=True)}
        assert len(batch.ids) == 1 or int(batch.lengths.sum()) <= budget
    return found


WORDS = st.text(CHARACTERS, min_size=1, max_size=24)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(WORDS, WORDS, st.sampled_from(["stop", "length"])), min_size=1, max_size=6),
    st.sampled_from([None, "hm"]),
    st.integers(1, 200),
)
def test_with_the_same_tokenizer_it_is_what_the_policy_drew(
    texts: list[tuple[str, str, str]], system: str | None, budget: int
) -> None:
    """Whatever the samples are packed with: prompt and answer, and an end where the policy wrote one."""
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": p, "completion": c, "finish_reason": end} for p, c, end in texts]
    found = batches(Texts(call(), tokenizer, system, 512), rows, budget)
    for sample, row in enumerate(rows):
        drawn = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        drawn += [tokenizer.eos_token_id] * (row["finish_reason"] == "stop")
        assert found[sample] == encode_prompt(tokenizer, row["prompt"], True, system) + drawn


def test_its_own_template_is_used_where_chat_says_so() -> None:
    tokenizer = judges_tokenizer()
    row = {"prompt": "abab", "completion": "0+1", "finish_reason": "stop"}
    shown = {
        chat: tokenizer.decode(batches(Texts(call(chat=chat), tokenizer, None, 512), [row])[0])
        for chat in (True, False)
    }
    assert shown == {True: f"[user] abab\n[answer] 0+1{END}", False: f"abab0+1{END}"}
    assert len(batches(Texts(call(chat=False), tokenizer, None, 512), [row])[0]) == 4  # abab 0+ 1 </s>


@pytest.mark.parametrize(("spec", "positions"), [({"max_length": 10}, 99), ({}, 10)])
def test_what_is_too_long_is_refused_or_cut_and_counted(spec: dict[str, Any], positions: int) -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "12", "completion": "x" * n, "finish_reason": "stop"} for n in (7, 8, 20)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}

    def texts(**more: Any) -> Texts:
        return Texts(call(chat=False, **spec, **more), tokenizer, None, positions)

    with pytest.raises(InputError, match=r"calls\.reward\.retokenize: sample 1 has 11 tokens, more than 10"):
        texts().batches(columns, range(3), 100)
    found, stats = texts(over="truncate").batches(columns, range(3), 100)
    assert found[0].lengths.tolist() == [10, 10, 10]
    assert stats == {"reward/tokens": [30.0, 3.0, 10.0, 10.0], "reward/truncated": [2.0, 3.0, 0.0, 1.0]}
    columns["prompt"][2] = "1" * 10
    with pytest.raises(InputError, match=r"sample 2 has 31 tokens.*its prompt alone fills these"):
        texts(over="truncate").batches(columns, range(3), 100)
    assert texts().batches({"prompt": [], "completion": []}, [], 100) == ([], {})


def test_texts_of_the_data_are_whole(folder: Path) -> None:
    """Without a rollout every completion ends."""
    found, _ = Texts(call(chat=False), tiny_tokenizer(), None, 99).batches(
        {"prompt": ["1"], "completion": ["2"]}, [7], 100
    )
    assert tiny_tokenizer().decode(found[0].fields["tokens"]) == f"12{EOS}"


# ---- real runs ------------------------------------------------------------------------------------


def read(folder: Path, row: dict[str, Any], *, ends: bool = True) -> list[int]:
    """The tokens of a sample of a run as transformers alone makes them; without `ends` the end token is
    always there."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "judge")
    texts = [f"[system] Be brief\n[user] {row['prompt']}\n[answer] ", row["completion"]]
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return ids + [tokenizer.eos_token_id] * (row["finish_reason"] == "stop" or not ends)


@torch.no_grad()
def scores(folder: Path, every: list[list[int]]) -> list[float]:
    """What transformers says of these tokens."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "judge", dtype=torch.float64)
    states = [model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in every]
    return [float(state @ model.score.weight[0]) for state in states]


LAYOUTS = {
    "alone": {"rollout": "d1", "reward": "d1", "train": "d1", "credit": "d1"},
    "tensor": {"rollout": "d2", "reward": "t2", "train": "d2", "credit": "d1@0"},
    "data": {"rollout": "d2", "reward": "d2", "train": "t2", "credit": "d1@0"},
    "pipeline": {"rollout": "t2", "reward": "p2", "train": "p2", "credit": "d1@0"},
    "apart": {"rollout": "d1@0", "reward": "d1@1", "train": "d1@0", "credit": "d1@1"},
}


@pytest.mark.parametrize(
    "layouts", [name if name == "alone" else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
def test_rewards_are_those_of_the_text_in_every_layout(folder: Path, tmp_path: Path, layouts: str) -> None:
    graph, devices = load_graph(folder / "text.yaml"), 1 if layouts == "alone" else 2
    made = plan(graph, devices=devices, layouts=LAYOUTS[layouts])
    (metrics,) = run(made, run_dir=tmp_path / "run", quiet=True).metrics
    rows = list(samples(tmp_path / "run").values())
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    every = [read(folder, row) for row in rows]
    rewards = [row["rewards"] for row in rows]
    # Its rotary angles are float32.
    assert rewards == pytest.approx(scores(folder, every), rel=1e-4)
    ended = scores(folder, [read(folder, row, ends=False) for row in rows])
    assert rewards != pytest.approx(ended, rel=1e-2)  # the control
    assert metrics["reward/truncated/mean"] == 0
    assert metrics["reward/tokens/mean"] == pytest.approx(sum(map(len, every)) / len(every))


@pytest.mark.full
def test_a_run_cuts_and_counts_or_ends(folder: Path, tmp_path: Path) -> None:
    graph = load_graph(folder / "text.yaml", ["max_length=48", "over=truncate"])
    metrics = run(plan(graph, devices=2, layouts="d2"), run_dir=tmp_path / "cut", quiet=True).metrics
    assert 0 < metrics[0]["reward/truncated/mean"] < 1
    graph = load_graph(folder / "text.yaml", ["max_length=48"])
    with pytest.raises(Exception, match="more than 48; set max_length to at least"):
        run(plan(graph, devices=2, layouts="d2"), run_dir=tmp_path / "refused", quiet=True)
