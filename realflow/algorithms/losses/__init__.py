"""Losses: a value for each token. The engine masks, weighs and sums them.

Arguments are packed and aligned with `tokens` ([T]; entry i speaks of `tokens[i]`); `mask` (bool [T])
marks the tokens that count, `lengths` (int64 [S]) counts each sample's tokens. Values at masked tokens
are exactly 0, whatever stands there (NaN too), and no gradient comes from them.

A loss looks at one sample at a time, those of pairs at the two of one group. Each is one file; what
several share is in `parts` and `pairs`.
"""

from realflow.algorithms.losses.aggregate import aggregate
from realflow.algorithms.losses.cispo import cispo
from realflow.algorithms.losses.decoupled_ppo import decoupled_ppo
from realflow.algorithms.losses.distill import distill
from realflow.algorithms.losses.dpo import dpo, ipo
from realflow.algorithms.losses.gspo import gspo
from realflow.algorithms.losses.m2po import m2po
from realflow.algorithms.losses.ppo_clip import ppo_clip
from realflow.algorithms.losses.reward_model import reward_model
from realflow.algorithms.losses.sapo import sapo
from realflow.algorithms.losses.sft import sft
from realflow.algorithms.losses.value_clip import value_clip

__all__ = [
    "aggregate",
    "cispo",
    "decoupled_ppo",
    "distill",
    "dpo",
    "gspo",
    "ipo",
    "m2po",
    "ppo_clip",
    "reward_model",
    "sapo",
    "sft",
    "value_clip",
]
