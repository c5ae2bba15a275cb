"""Advantages: how much better each choice was than was to be expected. One file for each algorithm.

Of samples, from the rewards of their group: `grpo`, `dr_grpo`, `rloo`, `remax`, `lite_ppo`. They take
`rewards` ([S], NaN where a sample has none), and `group_ids` (int64 [S]) where a group is compared, and
return [S] in the dtype of `rewards`. Groups are found by id, never by position, and keep their
real size: a sample without a reward counts in no mean and has advantage 0, as has a group of one.

Of tokens: `gae`, `reinforce_pp`, `reinforce_pp_baseline`, `critic_free`. They take packed tokens
([T], the samples one after the other), their `lengths` (int64 [S]) and `mask` (bool [T], the tokens that
the policy chose), and return float64 [T] that is exactly 0 outside of the mask.

Nothing gives NaN for groups of one, all-equal groups or samples without a token in the mask.
"""

from realflow.algorithms.advantages.critic_free import critic_free
from realflow.algorithms.advantages.dr_grpo import dr_grpo
from realflow.algorithms.advantages.gae import gae
from realflow.algorithms.advantages.grpo import grpo
from realflow.algorithms.advantages.lite_ppo import lite_ppo
from realflow.algorithms.advantages.reinforce_pp import reinforce_pp, reinforce_pp_baseline
from realflow.algorithms.advantages.remax import remax
from realflow.algorithms.advantages.rloo import rloo
from realflow.algorithms.advantages.whitening import whitened

__all__ = [
    "critic_free",
    "dr_grpo",
    "gae",
    "grpo",
    "lite_ppo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "rloo",
    "whitened",
]
