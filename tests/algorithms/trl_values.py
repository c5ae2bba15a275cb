"""Make trl_losses.json: what TRL's trainers compute as losses, and their gradients, on one small batch.

    .venv-trl/bin/python tests/algorithms/trl_values.py    # once; see experiments/vs-trl/setup.sh

The trainers' own methods run on log probabilities that are given, in place of a model's.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import trl
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

LENGTHS = (5, 3, 6, 4)
COLUMNS = ("logprobs", "old", "ref")
GRPO: dict[str, dict[str, Any]] = {
    "ppo_clip": {"loss_type": "bnpo", "epsilon_low": 0.2, "epsilon_high": 0.28},
    "ppo_clip_kl": {"loss_type": "bnpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.1},
    "ppo_clip_dual": {"loss_type": "bnpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "delta": 1.5},
    "ppo_clip_sequence": {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon_low": 0.2, "epsilon_high": 0.2},
    "gspo": {"loss_type": "grpo", "level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.1},
    "cispo": {"loss_type": "cispo", "epsilon_low": 0.2, "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo", "epsilon_low": 0.2, "epsilon_high": 0.2},
}
LONGEST = 16


def drawn() -> dict[str, Any]:
    """Columns of packed tokens, and a mask; two samples a pair, the chosen one first."""
    generator = torch.Generator().manual_seed(5)
    total = sum(LENGTHS)
    columns = {name: -2 * torch.rand(total, generator=generator, dtype=torch.float64) for name in COLUMNS}
    mask = torch.rand(total, generator=generator) > 0.25
    advantages = torch.tensor([1.2, -0.7, 0.5, -1.4], dtype=torch.float64)
    scores = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    return {**columns, "mask": mask, "advantages": advantages, "scores": scores}


def padded(values: torch.Tensor) -> torch.Tensor:
    """[S, longest] of packed values."""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(list(LENGTHS))), batch_first=True)


def trainer(**settings: Any) -> MagicMock:
    """A trainer's attributes, as far as its loss reads them."""
    found = MagicMock()
    found.model.training = True
    found.accelerator.num_processes = 1
    found.accelerator.device = "cpu"
    found.accelerator.gather = found.accelerator.gather_for_metrics = lambda x: x
    found.accelerator.reduce = lambda x, reduction="sum": x
    found._metrics = defaultdict(lambda: defaultdict(list))
    for name, value in settings.items():
        setattr(found, name, value)
    return found


def grpo(batch: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`GRPOTrainer._compute_loss`."""
    now = batch["logprobs"].clone().requires_grad_()
    mask = padded(batch["mask"].long())
    fake = trainer(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=settings.get("level", "token"),
        beta=settings.get("beta", 0.0),
        loss_type=settings["loss_type"],
        epsilon_low=settings["epsilon_low"],
        epsilon_high=settings["epsilon_high"],
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        _entropy_bonus_enabled=False,
    )
    fake.args.use_bias_correction_kl = False
    fake.args.delta = settings.get("delta")
    fake.args.sapo_temperature_pos, fake.args.sapo_temperature_neg = 1.0, 1.05
    fake.args.steps_per_generation = 1
    logps = padded(now)
    fake._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
    empty = torch.zeros(len(LENGTHS), 0, dtype=torch.long)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": padded(batch["old"]),
        "ref_per_token_logps": padded(batch["ref"]),
        "num_items_in_batch": mask.sum().double(),
    }
    loss = GRPOTrainer._compute_loss(fake, fake.model, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradient": now.grad.tolist()}


def dpo(batch: dict[str, Any], kind: str, beta: float = 0.3) -> dict[str, Any]:
    """`DPOTrainer._compute_loss`; chosen samples come before rejected ones there."""
    now = batch["logprobs"].clone().requires_grad_()
    order = [0, 2, 1, 3]

    def shifted(values: torch.Tensor) -> torch.Tensor:  # a column before, which nothing predicts
        found = padded(values * batch["mask"])[order]
        return torch.cat([found.new_zeros(len(found), 1), found], dim=1)

    mask = shifted(torch.ones_like(batch["old"])).long()
    logps, ref = shifted(now)[:, 1:], shifted(batch["ref"])[:, 1:]
    fake = trainer(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
    )
    good, bad = ref.sum(1).chunk(2)
    unused = torch.zeros_like(logps)
    outputs = SimpleNamespace(log_probs=logps, mean_logits=unused, entropy=unused, is_top1=unused.bool())
    fake.model = MagicMock(return_value=outputs)
    inputs = {"input_ids": torch.zeros_like(mask), "completion_mask": mask, "attention_mask": mask}
    inputs |= {"ref_chosen_logps": good, "ref_rejected_logps": bad}
    loss = DPOTrainer._compute_loss(fake, fake.model, inputs, return_outputs=False)
    loss.backward()
    return {"loss": loss.item(), "gradient": now.grad.tolist(), "beta": beta}


def reward(batch: dict[str, Any]) -> dict[str, Any]:
    """`RewardTrainer.compute_loss`; chosen samples come before rejected ones there."""
    scores = batch["scores"].clone().requires_grad_()
    fake = trainer(_total_train_tokens=0, _tp_size=1)
    fake.args.center_rewards_coefficient = None
    model = MagicMock(return_value=SimpleNamespace(logits=scores[[0, 2, 1, 3]][:, None]))
    inputs = {"attention_mask": torch.ones(len(LENGTHS), 1)}
    loss = RewardTrainer.compute_loss(fake, model, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradient": scores.grad.tolist()}


def main() -> None:
    """Write the file beside this one."""
    batch = drawn()
    found = {name: {**grpo(batch, settings), **settings} for name, settings in GRPO.items()}
    found |= {"dpo": dpo(batch, "sigmoid"), "ipo": dpo(batch, "ipo"), "reward_model": reward(batch)}
    data = {name: values.tolist() for name, values in batch.items()}
    made = {
        "trl": trl.__version__,
        "lengths": list(LENGTHS),
        "longest": LONGEST,
        "batch": data,
        "found": found,
    }
    Path(__file__).with_name("trl_losses.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
