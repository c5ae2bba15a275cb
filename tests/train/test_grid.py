"""Training and inference under data × tensor × pipeline layouts equal plain Hugging Face on one rank.

One launch runs many cases; `grid_reference` has the data, which differs between replicas in lengths and
number of micro-batches, and the reference. Controls with a mistake built in must fail the same
comparison. `make test` runs a slice on 4 ranks, `make test-full` every d·t·p up to 8.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from comparing import largest
from grid_ranks import collected, differences, elements, launch
from grid_reference import FAMILIES, SPEC, STEPS, Case
from safetensors.torch import load_file

SLICE = [
    Case("llama", "d1t1p1"),
    Case("llama", "d2t2p1", "float32", tied=False, recompute=True),
    Case("qwen3", "d1t2p2", schedule="zero_bubble", sequence=True),
    Case("qwen3", "d2t1p2", "float32", schedule="zero_bubble", normalise="sequence"),
    Case("gemma3", "d1t3p1", recompute=True),
    Case("gemma3", "d1t4p1", "float32", sequence=True),
    Case("qwen2", "d2t2p1", tied=False, sequence=True, recompute=True, normalise="sequence"),
    Case("mistral", "d1t1p4", tied=False, schedule="zero_bubble", recompute=True),
    Case("mistral", "d4t1p1", "float32"),
    Case("llama", "d2t1p2", recompute=True),
    Case("llama", "d3t1p1", after="d2t1p2"),
    Case("llama", "d1t2p2", after="d2t1p2", schedule="zero_bubble"),
    Case("qwen2", "d1t2p2", head="value", tied=False, schedule="zero_bubble"),
    Case("qwen2", "d2t2p1", head="value", tied=False, sequence=True),
    Case("llama", "d1t1p1", lora=4),
    Case("llama", "d2t1p1", lora=4),
    Case("llama", "d1t2p1", lora=4),
    Case("llama", "d1t1p2", lora=4),
    Case("llama", "d1t3p1", lora=4, recompute=True),
    Case("qwen2", "d2t2p1", lora=3, sequence=True, recompute=True, normalise="sequence"),
    Case("qwen3", "d1t2p2", lora=3, schedule="zero_bubble"),
    Case("llama", "d1t2p2", lora=4, after="d2t1p1"),
]
ROUNDED = [Case("qwen3", "d2t1p2", "bfloat16"), Case("qwen3", "d2t2p1", "bfloat16", sequence=True)]
INFINITE = Case("llama", "d2t1p2", mistake="infinite")
CONTROLS = [
    Case("qwen3", "d1t2p1", mistake="no-partial-sum"),
    Case("llama", "d1t3p1", mistake="no-partial-sum"),
    Case("llama", "d1t1p2", mistake="no-tied-sum"),
    Case("llama", "d2t1p1", mistake="averaged"),
    Case("llama", "d2t1p2", mistake="perturbed"),
    Case("llama", "d2t2p1", mistake="scaled-sample"),
    Case("qwen3", "d1t2p1", "float32", normalise="sequence", mistake="no-partial-sum"),
    Case("mistral", "d1t1p2", "float32", mistake="no-tied-sum"),
    Case("llama", "d2t1p1", "float32", tied=False, mistake="averaged"),
    Case("llama", "d2t1p2", "float32", tied=False, mistake="perturbed"),
    Case("llama", "d1t2p1", lora=4, mistake="no-partial-sum"),
    Case("llama", "d2t1p1", lora=4, mistake="averaged"),
    Case("llama", "d2t1p1", lora=4, mistake="another-scale"),
]
WRONG_EPS = [
    Case("llama", "d2t1p1", mistake="eps"),
    Case("llama", "d2t1p1", "float32", tied=False, mistake="eps"),
]


def every() -> list[Case]:
    """Every layout of up to 8 ranks, every family, tied and untied, in both dtypes, and value heads; the
    options take turns, so that each family has each of them with and without."""
    layouts = [(d, t, p) for d in range(1, 9) for t in range(1, 9) for p in range(1, 9) if d * t * p <= 8]
    cases = []
    for index, (d, t, p) in enumerate(layouts):
        for sequence in (False, True)[: 1 + (t > 1)]:
            schedule = "zero_bubble" if p > 1 and index % 2 else "1f1b"
            heads = {"head": "value", "tied": False, "schedule": schedule, "sequence": sequence}
            cases.append(Case(FAMILIES[index % 4], f"d{d}t{t}p{p}", **heads, recompute=index % 3 == 0))
            low = {"lora": 4, "schedule": schedule, "sequence": sequence, "recompute": index % 2 == 0}
            cases.append(Case(FAMILIES[index % 5], f"d{d}t{t}p{p}", **low))
        for number, family in enumerate(FAMILIES):
            for variant in range(4):
                turn = index + number + variant
                cases.append(
                    Case(
                        family,
                        f"d{d}t{t}p{p}",
                        ("float64", "float32")[variant % 2],
                        tied=variant < 2,
                        schedule="zero_bubble" if p > 1 and turn % 2 else "1f1b",
                        sequence=t > 1 and turn // 2 % 2 == 1,
                        recompute=turn % 3 == 0,
                        normalise="sequence" if family == "qwen3" and turn % 4 == 0 else "token",
                    )
                )
    return cases


EVERY = every()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("grid"), 4, [*SLICE, *ROUNDED, INFINITE, *CONTROLS, *WRONG_EPS])


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("everything"), 8, EVERY)


def check(folder: Path, case: Case) -> None:
    """Gradients of each step, updates, metrics and what was inferred are the reference's."""
    expected = load_file(folder / f"{case.reference}.reference")
    if case.dtype == "float32":  # else the bounds would tell of chance: see `grid_reference.SEEDS`
        assert expected["rounding"] <= 1e-3, "choose another seed"
        assert expected["rounding_g0"] <= 4e-6, "choose another seed"
    results = collected(folder, case)
    exact = case.dtype == "float64"
    steps = [STEPS] if case.after else range(STEPS)
    sizes = {key[3:]: tensor.numel() for key, tensor in expected.items() if key.startswith("w0/")}
    for step in steps if exact else (0, STEPS):  # between them other weights have other gradients
        assert elements(results, f"g{step}") == sizes
        found = differences(results, f"g{step}")
        assert largest(found.values()) <= (1e-8 if exact else 1e-5), (step, found)
    update = f"update{steps[-1] + 1}"
    found = differences(results, update)
    assert elements(results, update) == sizes
    assert largest(found.values()) <= (1e-8 if exact else 2e-3), found
    assert all(result["weights"] <= (1e-8 if exact else 2e-3) for result in results)
    check_metrics(results, expected, list(steps), 1e-9 if exact else 1e-3)
    if not case.after:
        assert all(result["inferred"] <= (1e-8 if exact else 1e-4) for result in results)
    check_replicas(results)
    assert all(result["rounded"] and result["frozen"] for result in results)


