"""Rollout and trainer compute the same log probabilities by other kernels, and do not quite agree.

`importance` weighs each token by how much likelier the trainer finds it than the rollout did, within
bounds; `monitor` says how far apart the two are, by quantiles and not only by means; `noise_floor` says
the same of the trainer and itself, so that it is known how much of that is rounding alone.
"""

from __future__ import annotations

from typing import Literal

import torch

from realflow.algorithms.kl import bounded_exp
from realflow.errors import InputError
from realflow.graph.builtins import check_options

MODES = ("truncated", "masked", "none")
LOW, HIGH = 0.5, 5.0
"""The band of ratios that is trusted (IcePop's)."""


def importance(
    logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    mode: Literal["truncated", "masked", "none"] = "truncated",
    cap: float = 2.0,
    low: float = LOW,
    high: float = HIGH,
) -> torch.Tensor:
    """Weights of tokens, [T] in the dtype of `logprobs`, 0 outside of `loss_mask`.

    With the ratio `w = exp(logprobs - behaviour_logprobs)` of the trainer's probability (of the same
    weights, before it takes a step) to that with which the rollout drew the token, both [T]:
    `truncated` importance sampling weighs by `min(w, cap)`, `masked` (IcePop) by w where
    `low <= w <= high` and by 0 elsewhere, `none` by 1. The log ratio is clamped to ±20. Raises
    InputError for options out of their range.
    """
    check_options("mismatch.importance", cap=cap, low=low, high=high)
    ratio = bounded_exp(_differences(logprobs, behaviour_logprobs))
    if mode == "truncated":
        weights = ratio.clamp(max=cap)
    elif mode == "masked":
        weights = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    elif mode == "none":
        weights = torch.ones_like(ratio)
    else:
        raise InputError(f"mismatch.importance: unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    return torch.where(loss_mask.bool(), weights, 0.0).to(logprobs.dtype)


def distances(
    logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    low: float = LOW,
    high: float = HIGH,
) -> dict[str, float]:
    """How far the trainer's log probabilities are from the rollout's over the tokens of `loss_mask`.

    `abs_mean` and `q99`: mean and 99 % quantile (interpolated) of `|logprobs - behaviour_logprobs|`;
    `frac_outside`: the fraction of tokens whose ratio is not in [low, high]. Empty where no token counts.
    """
    differences = _differences(logprobs, behaviour_logprobs)[loss_mask.bool()]
    if not len(differences):
        return {}
    ratio = bounded_exp(differences)
    sizes = differences.abs()
    return {
        "abs_mean": sizes.mean().item(),
        "q99": _quantile(sizes, 0.99),
        "frac_outside": ((ratio < low) | (ratio > high)).double().mean().item(),
    }


def monitor(
    logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    low: float = LOW,
    high: float = HIGH,
) -> dict[str, dict[str, float]]:
    """`distances` as metrics of the step: `mismatch/abs_mean`, `mismatch/q99`, `mismatch/frac_outside`.

    Raises InputError for options out of their range.
    """
    check_options("mismatch.monitor", low=low, high=high)
    return _reported("mismatch", distances(logprobs, behaviour_logprobs, loss_mask, low=low, high=high))


def noise_floor(
    logprobs: torch.Tensor,
    again_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    low: float = LOW,
    high: float = HIGH,
) -> dict[str, dict[str, float]]:
    """`distances` of the trainer from itself: `mismatch/noise/abs_mean`, `mismatch/noise/q99` and
    `mismatch/noise/frac_outside`.

    Both fields, [T], are the trainer's log probabilities under the same weights, `again_logprobs` of the
    same samples in other micro-batches: other sizes of matrices are summed in another order. A mismatch
    that is no larger is no bug, and no kernel of the rollout can lower it. Raises InputError for options out
    of their range.
    """
    check_options("mismatch.noise_floor", low=low, high=high)
    return _reported("mismatch/noise", distances(logprobs, again_logprobs, loss_mask, low=low, high=high))


def _reported(name: str, found: dict[str, float]) -> dict[str, dict[str, float]]:
    return {"metrics": {f"{name}/{key}": number for key, number in found.items()}}


def _differences(logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.detach().double() - behaviour_logprobs.detach().double()


def _quantile(values: torch.Tensor, share: float) -> float:
    """As `torch.quantile`, which takes no more than 16 million values."""
    place = share * (len(values) - 1)
    ordered = values.sort().values
    low, high = ordered[int(place)].item(), ordered[min(int(place) + 1, len(values) - 1)].item()
    return low + (high - low) * (place - int(place))
