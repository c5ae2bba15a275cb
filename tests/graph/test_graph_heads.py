"""Models with heads: the PPO graph, and calls that ask a model for what its head does not give."""

from pathlib import Path

import pytest

from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph
from realflow.graph.builtins import BUILTINS
from realflow.graph.functions import OUTPUTS
from realflow.graph.heads import INFER_OUTPUTS, LOSS_OUTPUTS

PPO = find_graph("ppo").read_text()


def line_of(text: str, part: str) -> int:
    """The line on which the first occurrence of `part` ends (a final newline: the one after it)."""
    return text[: text.index(part) + len(part)].count("\n") + 1


def problems(tmp_path: Path, *changes: tuple[str, str]) -> list[str]:
    """What is wrong with the PPO graph once parts of it have been replaced."""
    text = PPO
    for old, new in changes:
        assert text.count(old) == 1, (old, text.count(old))
        text = text.replace(old, new)
    file = tmp_path / "ppo.yaml"
    file.write_text(text)
    try:
        load_graph(file)
    except InputError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_ppo_has_four_models_and_six_calls_on_them() -> None:
    graph = load_graph(find_graph("ppo"))
    assert {name: model.head for name, model in graph.models.items()} == {
        "actor": "lm",
        "critic": "value",
        "ref": "lm",
        "reward": "reward",
    }
    on_models = {call.name: (call.model, call.op) for call in graph.calls if call.model}
    assert on_models == {
        "rollout": ("actor", "generate"),
        "reward": ("reward", "infer"),
        "ref": ("ref", "infer"),
        "values": ("critic", "infer"),
        "train": ("actor", "train"),
        "train_critic": ("critic", "train"),
    }
    assert {model: call.name for model, call in graph.trained().items()} == {
        "actor": "train",
        "critic": "train_critic",
    }
    assert graph.extents["values"] == graph.extents["returns"] == graph.extents["advantages"] == "token"
    assert graph.extents["rewards"] == "sample"
    credit = graph.call("credit")
    assert credit.reads["kl_coefs"] == "kl_coef" and credit.reads["ref_logprobs"] == "ref_logprobs"
    assert graph.call("kl").options["kl_coef"] == 0.02 and graph.call("kl").options["target"] == 0
    assert graph.models["critic"].path == graph.models["reward"].path != graph.models["actor"].path
    assert graph.models["ref"].follows is None  # it stays as it is
    assert "token_rewards" not in credit.reads  # nothing in the graph writes them
    assert load_graph(graph_to_mapping(graph)) == graph


def test_a_checked_answer_may_stand_for_the_reward_model(tmp_path: Path) -> None:
    """What the comment in the file says: one call swapped, one model removed, the critic's start."""
    more = "# `use: rewards.last_number` (no model), remove models.reward, give critic ${model}"
    infer = f"    model: reward  {more}\n"
    swapped = PPO.replace(
        f"{infer}    op: infer\n    use: rewards\n", "    op: function\n    use: rewards.last_number\n"
    )
    start = swapped.index("  reward:  # gives")
    end = swapped.index("# The same questions")
    file = tmp_path / "ppo.yaml"
    file.write_text((swapped[:start] + swapped[end:]).replace("path: ${reward_model}", "path: ${model}"))
    graph = load_graph(file)
    assert set(graph.models) == {"actor", "critic", "ref"}
    assert {model.path for model in graph.models.values()} == {graph.params["model"]}
    assert graph.call("reward").reads == {"completion": "completion", "answer": "answer"}


