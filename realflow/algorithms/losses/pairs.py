"""Pairs: the chosen and the rejected sample of each group, and a value for the two."""

from __future__ import annotations

import torch

from realflow.algorithms.losses.parts import masked
from realflow.data.batch import to_tokens
from realflow.errors import InputError


def pair_places(group_ids: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the chosen and the rejected sample of each group stand: two int64 [G], groups in rising order.

    `group_ids` int64 [S], `chosen` bool [S]. Raises InputError for a group without exactly one of each.
    """
    sides = []
    for side in (chosen.bool(), ~chosen.bool()):
        places = side.nonzero().flatten()
        sides.append(places[group_ids[places].argsort(stable=True)])
    groups, inverse = torch.unique(group_ids, return_inverse=True)
    good = torch.bincount(inverse[sides[0]], minlength=len(groups))
    bad = torch.bincount(inverse[sides[1]], minlength=len(groups))
    wrong = ((good != 1) | (bad != 1)).nonzero().flatten()
    if len(wrong):
        first = wrong[0]
        raise InputError(
            f"a pair loss: group {int(groups[first])} has {int(good[first])} chosen and "
            f"{int(bad[first])} rejected samples; expected one of each ('chosen' and 'rejected' under "
            "data.fields give them)"
        )
    return sides[0], sides[1]


def pair_tokens(
    values: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    lengths: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A value of each pair ([G], in the order of `places`) on every masked token of both samples: [T]."""
    samples = values.new_zeros(len(lengths))
    for side in places:
        samples = samples.index_copy(0, side, values)
    return masked(to_tokens(samples, lengths).to(dtype), mask)
