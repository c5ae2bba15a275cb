"""One PPO step by hand, with the engines: what the actor, the critic and the reward model do in it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from ppo_tiny import tiny_scorer
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from realflow.algorithms.credit import gae
from realflow.algorithms.losses import ppo_clip, value_clip
from realflow.data.batch import Batch, pack
from realflow.engines import infer as inference
from realflow.engines import objective
from realflow.engines.infer import infer
from realflow.engines.train import TrainEngine
from realflow.graph.heads import INFER_OUTPUTS, LOSS_OUTPUTS
from realflow.graph.types import OptimizerSpec
from realflow.models.causal import CausalModel, load_model
from realflow.models.precision import full_precision

LENGTHS = (9, 14, 6, 11)
PROMPT = 3
EXTENTS = {"tokens": "token", "loss_mask": "token"}
DTYPES = {"tokens": "int", "loss_mask": "bool"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    tiny_model(folder / "actor", dtype="float64", seed=3)
    tiny_scorer(folder / "scorer", seed=4)
    return folder


@pytest.fixture
def actor(folder: Path) -> CausalModel:
    return load_model(folder / "actor", dtype="float64")


@pytest.fixture
def critic(folder: Path) -> CausalModel:
    return load_model(folder / "scorer", dtype="float64", head="value")


def samples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(4, 90, (length,), generator=generator) for length in LENGTHS]
    masks = [(torch.arange(length) >= PROMPT) & (torch.arange(length) != PROMPT + 2) for length in LENGTHS]
    return list(zip(tokens, masks, strict=True))


def batch(rows: list[tuple[torch.Tensor, torch.Tensor]], **fields: list[torch.Tensor]) -> Batch:
    values = {"tokens": [t for t, _ in rows], "loss_mask": [m for _, m in rows], **fields}
    return pack(
        range(len(rows)),
        [len(t) for t, _ in rows],
        values,
        {**EXTENTS, **dict.fromkeys(fields, "token")},
        {**DTYPES, **dict.fromkeys(fields, "float")},
    )


def credited(actor: CausalModel, critic: CausalModel, folder: Path) -> dict[str, list[torch.Tensor]]:
    """The fields of a step: logprobs, values, advantages and returns of every sample."""
    rows = samples()
    scorer = load_model(folder / "scorer", dtype="float64", head="reward")
    ref = load_model(tiny_model(folder / "ref", dtype="float64", seed=5), dtype="float64")
    packed = batch(rows)
    logprobs = infer(actor, [packed], "logprobs", 1.0)
    values = infer(critic, [packed], "values", 1.0)
    found = gae(
        torch.tensor([float(value) for value in infer(scorer, [packed], "rewards", 1.0)]).double(),
        torch.cat(values),
        packed.fields["loss_mask"],
        ["stop", "length", "stop", "length"],
        packed.lengths,
        logprobs=torch.cat(logprobs),
        ref_logprobs=torch.cat(infer(ref, [packed], "logprobs", 1.0)),
        kl_coef=0.05,
    )
    return {
        "logprobs": logprobs,
        "values": values,
        **{name: list(column.split(list(LENGTHS))) for name, column in found.items()},
    }


def test_graphs_and_engines_agree_on_what_heads_give() -> None:
    assert all(INFER_OUTPUTS[head] == given[0] for head, given in inference.OUTPUTS.items())
    assert {head: given for head, given in LOSS_OUTPUTS.items() if given} == dict(objective.OUTPUTS)


@torch.no_grad()
def test_values_and_rewards_are_what_a_sequence_classifier_says(critic: CausalModel, folder: Path) -> None:
    """Entry i is the number after token i, for every token; a reward is the one at the last token."""
    module = AutoModelForSequenceClassification.from_pretrained(folder / "scorer", dtype=torch.float64)
    rows = samples()
    values = infer(critic, [batch(rows[:3]), batch(rows[3:])], "values", 1.0)
    scorer = load_model(folder / "scorer", dtype="float64", head="reward")
    rewards = infer(scorer, [batch(rows[:3]), batch(rows[3:])], "rewards", 1.0)
    for (tokens, _), value, reward in zip(rows, values, rewards, strict=True):
        with full_precision(torch.float64):
            states = module.model(input_ids=tokens[None]).last_hidden_state
            whole = module(input_ids=tokens[None]).logits[0, 0]
        torch.testing.assert_close(value, module.score(states)[0, :, 0], rtol=1e-9, atol=1e-9)
        assert float(reward) == pytest.approx(float(whole), rel=1e-9)


def test_a_critic_without_a_head_starts_from_zeros(folder: Path) -> None:
    fresh = load_model(folder / "actor", dtype="float64", head="value")
    assert all((value == 0).all() for value in infer(fresh, [batch(samples())], "values", 1.0))


def gain(actor: CausalModel, fields: dict[str, list[torch.Tensor]]) -> float:
    """Sum of mask x advantage x logprob."""
    found = infer(actor, [batch(samples())], "logprobs", 1.0)
    rows = zip(found, fields["advantages"], samples(), strict=True)
    return float(sum((logprob * advantage)[mask].sum() for logprob, advantage, (_, mask) in rows))


def value_error(critic: CausalModel, fields: dict[str, list[torch.Tensor]]) -> float:
    """Mean of half the squared distance of the values from the returns."""
    found = infer(critic, [batch(samples())], "values", 1.0)
    rows = zip(found, fields["returns"], samples(), strict=True)
    errors = torch.cat([0.5 * (value.roll(1) - target)[mask].square() for value, target, (_, mask) in rows])
    return float(errors.mean())


SPEC = OptimizerSpec(lr=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_makes_better_tokens_likelier(
    actor: CausalModel, critic: CausalModel, folder: Path, sign: int
) -> None:
    """And, as the control, with negated advantages less likely."""
    fields = credited(actor, critic, folder)
    before = gain(actor, fields)
    given = {"old_logprobs": fields["logprobs"], "advantages": [sign * a for a in fields["advantages"]]}
    engine = TrainEngine(actor, SPEC)
    rows = samples()
    micro_batches = [
        batch(rows[:1], **{name: column[:1] for name, column in given.items()}),
        batch(rows[1:], **{name: column[1:] for name, column in given.items()}),
    ]
    reads = {"old_logprobs": "old_logprobs", "advantages": "advantages"}
    metrics = engine.step(micro_batches, ppo_clip, reads=reads, prefix="actor")
    assert metrics["actor/pg_clipfrac"] == 0 and metrics["actor/grad_norm"] > 0
    assert sign * (gain(actor, fields) - before) > 1e-3


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_brings_values_nearer_to_returns(
    actor: CausalModel, critic: CausalModel, folder: Path, sign: int
) -> None:
    """And, as the control, the negated loss drives them away."""
    fields = credited(actor, critic, folder)
    before = value_error(critic, fields)

    def signed(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor):
        terms = value_clip(values, old_values, returns, mask)
        return type(terms)(sign * terms.per_token, terms.metrics)

    loss = value_clip if sign == 1 else signed
    given = {"old_values": fields["values"], "returns": fields["returns"]}
    metrics = TrainEngine(critic, SPEC).step(
        [batch(samples(), **given)], loss, reads=dict(zip(given, given, strict=True)), prefix="critic"
    )
    assert metrics["critic/vf_loss"] == pytest.approx(before, rel=1e-9)  # the loss is that of the definition
    assert sign * (value_error(critic, fields) - before) < -1e-4


def reference_gradients(folder: Path, fields: dict[str, list[torch.Tensor]], which: str):
    """Gradients of one minibatch by plain Hugging Face modules, one sample at a time."""
    count = sum(int(mask.sum()) for _, mask in samples())
    auto = AutoModelForCausalLM if which == "actor" else AutoModelForSequenceClassification
    name = "actor" if which == "actor" else "scorer"
    module = auto.from_pretrained(folder / name, dtype=torch.float64)
    with full_precision(torch.float64):
        _accumulate(module, fields, which, count)
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def _accumulate(module, fields: dict[str, list[torch.Tensor]], which: str, count: int) -> None:
    for index, (tokens, mask) in enumerate(samples()):
        if which == "actor":
            logits = module(input_ids=tokens[None]).logits[0, :-1]
            logprobs = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
            ratio = torch.exp(logprobs - fields["logprobs"][index][1:] - 0.1)  # off-policy
            gain = fields["advantages"][index][1:]
            per_token = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        else:
            values = module.score(module.model(input_ids=tokens[None]).last_hidden_state)[0, :-1, 0]
            old, target = fields["values"][index][:-1] + 0.05, fields["returns"][index][1:]
            near = torch.minimum(torch.maximum(values, old - 0.2), old + 0.2)
            per_token = 0.5 * torch.maximum((values - target) ** 2, (near - target) ** 2)
        (per_token[mask[1:]].sum() / count).backward()


@pytest.mark.parametrize("which", ["actor", "critic"])
def test_gradients_are_those_of_the_definition(
    actor: CausalModel, critic: CausalModel, folder: Path, which: str
) -> None:
    fields = credited(actor, critic, folder)
    wanted = reference_gradients(folder, fields, which)
    model, loss, given = {
        "actor": (
            actor,
            ppo_clip,
            {
                "old_logprobs": [value + 0.1 for value in fields["logprobs"]],
                "advantages": fields["advantages"],
            },
        ),
        "critic": (
            critic,
            partial(value_clip, clip=0.2),
            {"old_values": [value + 0.05 for value in fields["values"]], "returns": fields["returns"]},
        ),
    }[which]
    start = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    engine = TrainEngine(model, OptimizerSpec(lr=1.0, clip_norm=1e9))
    metrics = engine.step([batch(samples(), **given)], loss, reads=dict(zip(given, given, strict=True)))
    norm = sum(float(gradient.square().sum()) for gradient in wanted.values()) ** 0.5
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-9)
    for name, parameter in model.module.named_parameters():  # Adam's first step: lr x the gradient's sign
        moved, gradient = start[name] - parameter.detach(), wanted[name]
        clear = gradient.abs() > 1e-6
        assert (moved.sign() == gradient.sign())[clear].all(), name
