"""DPO, IPO and the loss of reward models: their formulas pair by pair, and what holds for any batch."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.losses import aggregate, dpo, ipo, reward_model
from realflow.errors import InputError
from realflow.graph.types import Normalise

NAMES = ("dpo", "ipo", "reward_model")
BETA = 0.3
Sample = dict[str, Any]


def drawn(lengths: list[tuple[int, int]], seed: int) -> list[Sample]:
    """For each pair its two samples: tokens' numbers, a mask with at least one token, group and side."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return -2 * torch.rand(count, generator=generator, dtype=torch.float64)

    rows = []
    for group, pair in enumerate(lengths):
        for side, length in zip((True, False), pair, strict=True):
            mask = draw(length) < -0.6
            mask[-1] = True
            rows.append(
                {"logprobs": draw(length), "ref": draw(length), "scores": draw(length), "mask": mask}
                | {"group": 7 * group + 3, "chosen": side}
            )
    return rows


pairs = st.builds(
    drawn,
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    st.integers(0, 10_000),
)


def packed(rows: list[Sample]) -> dict[str, Any]:
    """The arguments that the three losses share, and the numbers of each token."""
    return {
        "numbers": {name: torch.cat([row[name] for row in rows]) for name in ("logprobs", "ref", "scores")},
        "mask": torch.cat([row["mask"] for row in rows]),
        "lengths": torch.tensor([len(row["mask"]) for row in rows]),
        "group_ids": torch.tensor([row["group"] for row in rows]),
        "chosen": torch.tensor([row["chosen"] for row in rows]),
    }


def terms(name: str, batch: dict[str, Any]) -> Any:
    given = dict(batch)
    numbers = given.pop("numbers")
    if name == "reward_model":
        return reward_model(numbers["scores"], **given)
    return {"dpo": dpo, "ipo": ipo}[name](numbers["logprobs"], numbers["ref"], **given, beta=BETA)


def total(name: str, batch: dict[str, Any], mode: Normalise = "sequence") -> torch.Tensor:
    return aggregate(terms(name, batch).per_token, batch["mask"], batch["lengths"], mode)


def by_hand(name: str, good: Sample, bad: Sample) -> float:
    """The definition for one pair, in plain floats."""
    if name == "reward_model":
        margin = float(good["scores"][-1]) - float(bad["scores"][-1])
        return math.log1p(math.exp(-margin))
    sums = [
        math.fsum(
            (row["logprobs"][i] - row["ref"][i]).item() for i in range(len(row["mask"])) if row["mask"][i]
        )
        for row in (good, bad)
    ]
    if name == "dpo":
        return math.log1p(math.exp(-BETA * (sums[0] - sums[1])))
    means = [value / int(row["mask"].sum()) for value, row in zip(sums, (good, bad), strict=True)]
    return (means[0] - means[1] - 1 / (2 * BETA)) ** 2


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(rows=pairs)
def test_equals_the_definition(name: str, rows: list[Sample]) -> None:
    expected = [by_hand(name, *rows[i : i + 2]) for i in range(0, len(rows), 2)]
    found = total(name, packed(rows)).item()
    assert found == pytest.approx(math.fsum(expected) / len(expected), rel=1e-10)