def check_metrics(
    results: list[dict[str, Any]], expected: dict[str, Any], steps: list[int], rel: float
) -> None:
    """The reference's, and the same on all ranks to the last digit."""
    assert all(result["metrics"] == results[0]["metrics"] for result in results)
    for step, metrics in zip(steps, results[0]["metrics"], strict=True):
        assert metrics["loss"] == pytest.approx(float(expected[f"loss{step}"]), rel=rel, abs=rel)
        assert metrics["grad_norm"] == pytest.approx(float(expected[f"norm{step}"]), rel=rel)
        assert metrics["lr"] == pytest.approx(SPEC.lr * min(1.0, (step + 1) / SPEC.warmup_steps))
        assert {"pg_clipfrac", "ratio"} <= set(metrics)


def check_replicas(results: list[dict[str, Any]]) -> None:
    """What several ranks hold is equal bit for bit."""
    seen: dict[str, str] = {}
    for result in results:
        for box, digest in result["digests"].items():
            assert seen.setdefault(box, digest) == digest, box


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_layouts_equal_plain_hugging_face(folder: Path, case: Case) -> None:
    check(folder, case)


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.name)
def test_bfloat16_rounds_its_masters_on_every_rank(folder: Path, case: Case) -> None:
    results = collected(folder, case)
    check_replicas(results)
    assert all(result["rounded"] for result in results)
    found = differences(results, "g0")
    assert 1e-4 < largest(found.values()) < 0.1  # near the float32 gradient, and not it


def test_gradients_that_are_not_finite_are_named_on_every_rank(folder: Path) -> None:
    """Each rank says which ranks own such elements, and of which parameters."""
    texts = {result["error"] for result in collected(folder, INFINITE)}
    assert len(texts) == 1
    (text,) = texts
    assert "optimizer step 0: the gradient is not finite" in text
    assert "on rank 0 in model." in text and "rank 3 in model." in text


@pytest.mark.full
@pytest.mark.timeout(10800)
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_layout_equals_plain_hugging_face(everything: Path, case: Case) -> None:
    check(everything, case)


def test_control_a_gradient_that_is_not_a_number_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any place of any kind of number: also behind other names, where `max` passes it over."""
    case = SLICE[0]
    check(folder, case)
    right = collected(folder, case)
    for spoil in ("g0", "weights", "inferred"):
        wrong = copy.deepcopy(right)
        if spoil == "g0":
            list(wrong[0]["found"]["g0"].values())[-1][0] = math.nan
        else:
            wrong[0][spoil] = math.nan
        monkeypatch.setattr("test_grid.collected", lambda *_, wrong=wrong: wrong)
        with pytest.raises(AssertionError):
            check(folder, case)


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.name)
def test_controls_fail(folder: Path, case: Case) -> None:
    with pytest.raises(AssertionError):
        check(folder, case)
    results = collected(folder, case)
    found = differences(results, "g0")
    assert (1e-7 if case.dtype == "float64" else 2e-5) < largest(found.values()) < math.inf
    if case.mistake in ("averaged", "no-tied-sum", "no-partial-sum"):
        assert largest(found.values()) > 1e-2  # as gross as the mistake
    if case.mistake == "no-partial-sum":  # copies drift apart where a sum is left out
        with pytest.raises(AssertionError):
            check_replicas(results)


@pytest.mark.parametrize("case", WRONG_EPS, ids=lambda case: case.name)
def test_control_another_eps_fails_by_its_updates(folder: Path, case: Case) -> None:
    """The bounds of the updates see AdamW's eps, torch's own in all other cases."""
    with pytest.raises(AssertionError):
        check(folder, case)
    results = collected(folder, case)
    assert largest(differences(results, "g0").values()) <= (1e-8 if case.dtype == "float64" else 1e-5)
    assert largest(differences(results, "update3").values()) > 1e-2
