"""Functions of the scenarios' graphs that are not built in."""

from __future__ import annotations

from collections.abc import Sequence

from realflow.graph.functions import function

Floats = Sequence[float]


@function(
    reads={
        "helpful_rewards": "sample float",
        "harmless_rewards": "sample float",
        "values": "token float",
        "logprobs": "token float",
        "ref_logprobs": "token float",
        "safe_logprobs": "token float",
    },
    writes={"advantages": "token float", "returns": "token float"},
    scope="batch",
)
def two_rewards(
    helpful_rewards: Floats,
    harmless_rewards: Floats,
    values: Sequence[Floats],
    logprobs: Sequence[Floats],
    ref_logprobs: Sequence[Floats],
    safe_logprobs: Sequence[Floats],
    *,
    kl_coef: float = 0.02,
) -> tuple[list[list[float]], list[list[float]]]:
    """Undiscounted returns of the sum of both rewards, less the distance to the mean of both references."""
    advantages, returns = [], []
    rows = zip(helpful_rewards, harmless_rewards, values, logprobs, ref_logprobs, safe_logprobs, strict=True)
    for helpful, harmless, value, own, start, safe in rows:
        kl = [kl_coef * (a - (b + c) / 2) for a, b, c in zip(own, start, safe, strict=True)]
        total = helpful + harmless - sum(kl)
        returns.append([total] * len(value))
        advantages.append([total - one for one in value])
    return advantages, returns
