"""Declarations of the built-in functions, as data, so that checking a graph imports no torch.

A test holds them equal to the functions in `realflow.rewards` and `realflow.algorithms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from realflow.errors import InputError
from realflow.graph.creditdecls import CREDIT
from realflow.graph.lossdecls import LOSSES
from realflow.graph.rewarddecls import REWARDS
from realflow.graph.types import FieldUse, FunctionDecl, Kind, Range, Scope

_SHARE = Range(least=0, most=1)
_NOT_NEGATIVE = Range(least=0)

GENERATE = FunctionDecl(
    "generate",
    "function",
    reads=(
        FieldUse("prompt", "prompt", "prompt", "any"),
        FieldUse("draw_id", "draw_id", "prompt", "int", optional=True),
    ),
    writes=(
        FieldUse("tokens", "tokens", "token", "int"),
        FieldUse("logprobs", "logprobs", "token", "float"),
        FieldUse("loss_mask", "loss_mask", "token", "bool"),
        FieldUse("versions", "versions", "token", "int"),
        FieldUse("finish_reason", "finish_reason", "sample", "text"),
        FieldUse("group_id", "group_id", "sample", "int"),
        FieldUse("completion", "completion", "sample", "text"),
    ),
)
"""What every generate call reads and writes.

Where the data has a field `draw_id`, sample k of a prompt is drawn with the random numbers of the id
`draw_id + k` in place of its own: draws then do not depend on where a prompt stands in the data."""

TOKENS = FieldUse("tokens", "tokens", "token", "int")
LOSS_MASK = FieldUse("loss_mask", "loss_mask", "token", "bool")

TRAIN_READS = (TOKENS, LOSS_MASK)
"""What every train call reads beside what its loss declares."""

PAIR_FIELDS = (
    FieldUse("group_id", "group_id", "sample", "int"),
    FieldUse("chosen", "chosen", "sample", "bool"),
)
"""What data of pairs writes of each sample, beside its tokens."""

_REWARDS = (FieldUse("rewards", "rewards", "sample", "float"),)
_ANSWERED = (
    FieldUse("completion", "completion", "sample", "text"),
    FieldUse("answer", "answer", "sample", "any"),
)


def _declare(
    name: str, kind: Kind, reads: tuple[FieldUse, ...] = (), writes: tuple[FieldUse, ...] = (),
    *, scope: Scope = "sample", options: Mapping[str, Any] | None = None, needs: tuple[str, ...] = (),
    choices: Mapping[str, tuple[Any, ...]] | None = None, ranges: Mapping[str, Range] | None = None,
    requires: Mapping[str, str] | None = None, state: Mapping[str, Any] | None = None,
) -> FunctionDecl:  # fmt: skip
    return FunctionDecl(
        name, kind, reads, writes, scope, options or {}, needs, choices or {}, ranges or {}, requires or {},
        state=state or {},
    )  # fmt: skip


BUILTINS: Mapping[str, FunctionDecl] = MappingProxyType(
    {
        decl.name: decl
        for decl in (
            _declare("rewards.last_number", "function", _ANSWERED, _REWARDS),
            _declare("rewards.boxed", "function", _ANSWERED, _REWARDS),
            *REWARDS,
            _declare(
                "rewards.math",
                "function",
                _ANSWERED,
                _REWARDS,
                options={"seconds": 5.0, "workers": 1, "on_timeout": "missing"},
                choices={"on_timeout": ("missing", "wrong", "error")},
                ranges={"seconds": Range(above=0), "workers": Range(least=1)},
            ),
            *CREDIT,
            _declare(
                "masks.m2po",
                "function",
                (
                    FieldUse("logprobs", "logprobs", "token", "float"),
                    FieldUse("prox_logprobs", "prox_logprobs", "token", "float"),
                    LOSS_MASK,
                ),
                (FieldUse("m2po_mask", "m2po_mask", "token", "bool"),),
                scope="batch",
                options={"threshold": 0.04},
                ranges={"threshold": Range(above=0)},
            ),
            _declare(
                "masks.selected",
                "function",
                (
                    LOSS_MASK,
                    FieldUse("selected", "selected", "sample", "bool"),
                    FieldUse("rewards", "rewards", "sample", "float"),
                ),
                (FieldUse("selected_mask", "selected_mask", "token", "bool"),),
                options={"above": 0.0},
            ),
            _declare(
                "running.adaptive_kl",
                "function",
                (
                    FieldUse("logprobs", "logprobs", "token", "float"),
                    FieldUse("ref_logprobs", "ref_logprobs", "token", "float"),
                    LOSS_MASK,
                ),
                (FieldUse("kl_coef", "kl_coef", "sample", "float"),),
                scope="batch",
                options={"kl_coef": 0.1, "target": 0.1, "horizon": 10000.0},
                ranges={"kl_coef": _NOT_NEGATIVE, "target": _NOT_NEGATIVE, "horizon": Range(least=1)},
                state={"kl_coef": 0.1},
            ),
            _declare(
                "running.normalise_returns",
                "function",
                (FieldUse("rewards", "rewards", "sample", "float"),),
                (
                    FieldUse("return_mean", "return_mean", "sample", "float"),
                    FieldUse("return_std", "return_std", "sample", "float"),
                ),
                scope="batch",
                options={"beta": 0.99, "floor": 0.1, "anchored": False},
                ranges={"beta": _SHARE, "floor": Range(above=0)},
                state={"mean": 0.0, "square": 0.0, "weight": 0.0, "first_mean": 0.0, "first_std": 1.0},
            ),
            *LOSSES,
            _declare(
                "logprobs",
                "output",
                (TOKENS, FieldUse("loss_mask", "loss_mask", "token", "bool", optional=True)),
                (FieldUse("logprobs", "logprobs", "token", "float"),),
                options={"alone": False},  # each sample in a micro-batch of its own
            ),
            _declare("values", "output", (TOKENS,), (FieldUse("values", "values", "token", "float"),)),
            _declare("rewards", "output", (TOKENS,), _REWARDS),
        )
    }
)


def check_options(name: str, **options: float | None) -> None:
    """What a built-in function asks of numbers that a program calls it with: those of a graph are checked
    when it is read. None, where it is an option's default, is in every range. Raises InputError."""
    for option, value in options.items():
        wanted = BUILTINS[name].ranges[option]
        if value is not None and value not in wanted:
            raise InputError(f"{name}: {option} must be {wanted}, not {value}")
