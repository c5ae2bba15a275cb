"""Declarations of the built-in losses, as data (see `builtins`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from realflow.graph.types import FieldUse, FunctionDecl, Normalise, Range

KL = ("k1", "k2", "k3")

_SHARE = Range(least=0, most=1)
_NOT_NEGATIVE = Range(least=0)
_POSITIVE = Range(above=0)


def _token(name: str, field: str = "", *, optional: bool = False) -> FieldUse:
    return FieldUse(name, field or name, "token", "float", optional)


_ADVANTAGES = _token("advantages")
_OLD = (_token("old_logprobs", "logprobs"), _ADVANTAGES)
_REF = _token("ref_logprobs", optional=True)
_WEIGHTS = _token("weights", optional=True)
_CLIP: Mapping[str, Range] = {"clip_low": _SHARE, "clip_high": _NOT_NEGATIVE}
_DUAL: Mapping[str, Range] = {**_CLIP, "dual_clip": Range(above=1)}
_PAIR = (
    FieldUse("group_ids", "group_id", "sample", "int"),
    FieldUse("chosen", "chosen", "sample", "bool"),
)


def _policy(
    name: str,
    options: Mapping[str, Any],
    ranges: Mapping[str, Range],
    reads: tuple[FieldUse, ...] = (*_OLD, _REF, _WEIGHTS),
    normalise: Normalise = "token",
) -> FunctionDecl:
    """A loss of a policy: beside its own options it has a KL to a reference, and an entropy bonus."""
    return FunctionDecl(
        f"losses.{name}",
        "loss",
        reads,
        options={**options, "kl_coef": 0.0, "kl": "k3", "entropy_coef": 0.0},
        needs=("logprobs", "entropy"),
        choices={"kl": KL},
        ranges={**ranges, "kl_coef": _NOT_NEGATIVE},
        requires={"kl_coef": "ref_logprobs"},
        normalise=normalise,
    )


def _pair(name: str, needs: str, reads: tuple[FieldUse, ...] = (), beta: float | None = None) -> FunctionDecl:
    """A loss of pairs: it sees the two samples of a group together."""
    return FunctionDecl(
        f"losses.{name}",
        "loss",
        (*reads, *_PAIR),
        scope="group",
        options={} if beta is None else {"beta": beta},
        needs=(needs,),
        ranges={} if beta is None else {"beta": _POSITIVE},
        normalise="sequence",
    )


LOSSES = (
    _policy("ppo_clip", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}, _DUAL),
    FunctionDecl("losses.sft", "loss", needs=("logprobs",)),
    FunctionDecl(
        "losses.value_clip",
        "loss",
        (_token("old_values", "values"), _token("returns")),
        options={"clip": 0.2},
        needs=("values",),
        ranges={"clip": _POSITIVE},
    ),
    _policy("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}, _CLIP, normalise="sequence"),
    _policy("cispo", {"clip_low": 1.0, "clip_high": 0.28}, _CLIP),
    _policy(
        "sapo",
        {"tau_positive": 1.0, "tau_negative": 1.05},
        {"tau_positive": _POSITIVE, "tau_negative": _POSITIVE},
    ),
    _policy("m2po", {}, {}),
    _policy(
        "decoupled_ppo",
        {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "cap": None},
        {**_DUAL, "cap": _POSITIVE},
        (_token("prox_logprobs"), _token("behaviour_logprobs", "logprobs"), _ADVANTAGES, _REF),
    ),
    FunctionDecl(
        "losses.distill",
        "loss",
        (
            _token("teacher_logprobs"),
            _token("old_logprobs", "logprobs", optional=True),
            _token("advantages", optional=True),
            _WEIGHTS,
        ),
        options={"coef": 1.0, "clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.0},
        needs=("logprobs", "entropy"),
        ranges={"coef": _NOT_NEGATIVE, **_CLIP},
    ),
    _pair("dpo", "logprobs", (_token("ref_logprobs"),), beta=0.1),
    _pair("ipo", "logprobs", (_token("ref_logprobs"),), beta=0.1),
    _pair("reward_model", "scores"),
)
"""What each loss reads, needs of the model, and takes."""
