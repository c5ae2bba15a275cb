"""AdamW on this rank's pieces of flat master weights, and learning-rate schedules.

AdamW is Loshchilov and Hutter's (2019), in torch's fused form, on CUDA in NVIDIA apex's where that
is installed. Weight decay is applied here, by parameter, just before the fused step: that is the
order of torch's own AdamW, and it lets one flat piece carry both kinds of parameters.
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
    """AdamW on `masters` (1-D, of one dtype and device), which it changes in place.

    `exp_avg` and `exp_avg_sq` are the moments of all masters, one after the other; `decayed` are the
    views of masters that weight decay shrinks.
    """

    def __init__(
        self, masters: Sequence[torch.Tensor], spec: OptimizerSpec, decayed: Sequence[torch.Tensor] = ()
    ) -> None:
        self.masters = list(masters)
        self.spec = spec
        sizes = [len(master) for master in self.masters]
        like = self.masters[0] if self.masters else torch.empty(0)
        self.exp_avg, self.exp_avg_sq = like.new_zeros(sum(sizes)), like.new_zeros(sum(sizes))
        self._moments = list(zip(self.exp_avg.split(sizes), self.exp_avg_sq.split(sizes), strict=True))
        self._decayed = list(decayed) if spec.weight_decay else []
        self._optimizer: torch.optim.Optimizer | None = None
        self._apex = False
        if self.masters:
            self._optimizer, self._apex = _fused(self.masters, spec)
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Continue after `step` steps; `exp_avg` and `exp_avg_sq` may be written in place."""
        if self._optimizer is None:
            return
        if self._apex:
            self._optimizer.param_groups[0]["step"] = step
        for master, (exp_avg, exp_avg_sq) in zip(self.masters, self._moments, strict=True):
            state: dict[str, Any] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            if not self._apex:  # fused torch wants the count beside the parameter
                state["step"] = torch.tensor(float(step), device=master.device)
            self._optimizer.state[master] = state

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], lr: float) -> None:
        """One update from a gradient for each master, of its shape and dtype."""
        if self._optimizer is None:
            return
        if self._decayed:
            torch._foreach_mul_(self._decayed, 1 - lr * self.spec.weight_decay)
        self._optimizer.param_groups[0]["lr"] = lr
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self._optimizer.step()
        for master in self.masters:
            master.grad = None


def _fused(masters: Sequence[torch.Tensor], spec: OptimizerSpec) -> tuple[torch.optim.Optimizer, bool]:
    settings: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "weight_decay": 0.0}
    if masters[0].is_cuda:
        try:
            from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
        except ImportError:  # not installed, or the other project of that name: torch's is as good
            pass
        else:
            return FusedAdam(masters, adam_w_mode=True, **settings), True
    return torch.optim.AdamW(masters, fused=True, **settings), False
