"""The loss of a reward model that learns from pairs."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import logsigmoid

from realflow.algorithms.losses.pairs import pair_places, pair_tokens
from realflow.algorithms.terms import LossTerms


def reward_model(
    scores: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    group_ids: torch.Tensor,
    chosen: torch.Tensor,
) -> LossTerms:
    """Bradley-Terry (arXiv 2203.02155, equation 1): `-log sigmoid(s_chosen - s_rejected)`, where s is
    the model's number at a sample's last token.

    `scores` [T]; `group_ids` (int64 [S]) and `chosen` (bool [S]) say which two samples are a pair.
    Every token of both has the pair's value: normalise by `sequence`. Metrics, of the pair too:
    `accuracy` (1 where the chosen one scores higher), `margin`, `chosen_score`, `rejected_score`.
    Raises InputError for groups that are no pairs.
    """
    ends = (lengths.to(scores.device).cumsum(0) - 1).clamp(min=0)
    numbers = scores[ends].double()
    places = pair_places(group_ids, chosen)
    good, bad = numbers[places[0]], numbers[places[1]]

    put = partial(pair_tokens, places=places, mask=mask, lengths=lengths, dtype=scores.dtype)
    metrics = {
        "accuracy": put((good > bad).double()),
        "margin": put((good - bad).detach()),
        "chosen_score": put(good.detach()),
        "rejected_score": put(bad.detach()),
    }
    return LossTerms(put(-logsigmoid(good - bad)), metrics)
