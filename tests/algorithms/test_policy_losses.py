"""Every loss of a policy against its formula, a token at a time in float64, and what holds for any batch."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms import losses
from realflow.errors import InputError

NAMES = ("ppo_clip", "gspo", "cispo", "sapo", "m2po", "decoupled_ppo", "distill")
OPTIONS: dict[str, dict[str, Any]] = {
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0},
    "gspo": {"clip_low": 0.1, "clip_high": 0.15},
    "cispo": {"clip_low": 0.6, "clip_high": 0.3},
    "sapo": {"tau_positive": 1.0, "tau_negative": 1.05},
    "m2po": {},
    "decoupled_ppo": {"clip_low": 0.2, "clip_high": 0.2, "cap": 1.5},
    "distill": {"coef": 0.7},
}
FIELDS = ("logprobs", "old", "prox", "ref", "teacher", "weights", "entropy")


@dataclass
class Rows:
    """Samples one after the other: columns [T], a mask [T], lengths [S], and an advantage for each sample."""

    columns: dict[str, torch.Tensor]
    mask: torch.Tensor
    lengths: torch.Tensor
    advantages: torch.Tensor

    def of(self, order: list[int]) -> "Rows":
        """These samples, in this order."""
        parts = list(torch.arange(len(self.mask)).split(self.lengths.tolist()))
        places = torch.cat([parts[i] for i in order]) if order else torch.zeros(0, dtype=torch.int64)
        chosen = torch.tensor(order, dtype=torch.int64)
        columns = {name: column[places] for name, column in self.columns.items()}
        return Rows(columns, self.mask[places], self.lengths[chosen], self.advantages[chosen])

    @property
    def token_advantages(self) -> torch.Tensor:
        return torch.repeat_interleave(self.advantages, self.lengths)


def terms(name: str, rows: Rows, **more: Any) -> Any:
    """The loss of a batch, called by the names of its arguments."""
    column = rows.columns
    fields: dict[str, Any] = {"logprobs": column["logprobs"], "mask": rows.mask}
    fields |= {
        "advantages": rows.token_advantages,
        "weights": column["weights"],
        "entropy": column["entropy"],
    }
    fields |= {"old_logprobs": column["old"], "ref_logprobs": column["ref"]}
    extra = {"kl_coef": 0.1, "kl": "k3", "entropy_coef": 0.02}
    if name == "gspo":
        fields["lengths"] = rows.lengths
    if name == "decoupled_ppo":
        fields |= {"prox_logprobs": column["prox"], "behaviour_logprobs": fields.pop("old_logprobs")}
        del fields["weights"]
    if name == "distill":
        fields["teacher_logprobs"] = column["teacher"]
        del fields["ref_logprobs"]
        extra = {"entropy_coef": 0.02}
    return getattr(losses, name)(**fields, **{**OPTIONS[name], **extra, **more})


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def by_hand(name: str, rows: Rows) -> list[float]:
    """The definitions, one token at a time."""
    found: list[float] = []
    start = 0
    column = {key: values.tolist() for key, values in rows.columns.items()}
    for length, advantage in zip(rows.lengths.tolist(), rows.advantages.tolist(), strict=True):
        places = range(start, start + length)
        counted = [i for i in places if rows.mask[i]]
        gaps = [column["logprobs"][i] - column["old"][i] for i in counted]
        mean = math.fsum(gaps) / len(gaps) if gaps else 0.0
        for i in places:
            here = {key: values[i] for key, values in column.items()}
            found.append(one(name, here, advantage, mean) if rows.mask[i] else 0.0)
        start += length
    return found


def one(name: str, here: dict[str, float], a: float, mean: float) -> float:
    """The value of a token with advantage `a` in a sample whose mean log ratio is `mean`."""
    options, new, weight = OPTIONS[name], here["logprobs"], here["weights"]
    ratio = math.exp(new - here["old"])
    if name == "ppo_clip":
        value = max(-a * ratio, -a * clip(ratio, 0.8, 1.28))
        value = min(value, -a * options["dual_clip"]) if a < 0 else value
    elif name == "gspo":
        value = max(-a * math.exp(mean), -a * clip(math.exp(mean), 0.9, 1.15))
    elif name == "cispo":
        value = -clip(ratio, 0.4, 1.3) * a * new
    elif name == "sapo":
        tau = 1.0 if a > 0 else 1.05
        value = -(4 / tau) / (1 + math.exp(-tau * (ratio - 1))) * a
    elif name == "m2po":
        value = -ratio * a
    elif name == "decoupled_ppo":
        ratio, weight = math.exp(new - here["prox"]), math.exp(here["prox"] - here["old"])
        value = max(-a * ratio, -a * clip(ratio, 0.8, 1.2))
        weight = weight if weight <= options["cap"] else 0.0
    else:
        value = max(-a * ratio, -a * clip(ratio, 0.8, 1.2))
    value *= weight
    if name == "distill":
        value += options["coef"] * ratio * (new - here["teacher"]) ** 2 / 2
    else:
        gap = here["ref"] - new
        value += 0.1 * (math.exp(gap) - 1 - gap)
    return value - 0.02 * here["entropy"]


def drawn(lengths: list[int], seed: int, masked: float = 0.3) -> Rows:
    """A random batch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    total = sum(lengths)
    columns = {name: -1.5 * draw(total) for name in FIELDS}
    columns |= {"weights": 2 * draw(total), "entropy": draw(total)}
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return Rows(columns, draw(total) >= masked, torch.tensor(lengths), advantages)


