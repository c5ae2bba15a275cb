"""Beginnings in common are computed once, and nothing changes but the work."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_model

from realflow.data.batch import pack
from realflow.engines.infer import prepare, scored_tokens, scores
from realflow.models import sharing
from realflow.models.causal import CausalModel, load_model
from realflow.models.sharing import find_shared

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=7)


@settings(deadline=None)
@given(sequences)
def test_only_equal_beginnings_are_shared(rows: list[list[int]]) -> None:
    batch = pack(
        range(len(rows)), [len(r) for r in rows], {"t": [torch.tensor(r) for r in rows]}, {"t": "token"}, {}
    )
    starts = batch.cu_seqlens.tolist()
    shared = find_shared(batch.fields["t"], batch.cu_seqlens)
    beginnings = [tuple(row[: i + 1]) for row in rows for i in range(len(row))]
    if shared is None:
        assert all(a[0] != b[0] for a, b in pairwise(rows))
        return
    copies = shared.keep[shared.spread].tolist()
    assert [beginnings[place] for place in copies] == beginnings
    assert all(shared.spread[place] == number for number, place in enumerate(shared.keep.tolist()))
    for index in range(1, len(rows)):  # neighbours share all that they can
        common = 0
        for a, b in zip(rows[index - 1], rows[index], strict=False):
            if a != b:
                break
            common += 1
        assert all(copies[starts[index] + i] < starts[index] for i in range(common))


def grouped_batch() -> object:
    """Three groups whose prompts begin alike, two to four samples each, one sample twice."""
    torch.manual_seed(1)
    system = torch.randint(0, 90, (5,))
    rows, masks = [], []
    for samples in (3, 2, 4):
        prompt = torch.cat([system, torch.randint(0, 90, (4,))])
        for _ in range(samples):
            response = torch.randint(0, 90, (int(torch.randint(1, 9, ())),))
            rows.append(torch.cat([prompt, response]))
            masks.append(torch.tensor([False] * len(prompt) + [True] * len(response)))
    rows.append(rows[-1].clone())
    masks.append(masks[-1].clone())
    fields = {"tokens": rows, "loss_mask": masks}
    kinds = {"tokens": "int", "loss_mask": "bool"}
    return pack(range(len(rows)), [len(r) for r in rows], fields, dict.fromkeys(fields, "token"), kinds)


def exact(path: Path, *, share: bool) -> CausalModel:
    return replace(load_model(path, dtype="float64"), share=share)


def gradients(model: CausalModel, batch: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    places = scored_tokens(batch)
    stats = scores(model, model.run(prepare(model, batch)), batch, places, 0.9)
    weights = torch.linspace(-1, 2, len(places), dtype=stats.logprobs.dtype)
    parameters = dict(model.module.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    (stats.logprobs * weights).sum().backward()
    return stats.logprobs.detach(), {name: p.grad.clone() for name, p in parameters.items()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_values_and_gradients_are_those_of_the_whole_batch(tmp_path: Path, family: str) -> None:
    path = tiny_model(tmp_path / family, family=family, dtype="float64", seed=2)
    batch = grouped_batch()
    expected = gradients(exact(path, share=False), batch)
    found = gradients(exact(path, share=True), batch)
    assert torch.allclose(found[0], expected[0], atol=1e-12, rtol=0)
    for name, gradient in expected[1].items():
        error = torch.linalg.norm(found[1][name] - gradient) / torch.linalg.norm(gradient)
        assert error <= 1e-10, (name, error)


def test_a_token_that_is_not_shared_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one token too many is taken for common."""
    path = tiny_model(tmp_path / "llama", dtype="float64", seed=2)
    batch = grouped_batch()
    expected = gradients(exact(path, share=False), batch)
    right = find_shared(batch.fields["tokens"], batch.cu_seqlens)
    spread = right.spread.clone()
    spread[8] = spread[7]  # the end of the first prompt, from which its first response token is predicted
    model = exact(path, share=True)
    monkeypatch.setattr("realflow.models.causal.find_shared", lambda *_: sharing.Shared(right.keep, spread))
    found = gradients(model, batch)
    assert not torch.allclose(found[0], expected[0], atol=1e-6, rtol=0)


def test_gradients_of_copies_are_added_in_float32() -> None:
    spread = torch.zeros(1000, dtype=torch.int64)
    distinct = torch.ones(1, 4, dtype=torch.bfloat16, requires_grad=True)
    shared = sharing.Shared(torch.tensor([0]), spread)
    shared.repeat(distinct).sum().backward()
    assert distinct.grad is not None
    assert distinct.grad.tolist() == [[1000.0] * 4]
