"""Direct preference optimisation, and its variant with an identity in place of the sigmoid (IPO)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import logsigmoid

from realflow.algorithms.losses.pairs import pair_places, pair_tokens
from realflow.algorithms.losses.parts import given, masked, sample_sums
from realflow.algorithms.terms import LossTerms
from realflow.graph.builtins import check_options

Put = Callable[[torch.Tensor], torch.Tensor]


def dpo(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    group_ids: torch.Tensor,
    chosen: torch.Tensor,
    *,
    beta: float = 0.1,
) -> LossTerms:
    """DPO (arXiv 2305.18290, equation 7): `-log sigmoid(beta D)`, where D is the chosen completion's
    sum of `logprobs - ref_logprobs` less that of the rejected one.

    `group_ids` (int64 [S]) and `chosen` (bool [S]) say which two samples are a pair. Every token of
    both has the pair's value: normalise by `sequence`. Metrics, of the pair too: `accuracy` (1 where
    D > 0), `margin` (`beta D`), `chosen_reward` and `rejected_reward` (beta times the sums).
    Raises InputError for a `beta` that is not above 0, and for groups that are no pairs.
    """
    check_options("losses.dpo", beta=beta)
    good, bad, put = _log_ratios(logprobs, ref_logprobs, mask, lengths, group_ids, chosen, mean=False)
    margin = beta * (good - bad)
    return LossTerms(put(-logsigmoid(margin)), _metrics(beta * good, beta * bad, put))


def ipo(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    group_ids: torch.Tensor,
    chosen: torch.Tensor,
    *,
    beta: float = 0.1,
) -> LossTerms:
    """IPO (arXiv 2310.12036, equation 17): `(D - 1 / (2 beta))^2`, where D is as in `dpo` with each sum
    divided by the tokens of its completion (which keeps long completions from counting more).

    Arguments, metrics and errors are those of `dpo`.
    """
    check_options("losses.ipo", beta=beta)
    good, bad, put = _log_ratios(logprobs, ref_logprobs, mask, lengths, group_ids, chosen, mean=True)
    return LossTerms(put((good - bad - 1.0 / (2.0 * beta)).square()), _metrics(beta * good, beta * bad, put))


def _log_ratios(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    group_ids: torch.Tensor,
    chosen: torch.Tensor,
    *,
    mean: bool,
) -> tuple[torch.Tensor, torch.Tensor, Put]:
    """Of each pair the sums (or means) of log ratios to the reference: chosen, rejected (float64 [G]); and
    what puts a value of each pair on its tokens."""
    now = masked(logprobs, mask)
    places = pair_places(group_ids, chosen)
    ratios = sample_sums(now - given(ref_logprobs, now, mask), lengths)
    if mean:
        ratios = ratios / sample_sums(mask, lengths).clamp(min=1)
    put = partial(pair_tokens, places=places, mask=mask, lengths=lengths, dtype=now.dtype)
    return ratios[places[0]], ratios[places[1]], put


def _metrics(good: torch.Tensor, bad: torch.Tensor, put: Put) -> dict[str, torch.Tensor]:
    good, bad = good.detach(), bad.detach()
    return {
        "accuracy": put((good > bad).double()),
        "margin": put(good - bad),
        "chosen_reward": put(good),
        "rejected_reward": put(bad),
    }
