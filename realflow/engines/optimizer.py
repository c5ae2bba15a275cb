"""AdamW on one flat shard of master weights, and learning-rate schedules.

AdamW is Loshchilov and Hutter's (2019), in torch's fused form, on CUDA in NVIDIA apex's where that
is installed. Weight decay is applied here, by parameter, just before the fused step: that is the
order of torch's own AdamW, and it lets one flat tensor carry both kinds of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from realflow.errors import InputError, Problem
from realflow.graph.types import OptimizerSpec

SCHEDULES = ("constant", "linear", "cosine")


def check_spec(spec: OptimizerSpec, total_steps: int | None = None) -> None:
    """Raise InputError for an optimizer that cannot run."""
    problems: list[Problem] = []

    def require(good: bool, where: str, message: str) -> None:
        if not good:
            problems.append(Problem(message, where=f"optimizer.{where}"))

    require(spec.name == "adamw", "name", f"found {spec.name!r}, expected 'adamw'")
    require(0 <= spec.lr < math.inf, "lr", f"found {spec.lr!r}, expected a number of at least 0")
    require(
        all(0 <= beta < 1 for beta in spec.betas), "betas", f"found {spec.betas!r}, expected two in [0, 1)"
    )
    require(spec.weight_decay >= 0, "weight_decay", f"found {spec.weight_decay!r}, expected at least 0")
    require(
        spec.schedule in SCHEDULES,
        "schedule",
        f"found {spec.schedule!r}, expected one of {', '.join(SCHEDULES)}",
    )
    require(
        spec.schedule == "constant" or total_steps is not None,
        "schedule",
        f"{spec.schedule!r} needs the total number of optimizer steps, which is not known",
    )
    if problems:
        raise InputError(problems)


def learning_rate(spec: OptimizerSpec, step: int, total_steps: int | None = None) -> float:
    """Learning rate of optimizer step `step` (0-based).

    It rises in equal parts to `lr` over `warmup_steps`, then stays (constant) or falls to
    `min_lr`, which it reaches after `total_steps` (linear, or half a cosine).
    """
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    if spec.schedule == "constant":
        return spec.lr
    assert total_steps is not None
    progress = min(1.0, (step - spec.warmup_steps) / max(1, total_steps - spec.warmup_steps))
    left = 1 - progress if spec.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return spec.min_lr + (spec.lr - spec.min_lr) * left


class FlatAdamW:
    """AdamW on `master` (1-D, float32 or float64), which it changes in place.

    `decayed` are the views of `master` that weight decay shrinks.
    """

    def __init__(
        self, master: torch.Tensor, spec: OptimizerSpec, decayed: Sequence[torch.Tensor] = ()
    ) -> None:
        self.master = master
        self.spec = spec
        self.exp_avg = torch.zeros_like(master)
        self.exp_avg_sq = torch.zeros_like(master)
        self._decayed = list(decayed) if spec.weight_decay else []
        self._optimizer, self._apex = _fused(master, spec)
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Continue after `step` steps; `exp_avg` and `exp_avg_sq` may be written in place."""
        state: dict[str, Any] = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self._apex:
            self._optimizer.param_groups[0]["step"] = step
        else:  # fused torch wants the count beside the parameter
            state["step"] = torch.tensor(float(step), device=self.master.device)
        self._optimizer.state[self.master] = state

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, lr: float) -> None:
        """One update from `gradient`, of `master`'s shape and dtype."""
        if self._decayed:
            torch._foreach_mul_(self._decayed, 1 - lr * self.spec.weight_decay)
        self._optimizer.param_groups[0]["lr"] = lr
        self.master.grad = gradient
        self._optimizer.step()
        self.master.grad = None


def _fused(master: torch.Tensor, spec: OptimizerSpec) -> tuple[torch.optim.Optimizer, bool]:
    settings: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "weight_decay": 0.0}
    if master.is_cuda:
        try:
            from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
        except ImportError:  # not installed, or the other project of that name: torch's is as good
            pass
        else:
            return FusedAdam([master], adam_w_mode=True, **settings), True
    return torch.optim.AdamW([master], fused=True, **settings), False
