"""What a loss function returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LossTerms:
    """`per_token` ([T], with gradient) is weighted, masked and summed by the engine; `metrics`
    holds detached [T] tensors, whose means over the loss tokens of the minibatch are reported."""

    per_token: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
