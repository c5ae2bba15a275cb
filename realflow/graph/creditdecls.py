"""Declarations of the built-in functions between rewards and losses, as data (see `builtins`): advantages,
credit, what is selected, and the mismatch of rollout and trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from realflow.graph.lossdecls import KL
from realflow.graph.types import FieldUse, FunctionDecl, Range, Scope

MODES = ("truncated", "masked", "none")

_SHARE = Range(least=0, most=1)
_NOT_NEGATIVE = Range(least=0)
_POSITIVE = Range(above=0)

_REWARDS = FieldUse("rewards", "rewards", "sample", "float")
_GROUPED = (_REWARDS, FieldUse("group_ids", "group_id", "sample", "int"))
_LOSS_MASK = FieldUse("loss_mask", "loss_mask", "token", "bool")
_ADVANTAGES = (FieldUse("advantages", "advantages", "sample", "float"),)
_OF_TOKENS = (FieldUse("advantages", "advantages", "token", "float"),)
_SELECTED = (FieldUse("selected", "selected", "sample", "bool"),)
_PLUMBING = (
    FieldUse("token_rewards", "token_rewards", "token", "float", optional=True),
    FieldUse("logprobs", "logprobs", "token", "float", optional=True),
    FieldUse("ref_logprobs", "ref_logprobs", "token", "float", optional=True),
    FieldUse("kl_coefs", "kl_coef", "sample", "float", optional=True),
)
"""What makes up a token's own reward, for every function of `realflow.algorithms.credit`."""
_BOTH_LOGPROBS = (
    FieldUse("logprobs", "prox_logprobs", "token", "float"),
    FieldUse("behaviour_logprobs", "logprobs", "token", "float"),
    _LOSS_MASK,
)
_BAND: Mapping[str, Range] = {"low": _SHARE, "high": Range(least=1)}


def _of_samples(name: str, reads: tuple[FieldUse, ...], scope: Scope, **options: Any) -> FunctionDecl:
    ranges = {"eps": _NOT_NEGATIVE} if "eps" in options else {}
    return FunctionDecl(
        f"advantages.{name}", "function", reads, _ADVANTAGES, scope, options=options, ranges=ranges
    )


def _credit(
    name: str,
    reads: tuple[FieldUse, ...],
    options: Mapping[str, Any],
    ranges: Mapping[str, Range],
    writes: tuple[FieldUse, ...] = _OF_TOKENS,
    scale: tuple[FieldUse, ...] = (),
) -> FunctionDecl:
    """Of tokens, over the whole batch, with a KL in the reward."""
    return FunctionDecl(
        f"credit.{name}",
        "function",
        (*reads, *_PLUMBING, *scale),
        writes,
        "batch",
        options={**options, "kl_coef": 0.0, "kl": "k1"},
        choices={"kl": KL},
        ranges={**ranges, "kl_coef": _NOT_NEGATIVE},
        requires={"kl_coef": "ref_logprobs"},
    )


CREDIT = (
    _of_samples("grpo", _GROUPED, "group", eps=1e-6, scale=True),
    _of_samples("dr_grpo", _GROUPED, "group"),
    _of_samples("rloo", _GROUPED, "group"),
    _of_samples(
        "remax", (_REWARDS, FieldUse("greedy_rewards", "greedy_rewards", "sample", "float")), "sample"
    ),
    _of_samples("lite_ppo", _GROUPED, "batch", eps=1e-6),
    _credit(
        "gae",
        (
            _REWARDS,
            FieldUse("values", "values", "token", "float"),
            _LOSS_MASK,
            FieldUse("finish_reason", "finish_reason", "sample", "text"),
        ),
        {"gamma": 1.0, "lam": 0.95, "whiten": True},
        {"gamma": _SHARE, "lam": _SHARE},
        # returns first: a NaN, which whitening spreads over the batch, is told of its own sample
        (FieldUse("returns", "returns", "token", "float"), *_OF_TOKENS),
        (
            FieldUse("return_mean", "return_mean", "sample", "float", optional=True),
            FieldUse("return_std", "return_std", "sample", "float", optional=True),
        ),
    ),
    _credit("reinforce_pp", (_REWARDS, _LOSS_MASK), {"gamma": 1.0}, {"gamma": _SHARE}),
    _credit("reinforce_pp_baseline", (*_GROUPED, _LOSS_MASK), {"gamma": 1.0}, {"gamma": _SHARE}),
    _credit("critic_free", (_REWARDS, _LOSS_MASK), {"bonus": 5.0, "solved": 0.5}, {"bonus": _POSITIVE}),
    FunctionDecl(
        "select.best_of",
        "function",
        _GROUPED,
        _SELECTED,
        "group",
        options={"keep": 1},
        ranges={"keep": Range(least=1)},
    ),
    FunctionDecl("select.mixed", "function", _GROUPED, _SELECTED, "group"),
    FunctionDecl(
        "mismatch.importance",
        "function",
        _BOTH_LOGPROBS,
        (FieldUse("weights", "weights", "token", "float"),),
        options={"mode": "truncated", "cap": 2.0, "low": 0.5, "high": 5.0},
        choices={"mode": MODES},
        ranges={"cap": _POSITIVE, **_BAND},
    ),
    FunctionDecl(
        "mismatch.monitor",
        "function",
        _BOTH_LOGPROBS,
        scope="batch",
        options={"low": 0.5, "high": 5.0},
        ranges=_BAND,
    ),
    FunctionDecl(
        "mismatch.noise_floor",
        "function",
        (
            FieldUse("logprobs", "prox_logprobs", "token", "float"),
            FieldUse("again_logprobs", "again_logprobs", "token", "float"),
            _LOSS_MASK,
        ),
        scope="batch",
        options={"low": 0.5, "high": 5.0},
        ranges=_BAND,
    ),
)
"""What each reads, writes and takes."""
