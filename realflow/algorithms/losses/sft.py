"""Supervised fine-tuning."""

from __future__ import annotations

import torch

from realflow.algorithms.losses.parts import masked
from realflow.algorithms.terms import LossTerms


def sft(logprobs: torch.Tensor, mask: torch.Tensor) -> LossTerms:
    """Supervised fine-tuning: the cross entropy `-logprobs` of each token of the completion."""
    return LossTerms(-masked(logprobs, mask))
