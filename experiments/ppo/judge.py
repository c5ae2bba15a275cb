"""The loss of judge.yaml."""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from realflow.algorithms.terms import LossTerms
from realflow.data.batch import to_tokens
from realflow.graph import loss


@loss(reads={"right": "sample float"}, needs=("values",))
def right_or_wrong(values: torch.Tensor, right: torch.Tensor, lengths: torch.Tensor) -> LossTerms:
    """After each token of an answer the model says, as a logit, whether the whole will be right (1) or
    wrong (0); after its last token that is the reward. Metric: `accuracy`."""
    target = to_tokens(right, lengths).to(values.dtype)
    surprise = binary_cross_entropy_with_logits(values, target, reduction="none")
    return LossTerms(surprise, {"accuracy": ((values.detach() > 0) == (target > 0.5)).to(values.dtype)})
