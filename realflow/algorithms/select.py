"""Which samples and groups are worth learning from. Groups are found by id, never by position."""

from __future__ import annotations

import torch

from realflow.algorithms.advantages.groups import check_samples
from realflow.graph.builtins import check_options


def best_of(rewards: torch.Tensor, group_ids: torch.Tensor, *, keep: int = 1) -> torch.Tensor:
    """The `keep` samples of each group with the highest rewards: bool [S].

    Of equal ones the earlier samples are taken; a sample without a reward (NaN) never is, so that a
    group may keep fewer. Raises InputError for a `keep` below 1.
    """
    check_options("select.best_of", keep=keep)
    check_samples("rewards", rewards, "group_ids", group_ids)
    present = ~rewards.isnan()
    ranked = torch.where(present, rewards.detach().double(), -torch.inf).sort(descending=True, stable=True)
    order = ranked.indices[group_ids[ranked.indices].sort(stable=True).indices]  # group by group, best first
    _, counts = group_ids[order].unique_consecutive(return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rank = torch.arange(len(order), device=order.device) - starts
    selected = torch.zeros_like(present)
    selected[order] = rank < keep
    return selected & present


def mixed(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Whether the rewards of a sample's group differ: bool [S], one answer for all samples of a group.

    Of rewards that are 0 or 1 these are the groups that are neither always nor never solved: from the
    others advantages within a group learn nothing (DAPO, arXiv 2503.14476, section 3.2). Missing rewards
    (NaN) are left out; a group with fewer than two is not mixed.
    """
    check_samples("rewards", rewards, "group_ids", group_ids)
    values = rewards.detach().double()
    present = ~values.isnan()
    distinct, inverse = torch.unique(group_ids, return_inverse=True)
    start = values.new_zeros(len(distinct))
    lowest, highest = (
        start.scatter_reduce(0, inverse, torch.where(present, values, empty), how, include_self=False)
        for how, empty in (("amin", torch.inf), ("amax", -torch.inf))
    )
    return (lowest < highest)[inverse]
