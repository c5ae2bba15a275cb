"""Losses and gradients equal those that TRL's trainers compute (trl_losses.json, made by trl_values.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from realflow.algorithms import losses

MADE = json.loads(Path(__file__).with_name("trl_losses.json").read_text())
LENGTHS = torch.tensor(MADE["lengths"])
BATCH = {name: torch.tensor(values, dtype=torch.float64) for name, values in MADE["batch"].items()}
MASK = BATCH["mask"].bool()
PAIRS = {"group_ids": torch.tensor([0, 0, 1, 1]), "chosen": torch.tensor([True, False, True, False])}
CLIP = {"clip_low": 0.2, "clip_high": 0.2}

POLICY: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "ppo_clip": ("ppo_clip", "token", {"clip_low": 0.2, "clip_high": 0.28}),
    "ppo_clip_kl": ("ppo_clip", "token", {**CLIP, "kl_coef": 0.1, "ref_logprobs": BATCH["ref"]}),
    "ppo_clip_dual": ("ppo_clip", "token", {**CLIP, "dual_clip": 1.5}),
    "ppo_clip_sequence": ("ppo_clip", "sequence", CLIP),
    "dr_grpo": ("ppo_clip", {"constant": MADE["longest"]}, CLIP),
    "gspo": ("gspo", "sequence", {"clip_low": 0.05, "clip_high": 0.1, "lengths": LENGTHS}),
    "cispo": ("cispo", "token", {"clip_low": 1.0, "clip_high": 0.3}),
    "sapo": ("sapo", "sequence", {}),
}


def policy(name: str, **more: Any) -> tuple[float, torch.Tensor]:
    """One of our losses of a policy on TRL's batch, and its gradient."""
    which, mode, options = POLICY[name]
    now = BATCH["logprobs"].clone().requires_grad_()
    advantages = torch.repeat_interleave(BATCH["advantages"], LENGTHS)
    terms = getattr(losses, which)(now, BATCH["old"], advantages, MASK, **{**options, **more})
    loss = losses.aggregate(terms.per_token, MASK, LENGTHS, mode)
    loss.backward()
    assert now.grad is not None
    return loss.item(), now.grad


def same(found: tuple[float, torch.Tensor], wanted: dict[str, Any]) -> bool:
    gradient = torch.tensor(wanted["gradient"], dtype=torch.float64)
    return abs(found[0] - wanted["loss"]) < 1e-6 and float((found[1] - gradient).abs().max()) < 1e-6


@pytest.mark.parametrize("name", POLICY)
def test_losses_of_policies(name: str) -> None:
    wanted = MADE["found"][name]
    assert same(policy(name), wanted)
    assert sum(value != 0 for value in wanted["gradient"]) >= 3


def test_other_options_would_be_noticed() -> None:
    """The control: narrower bounds, another temperature, another weight of the KL."""
    other: dict[str, dict[str, float]] = {
        "ppo_clip": {"clip_low": 0.01, "clip_high": 0.01},
        "ppo_clip_kl": {"kl_coef": 0.11},
        "ppo_clip_dual": {"dual_clip": 1.1},
        "gspo": {"clip_low": 0.0, "clip_high": 0.0},
        "cispo": {"clip_high": 0.0},
        "sapo": {"tau_negative": 1.0},
    }
    unnoticed = [
        name for name, options in other.items() if same(policy(name, **options), MADE["found"][name])
    ]
    assert unnoticed == []


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_dpo(name: str) -> None:
    wanted, found = MADE["found"][name], []
    for beta in (wanted["beta"], 1.1 * wanted["beta"]):
        now = BATCH["logprobs"].clone().requires_grad_()
        terms = getattr(losses, name)(now, BATCH["ref"], MASK, LENGTHS, **PAIRS, beta=beta)
        loss = losses.aggregate(terms.per_token, MASK, LENGTHS, "sequence")
        loss.backward()
        assert now.grad is not None
        found.append(same((loss.item(), now.grad), wanted))
    assert found == [True, False], "with TRL's beta, and with another one (the control)"


def test_reward_model() -> None:
    """Scores stand on the last tokens."""
    wanted = MADE["found"]["reward_model"]
    scores = BATCH["scores"].clone().requires_grad_()
    every = torch.repeat_interleave(scores, LENGTHS)
    terms = losses.reward_model(every, torch.ones_like(MASK), LENGTHS, **PAIRS)
    loss = losses.aggregate(terms.per_token, torch.ones_like(MASK), LENGTHS, "sequence")
    loss.backward()
    assert scores.grad is not None and same((loss.item(), scores.grad), wanted)
    assert not same((loss.item(), -scores.grad), wanted)
