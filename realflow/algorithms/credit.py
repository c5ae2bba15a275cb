"""Credit as graphs name it: fields of samples and tokens, made into the arguments of `advantages`.

In every function here a token's own reward is `token_rewards` where the graph has such a field, less
`kl_coef` times the KL estimate of (`logprobs`, `ref_logprobs`). Where the graph has a field `kl_coef`
(a coefficient that adapts), its number for each sample stands in place of the option. A sample's
`rewards` come at its last token that the policy chose. A sample without a reward (NaN) teaches
nobody: its advantages are 0, and it counts in no mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from realflow.algorithms import advantages
from realflow.algorithms.advantages.packed import at_last
from realflow.algorithms.kl import kl_estimate
from realflow.data.batch import to_tokens
from realflow.errors import InputError
from realflow.graph.builtins import check_options

Kind = Literal["k1", "k2", "k3"]


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    finish_reason: Sequence[str],
    lengths: torch.Tensor,
    token_rewards: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coefs: torch.Tensor | None = None,
    return_mean: torch.Tensor | None = None,
    return_std: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_coef: float = 0.0,
    kl: Kind = "k1",
    whiten: bool = True,
) -> dict[str, torch.Tensor]:
    """Generalised advantage estimation (`advantages.gae`): `advantages` and `returns`, [T] in the dtype
    of `values`, 0 at tokens that the policy did not choose.

    Entry i of `values` is the critic's number for the state after token i, so that the choice of
    token i was made in the state of entry i - 1; a sample's first token, which follows no state, is never
    taken as chosen. A sample whose `finish_reason` is not `stop` was cut off and bootstraps from its
    last entry. `whiten` makes the advantages of the batch's chosen tokens mean 0 and (unbiased)
    variance 1, after the returns have been taken.

    Where the graph has `return_mean` and `return_std` ([S], those of all returns so far), the critic
    speaks of normalised returns, `(return - mean) / std`: its values are taken back before anything is
    computed, and `returns` are given to it normalised.

    The returns of a sample without a reward are the critic's own values, so that it learns nothing
    either. Raises InputError for options that make no sense.
    """
    check_options("credit.gae", gamma=gamma, lam=lam, kl_coef=kl_coef)
    chosen = loss_mask.bool() & ~_firsts(lengths)
    rewarded = chosen & ~to_tokens(rewards.isnan(), lengths)
    total = _token_rewards(
        "credit.gae", lengths, loss_mask, token_rewards, logprobs, ref_logprobs, kl_coefs, kl_coef, kl
    )
    total += at_last(rewards, rewarded, lengths)
    scale = _scale(return_mean, return_std, lengths)
    own = values.detach().double()
    wide = own if scale is None else own * scale[1] + scale[0]
    found, returns = advantages.gae(
        total,
        wide.roll(1),
        lengths,
        rewarded,
        gamma=gamma,
        lam=lam,
        bootstrap=_after(finish_reason, wide, lengths),
    )
    if whiten:
        found = advantages.whitened(found, rewarded)
    if scale is not None:
        returns = torch.where(rewarded, (returns - scale[0]) / scale[1], 0.0)
    returns = torch.where(chosen & ~rewarded, own.roll(1), returns)
    return {"advantages": found.to(values.dtype), "returns": returns.to(values.dtype)}


def reinforce_pp(
    rewards: torch.Tensor,
    loss_mask: torch.Tensor,
    lengths: torch.Tensor,
    token_rewards: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coefs: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    kl_coef: float = 0.0,
    kl: Kind = "k1",
) -> torch.Tensor:
    """REINFORCE++ (`advantages.reinforce_pp`): [T], whitened over the batch.

    Raises InputError for options that make no sense.
    """
    name = "credit.reinforce_pp"
    check_options(name, gamma=gamma, kl_coef=kl_coef)
    total = _token_rewards(
        name, lengths, loss_mask, token_rewards, logprobs, ref_logprobs, kl_coefs, kl_coef, kl
    )
    return advantages.reinforce_pp(rewards, total, lengths, loss_mask, gamma=gamma)


def reinforce_pp_baseline(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    lengths: torch.Tensor,
    token_rewards: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coefs: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    kl_coef: float = 0.0,
    kl: Kind = "k1",
) -> torch.Tensor:
    """REINFORCE++-baseline (`advantages.reinforce_pp_baseline`): [T], whitened over the batch.

    Raises InputError for options that make no sense.
    """
    name = "credit.reinforce_pp_baseline"
    check_options(name, gamma=gamma, kl_coef=kl_coef)
    total = _token_rewards(
        name, lengths, loss_mask, token_rewards, logprobs, ref_logprobs, kl_coefs, kl_coef, kl
    )
    return advantages.reinforce_pp_baseline(rewards, group_ids, total, lengths, loss_mask, gamma=gamma)


def critic_free(
    rewards: torch.Tensor,
    loss_mask: torch.Tensor,
    lengths: torch.Tensor,
    token_rewards: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coefs: torch.Tensor | None = None,
    *,
    bonus: float = 5.0,
    solved: float = 0.5,
    kl_coef: float = 0.0,
    kl: Kind = "k1",
) -> torch.Tensor:
    """PPO without a critic (`advantages.critic_free`): [T], normalised over the batch.

    Raises InputError for options that make no sense.
    """
    name = "credit.critic_free"
    check_options(name, bonus=bonus, kl_coef=kl_coef)
    total = _token_rewards(
        name, lengths, loss_mask, token_rewards, logprobs, ref_logprobs, kl_coefs, kl_coef, kl
    )
    return advantages.critic_free(rewards, total, lengths, loss_mask, bonus=bonus, solved=solved)


def _token_rewards(
    name: str,
    lengths: torch.Tensor,
    loss_mask: torch.Tensor,
    token_rewards: torch.Tensor | None,
    logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    kl_coefs: torch.Tensor | None,
    kl_coef: float,
    kl: Kind,
) -> torch.Tensor:
    """What each token brings by itself, float64 [T]: its own reward less the KL to the reference."""
    total = torch.zeros(len(loss_mask), dtype=torch.float64, device=loss_mask.device)
    if token_rewards is not None:
        total += token_rewards.detach().double()
    if kl_coefs is None and not kl_coef:
        return total
    if logprobs is None or ref_logprobs is None:
        given = f"is {kl_coef}" if kl_coefs is None else "is a field of the graph"
        raise InputError(
            f"{name}: kl_coef {given}, but there are no "
            f"{'logprobs' if logprobs is None else 'ref_logprobs'}; add a call that writes them, or set "
            "kl_coef to 0"
        )
    coef = kl_coef if kl_coefs is None else to_tokens(kl_coefs.detach().double(), lengths)
    return total - coef * kl_estimate(logprobs.detach().double(), ref_logprobs, kl)


def _scale(
    mean: torch.Tensor | None, std: torch.Tensor | None, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation of returns for each token, float64 [T]; None where there are none."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise InputError(
            f"credit.gae: return_{'mean' if std is None else 'std'} is there without "
            f"return_{'std' if std is None else 'mean'}; expected both, or none"
        )
    return to_tokens(mean.detach().double(), lengths), to_tokens(std.detach().double(), lengths)


def _firsts(lengths: torch.Tensor) -> torch.Tensor:
    """Which tokens are the first of their sample: bool [T]."""
    firsts = torch.zeros(int(lengths.sum()), dtype=torch.bool, device=lengths.device)
    firsts[(lengths.cumsum(0) - lengths)[lengths > 0]] = True
    return firsts


def _after(finish_reason: Sequence[str], values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The value of the state that each sample ended in, [S]: 0 where it finished, or has no token."""
    cut = torch.tensor([reason != "stop" for reason in finish_reason], dtype=torch.bool, device=values.device)
    cut &= lengths > 0
    after = torch.zeros(len(lengths), dtype=values.dtype, device=values.device)
    after[cut] = values[lengths.cumsum(0)[cut] - 1]
    return after