batches = st.builds(drawn, st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 10_000))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(rows=batches)
def test_equals_the_definition(name: str, rows: Rows) -> None:
    found = terms(name, rows).per_token
    expected = torch.tensor(by_hand(name, rows), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_wrong_formula_would_be_noticed() -> None:
    """The control: no two of these losses are alike."""
    rows = drawn([5, 3, 6], 1)
    for name in NAMES:
        for other in NAMES:
            off = terms(name, rows).per_token - torch.tensor(by_hand(other, rows), dtype=torch.float64)
            assert (name == other) == bool(off.abs().max() < 1e-9), (name, other)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(rows=batches, data=st.data())
def test_order_and_splitting_change_nothing(name: str, rows: Rows, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rows.lengths))))
    cut = data.draw(st.integers(0, len(order)))
    whole = rows.of(order)
    parts = [terms(name, rows.of(part)) for part in (order[:cut], order[cut:]) if part]
    together = torch.cat([part.per_token for part in parts])
    torch.testing.assert_close(together, terms(name, whole).per_token, rtol=1e-12, atol=1e-12)
    for metric, values in terms(name, whole).metrics.items():
        found = torch.cat([part.metrics[metric] for part in parts])
        torch.testing.assert_close(found, values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(rows=batches)
def test_masked_tokens_have_no_part(name: str, rows: Rows) -> None:
    """NaN there changes neither values nor gradients, and all of them are exactly 0."""
    clean, spoilt = rows.columns["logprobs"].clone(), rows.columns["logprobs"].clone()
    spoilt[~rows.mask] = math.nan
    outside = {name: torch.where(rows.mask, column, math.nan) for name, column in rows.columns.items()}
    results = []
    for column, fields in ((clean, rows.columns), (spoilt, outside)):
        now = column.requires_grad_()
        found = terms(name, Rows({**fields, "logprobs": now}, rows.mask, rows.lengths, rows.advantages))
        found.per_token.sum().backward()
        results.append((found.per_token.detach(), now.grad))
        assert bool((found.per_token[~rows.mask] == 0).all())
        assert all(bool((values[~rows.mask] == 0).all()) for values in found.metrics.values())
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert bool((results[0][1][~rows.mask] == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_masked_tokens(name: str) -> None:
    rows = drawn([3, 1, 4], 5)
    rows.mask[:] = False
    rows.columns["logprobs"].requires_grad_()
    found = terms(name, rows)
    found.per_token.sum().backward()
    assert bool((found.per_token == 0).all()) and bool((rows.columns["logprobs"].grad == 0).all())
    assert float(losses.aggregate(found.per_token, rows.mask, rows.lengths, "sequence").detach()) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    """Autograd against differences of the formula by hand, with what the loss holds constant held."""
    rows = drawn([4, 3], 9, masked=0.2)
    rows.columns["logprobs"].requires_grad_()
    terms(name, rows).per_token.sum().backward()
    gradient = rows.columns["logprobs"].grad
    plain = {key: column.detach() for key, column in rows.columns.items()}
    step = 1e-6
    for i in rows.mask.nonzero().flatten().tolist():
        sides = []
        for sign in (1, -1):
            moved = {**plain, "logprobs": plain["logprobs"].clone()}
            moved["logprobs"][i] += sign * step
            moved = Rows(moved, rows.mask, rows.lengths, rows.advantages)
            sides.append(held(name, moved, Rows(plain, rows.mask, rows.lengths, rows.advantages)))
        assert float(gradient[i]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=2e-6)


def held(name: str, rows: Rows, at: Rows) -> float:
    """The sum of the loss, with the factors that it does not differentiate as they are in `at`."""
    now, then = rows.columns["logprobs"], at.columns["logprobs"]
    total = math.fsum(by_hand(name, rows))
    if name == "cispo":
        total -= math.fsum(pieces_of_cispo(rows, now)) - math.fsum(pieces_of_cispo(at, now))
    if name == "distill":
        total -= math.fsum(pieces_of_distill(rows, now)) - math.fsum(pieces_of_distill(at, now))
    assert then.shape == now.shape
    return total


def pieces_of_cispo(rows: Rows, new: torch.Tensor) -> list[float]:
    """The objective with the weight of `rows` and the log probabilities `new`."""
    weight = (rows.columns["logprobs"] - rows.columns["old"]).exp().clamp(0.4, 1.3)
    values = -weight * rows.token_advantages * new * rows.columns["weights"]
    return values[rows.mask].tolist()


def pieces_of_distill(rows: Rows, new: torch.Tensor) -> list[float]:
    """The square to the teacher of `new` with the weight of `rows`."""
    weight = (rows.columns["logprobs"] - rows.columns["old"]).exp()
    values = 0.7 * weight * (new - rows.columns["teacher"]) ** 2 / 2
    return values[rows.mask].tolist()


# ---------------------------------------------------------------- a step

STEP = 0.05


def gain_of_a_step(name: str, sign: float, seed: int = 3) -> float:
    """How much one step of gradient descent on a table of logits raises the sum of mask x A x logprob."""
    generator = torch.Generator().manual_seed(seed)
    rows = drawn([5, 4, 6, 3], seed)
    total = len(rows.mask)
    table = torch.randn(total, 7, generator=generator, dtype=torch.float64).requires_grad_()
    picks = torch.randint(0, 7, (total, 1), generator=generator)

    def logprobs() -> torch.Tensor:
        return table.log_softmax(-1).gather(1, picks)[:, 0]

    def gain() -> torch.Tensor:
        return (rows.mask * rows.token_advantages * logprobs()).sum()

    before = logprobs().detach()
    columns = {**rows.columns, **dict.fromkeys(("old", "prox", "ref", "teacher"), before)}
    columns |= {"logprobs": logprobs(), "weights": torch.ones(total, dtype=torch.float64)}
    taught = Rows(columns, rows.mask, rows.lengths, sign * rows.advantages)
    mode = "sequence" if name == "gspo" else "token"
    per_token = terms(name, taught, entropy_coef=0.0).per_token
    losses.aggregate(per_token, rows.mask, rows.lengths, mode).backward()
    start = gain().item()
    with torch.no_grad():
        table -= STEP * table.grad
    return gain().item() - start


@pytest.mark.parametrize("name", NAMES)
def test_a_step_makes_what_was_good_likelier(name: str) -> None:
    assert gain_of_a_step(name, 1.0) > 1e-3
    assert gain_of_a_step(name, -1.0) < -1e-3, "the control: with negated advantages it must fall"


# ---------------------------------------------------------------- single losses


def test_decoupled_value_of_the_reference() -> None:
    new, prox = torch.tensor([-1, -2, -0.5, -1.5]).double(), torch.tensor([-1.1, -1.5, -0.9, -1.5]).double()
    behaviour = torch.tensor([-1.3, -1.4, -2.9, -1.5]).double()
    advantages, mask = torch.tensor([1, -1, 2, -0.5]).double(), torch.ones(4, dtype=torch.bool)
    capped = losses.decoupled_ppo(new, prox, behaviour, advantages, mask, cap=5.0)
    assert capped.per_token.mean().item() == pytest.approx(-0.031497, abs=1e-5)
    assert capped.metrics["behaviour_dropped"].tolist() == [0, 0, 1, 0]
    free = losses.decoupled_ppo(new, prox, behaviour, advantages, mask)
    assert free.per_token[2].item() == pytest.approx(-2 * 1.2 * math.exp(2.0)), "without a cap it applies"
    same = losses.decoupled_ppo(new, prox, prox, advantages, mask)
    assert same.per_token.mean().item() == pytest.approx(-0.551293, abs=1e-5), "behaviour = prox is PPO"


def test_sapo_starts_as_the_plain_policy_gradient() -> None:
    new = torch.tensor([-1.0, -2.0, -0.3]).double().requires_grad_()
    advantages = torch.tensor([1.5, -0.5, 2.0]).double()
    losses.sapo(new, new.detach(), advantages, torch.ones(3, dtype=torch.bool)).per_token.sum().backward()
    torch.testing.assert_close(new.grad, -advantages)


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    """Which PPO drops: the control."""
    old, mask = torch.tensor([-3.0]).double(), torch.tensor([True])
    advantages = torch.tensor([1.0]).double()
    gradients = []
    for loss in (losses.cispo, losses.ppo_clip):
        new = torch.tensor([-1.0]).double().requires_grad_()
        loss(new, old, advantages, mask, clip_high=0.28).per_token.sum().backward()
        gradients.append(new.grad.item())
    assert gradients == [pytest.approx(-1.28), 0.0]


def test_distillation_teaches_where_the_difference_alone_would_not() -> None:
    """In the mean over the student's own draws the gradient is that of KL(student || teacher); that of the
    mean difference is zero, the control."""
    student = torch.randn(6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    teacher = torch.randn(6, generator=torch.Generator().manual_seed(1)).double().log_softmax(0)
    now = student.log_softmax(0)
    (exact,) = torch.autograd.grad((now.exp() * (now - teacher)).sum(), student, retain_graph=True)
    mask = torch.ones(6, dtype=torch.bool)
    per_token = losses.distill(now, teacher, mask).per_token  # each token of the vocabulary, drawn once
    (found,) = torch.autograd.grad((now.exp().detach() * per_token).sum(), student, retain_graph=True)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    (naive,) = torch.autograd.grad((now.exp().detach() * (now - teacher)).sum(), student)
    assert naive.abs().max() < 1e-12 < exact.abs().max()


def test_distillation_and_rl_both_have_gradients() -> None:
    teacher, advantages = torch.tensor([-1.0, -2.0]).double(), torch.tensor([2.0, -3.0]).double()
    mask = torch.tensor([True, True])

    def gradient(coef: float, rl: float) -> torch.Tensor:
        new = torch.tensor([-0.5, -1.2]).double().requires_grad_()
        given = {"old_logprobs": new.detach(), "advantages": rl * advantages, "coef": coef}
        losses.distill(new, teacher, mask, **given).per_token.sum().backward()
        return new.grad

    teaching, rewarded = gradient(0.5, 0.0), gradient(0.0, 1.0)
    torch.testing.assert_close(teaching, 0.5 * (torch.tensor([-0.5, -1.2]).double() - teacher))
    torch.testing.assert_close(rewarded, -advantages)
    torch.testing.assert_close(gradient(0.5, 1.0), teaching + rewarded)


def test_what_a_loss_lacks_is_named() -> None:
    rows = drawn([2], 0)
    for name in NAMES:
        with pytest.raises(InputError, match=rf"losses\.{name}: entropy_coef"):
            getattr(losses, name)(**without(name, rows))


def without(name: str, rows: Rows) -> dict[str, Any]:
    """A call with an entropy bonus and no entropy."""
    column = rows.columns
    fields: dict[str, Any] = {"logprobs": column["logprobs"], "mask": rows.mask, "entropy_coef": 0.1}
    fields |= {"advantages": rows.token_advantages, "old_logprobs": column["old"]}
    if name == "gspo":
        fields["lengths"] = rows.lengths
    if name == "decoupled_ppo":
        fields |= {"prox_logprobs": column["prox"], "behaviour_logprobs": fields.pop("old_logprobs")}
    if name == "distill":
        fields["teacher_logprobs"] = column["teacher"]
    return fields