ACTOR = '    path: ${model}\n    dtype: ${dtype}\n    optimizer: {name: adamw, lr: "${lr}"}'


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        (
            (ACTOR, f"{ACTOR}\n    head: value"),
            "    model: actor",
            "calls.rollout.model: generates, which needs 'head: lm', but model actor (line {actor}) has "
            "'head: value'",
        ),
        (
            ("    head: value\n", ""),
            "use: values",
            "calls.values.use: values needs 'head: value', but model critic (line {critic}) has 'head: lm'; "
            "expected 'use: logprobs' here",
        ),
        (
            ("    head: value\n", ""),
            "use: losses.value_clip",
            "calls.train_critic.use: losses.value_clip needs 'values', which 'head: value' gives, but model "
            "critic (line {critic}) has 'head: lm'; losses for it: losses.ppo_clip, losses.sft",
        ),
        (
            ("    use: losses.value_clip", "    use: losses.sft"),
            "use: losses.sft",
            "calls.train_critic.use: losses.sft needs 'logprobs', which 'head: lm' gives, but model critic "
            "(line {critic}) has 'head: value'; losses for it: losses.value_clip",
        ),
        (
            ("    use: rewards\n", "    use: values\n    writes: {values: v}\n"),
            "    use: values",
            "calls.reward.use: values needs 'head: value', but model reward (line {reward}) has "
            "'head: reward'; expected 'use: rewards' here",
        ),
        (
            ("    head: reward\n", "    head: rewards\n"),
            "head: rewards",
            "models.reward.head: found the text 'rewards', expected one of lm, value, reward; did you mean "
            "'reward'?",
        ),
        (
            ("    head: reward\n", "    head: reward\n    optimizer: {lr: 1e-5}\n"),
            "optimizer: {lr: 1e-5}",
            "models.reward.optimizer: no call trains 'reward'; remove the optimizer or add a train call",
        ),
        (
            ('    optimizer: {name: adamw, lr: "${critic_lr}"}\n', ""),
            "  train_critic:  # values, returns -> new weights of the critic\n",
            "calls.train_critic.model: trains 'critic', which has no optimizer; add 'optimizer' under "
            "models.critic",
        ),
        (
            ("  train_critic:  # values", "  critic_again:\n    model: critic\n    op: train\n"
             "    use: losses.value_clip\n  train_critic:  # values"),
            "  train_critic:  # values, returns -> new weights of the critic\n",
            "trains 'critic', which call critic_again trains too; a model has one train call",
        ),
        (
            ("    writes: {logprobs: ref_logprobs}\n", "    writes: {logprobs: first_logprobs}\n"),
            "  kl:      # logprobs",
            "calls.kl: reads the field 'ref_logprobs', which nothing writes",
        ),
        (
            ("    use: rewards\n", "    use: rewards\n    writes: {rewards: values}\n"),
            "  values:  # tokens",
            "writes the field 'values', which call reward",
        ),
        (
            ("    use: credit.gae\n", "    use: credit.gae\n    reads: {rewards: values}\n"),
            "reads: {rewards: values}",
            "reads the field 'values' (as 'rewards') with a value for each sample, found one for each token",
        ),
        (
            ('    options: {clip: "${value_clip}"}', "    options: {clip_range: 0.2}"),
            "options: {clip_range",
            "unknown key 'clip_range'; known: clip",
        ),
        (
            ('lam: "${lam}"}', 'lam: "${lam}", kl: k5}'),
            "kl: k5",
            "found the text 'k5', expected one of k1, k2, k3",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_head_names_call_model_and_line(
    tmp_path: Path, change: tuple[str, str], where: str, message: str
) -> None:
    found = problems(tmp_path, change)
    text = (tmp_path / "ppo.yaml").read_text()
    lines = {name: line_of(text, f"  {name}: ") for name in ("actor", "critic", "reward")}
    matching = [line for line in found if message.format(**lines) in line]
    assert matching, found
    assert matching[0].split(":")[1] == str(line_of(text, where)), matching[0]


def test_a_model_with_a_reward_head_is_trained_by_losses_of_scores(tmp_path: Path) -> None:
    changes = [
        ("    head: reward\n", "    head: reward\n    optimizer: {lr: 1e-5}\n"),
        (
            "max_staleness: 0  ",
            "  learn:\n    model: reward\n    op: train\n    use: losses.value_clip\n\nmax_staleness: 0  ",
        ),
    ]
    (found,) = problems(tmp_path, *changes)
    assert "has 'head: reward'; losses for it: losses.reward_model" in found


def test_heads_give_what_functions_can_ask_for() -> None:
    outputs = {name for name, decl in BUILTINS.items() if decl.kind == "output"}
    assert set(INFER_OUTPUTS.values()) == outputs
    assert set(OUTPUTS) == {need for given in LOSS_OUTPUTS.values() for need in given}
    asked = {need for decl in BUILTINS.values() if decl.kind == "loss" for need in decl.needs}
    assert asked <= set(OUTPUTS)
    for decl in BUILTINS.values():
        if decl.kind == "loss":
            assert any(set(decl.needs) <= set(given) for given in LOSS_OUTPUTS.values()), decl.name


def test_an_option_that_needs_a_field_is_refused_without_it() -> None:
    """A KL in the reward, and nothing that writes the reference's log probabilities."""
    mapping = graph_to_mapping(load_graph(find_graph("ppo")))
    del mapping["calls"]["kl"], mapping["calls"]["ref"], mapping["models"]["ref"]
    load_graph(mapping)  # the control: without the KL nothing is missing
    mapping["calls"]["credit"]["options"] = {"kl_coef": 0.02}
    with pytest.raises(InputError) as caught:
        load_graph(mapping)
    (problem,) = caught.value.problems
    assert problem.where == "calls.credit.options.kl_coef"
    assert "found 0.02, but nothing writes 'ref_logprobs', which it needs" in problem.message
