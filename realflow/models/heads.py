"""The number that a value or reward head gives for each row."""

from __future__ import annotations

import torch
from torch import nn

from realflow.models.causal import CausalModel


def values(model: CausalModel, rows: torch.Tensor) -> torch.Tensor:
    """[R] in float32 (float64 for float64 models): the head's number for hidden states `rows` [R, H].

    Every tensor rank of the last stage has the whole head and gets the same numbers and gradients.
    """
    assert model.head_kind != "lm" and model.stage.ends, "no value or reward head on this stage"
    head = model.module.get_submodule("score")
    assert isinstance(head, nn.Linear)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    return torch.mv(rows.to(wide), head.weight[0].to(wide))