def test_another_formula_would_be_noticed() -> None:
    """The control."""
    rows = drawn([(3, 5)], 0)
    for name in NAMES:
        for other in NAMES:
            same = total(name, packed(rows)).item() == pytest.approx(by_hand(other, *rows), rel=1e-9)
            assert same == (name == other)
    assert total("dpo", packed(rows)).item() != pytest.approx(by_hand("dpo", *rows[::-1]), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(rows=pairs, data=st.data())
def test_order_and_division_by_groups_change_nothing(
    name: str, rows: list[Sample], data: st.DataObject
) -> None:
    """Samples in any order (the two of a pair apart), and groups cut into two parts: value and gradient."""
    whole = packed(rows)
    parts = data.draw(st.lists(st.integers(0, 1), min_size=len(rows) // 2, max_size=len(rows) // 2))
    order = data.draw(st.permutations(range(len(rows))))
    expected = gradients(name, [whole], len(rows))
    divided = [packed([rows[i] for i in order if parts[i // 2] == part]) for part in set(parts)]
    found = gradients(name, divided, len(rows))
    assert found[0] == pytest.approx(expected[0], rel=1e-10)
    listed = [rows[i] for part in set(parts) for i in order if parts[i // 2] == part]
    back = dict(zip(map(id, listed), found[1].split([len(row["mask"]) for row in listed]), strict=True))
    for row, gradient in zip(rows, expected[1].split([len(row["mask"]) for row in rows]), strict=True):
        torch.testing.assert_close(back[id(row)], gradient, rtol=1e-10, atol=1e-12)


def gradients(name: str, batches: list[dict[str, Any]], sequences: int) -> tuple[float, torch.Tensor]:
    """The mean over sequences of token means, as an engine adds it up over batches, and its gradient."""
    key = "scores" if name == "reward_model" else "logprobs"
    value, found = 0.0, []
    for batch in batches:
        now = batch["numbers"][key].clone().requires_grad_()
        mine = {**batch, "numbers": {**batch["numbers"], key: now}}
        share = total(name, mine) * len(batch["lengths"]) / sequences
        share.backward()
        value += share.item()
        found.append(now.grad)
    return value, torch.cat(found)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_masked_tokens_have_no_part(name: str) -> None:
    batch = packed(drawn([(4, 6), (3, 3)], 2))
    clean = gradients(name, [batch], 4)
    spoilt = {key: torch.where(batch["mask"], column, math.nan) for key, column in batch["numbers"].items()}
    found = gradients(name, [{**batch, "numbers": spoilt}], 4)
    assert found[0] == clean[0] and torch.equal(found[1], clean[1])
    assert (terms(name, batch).per_token[~batch["mask"]] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_masked_tokens(name: str) -> None:
    batch = packed(drawn([(4, 6)], 2))
    batch["mask"][:] = False
    value, gradient = gradients(name, [batch], 2)
    assert value == 0.0 and (gradient == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_prefers_the_chosen_one(name: str) -> None:
    """And, the control, with the sides exchanged the rejected one."""
    key = "scores" if name == "reward_model" else "logprobs"
    for sign in (1, -1):
        batch = packed(drawn([(4, 6), (3, 5)], 4))
        if sign < 0:
            batch["chosen"] = ~batch["chosen"]
        now = batch["numbers"][key].requires_grad_()
        before = total(name, batch)
        before.backward()
        moved = {**batch, "numbers": {**batch["numbers"], key: (now - 0.1 * now.grad).detach()}}
        assert total(name, moved) < before
        rise = moved["numbers"][key] - now.detach()
        side = torch.repeat_interleave(batch["chosen"] == (sign > 0), batch["lengths"])
        assert sign * rise[side].sum() > 0 > sign * rise[~side].sum()


def test_metrics_are_of_pairs() -> None:
    rows = drawn([(2, 5), (6, 1)], 8)
    batch = packed(rows)
    margins = [float(rows[i]["scores"][-1] - rows[i + 1]["scores"][-1]) for i in (0, 2)]
    for name in NAMES:
        found = terms(name, batch).metrics
        assert all(not values.requires_grad for values in found.values())
        shown = {
            m: aggregate(v, batch["mask"], batch["lengths"], "sequence").item() for m, v in found.items()
        }
        if name == "reward_model":
            assert shown["margin"] == pytest.approx(sum(margins) / 2)
            assert shown["accuracy"] == sum(margin > 0 for margin in margins) / 2
            assert shown["chosen_score"] - shown["rejected_score"] == pytest.approx(shown["margin"])
        else:
            assert shown["chosen_reward"] - shown["rejected_reward"] == pytest.approx(shown["margin"])
            assert 0 <= shown["accuracy"] <= 1


def test_what_is_no_pair_is_named() -> None:
    batch = packed(drawn([(2, 2), (3, 1)], 0))
    for chosen, counts in (
        ([1, 1, 1, 0], "2 chosen and 0 rejected"),
        ([0, 0, 1, 0], "0 chosen and 2 rejected"),
    ):
        wrong = {**batch, "chosen": torch.tensor(chosen).bool()}
        for name in NAMES:
            with pytest.raises(InputError, match=f"group 3 has {counts} samples; expected one of each"):
                terms(name, wrong)
    with pytest.raises(InputError, match="group 10 has 1 chosen and 0 rejected"):
        terms("dpo", packed(drawn([(2, 2), (3, 1)], 0)[:3]))
    for beta in (0.0, -1.0):
        for loss in (dpo, ipo):
            with pytest.raises(InputError, match="beta must be a number above 0"):
                numbers = batch["numbers"]
                rest = {key: value for key, value in batch.items() if key != "numbers"}
                loss(numbers["logprobs"], numbers["ref"], **rest, beta=beta)


def test_large_margins_stay_finite() -> None:
    batch = packed(drawn([(2, 2)], 0))
    for scale in (1e3, -1e3):
        now = (scale * batch["numbers"]["logprobs"].float()).requires_grad_()
        found = total("dpo", {**batch, "numbers": {**batch["numbers"], "logprobs": now}})
        found.backward()
        assert found.isfinite() and now.grad.isfinite().all() and found.dtype == torch.float32
