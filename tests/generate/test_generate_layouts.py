"""Generation under every layout: the same tokens as on one rank, in float64, and bit-equal on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from generate_ranks import (
    AGE,
    DEEP,
    FAMILIES,
    SMALL,
    Case,
    engine_of,
    found_by,
    generate,
    launch,
    prompts,
    stored,
)

from realflow.layout import Layout
from realflow.models.causal import load_model
from realflow.models.place import Place

FEW = [
    Case("llama", "t2"),
    Case("llama", "t2", "restricted"),
    Case("llama", "t3", "greedy"),
    Case("llama", "p2", slots=6),
    Case("llama", "p2", "restricted", slots=1),
    Case("llama", "p4", slots=9),
    Case("llama", "t2p2", "restricted", slots=4),
    Case("llama", "d2t2"),
    Case("qwen2", "t4", "restricted"),
    Case("qwen2", "p3", "greedy"),
    Case("qwen3", "t2p2"),
    Case("qwen3", "d2p2", "restricted"),
    Case("qwen3", "t2", modules=True),
    Case("mistral", "t2p2", slots=14),
    Case("mistral", "t3", "restricted"),
    Case("gemma3", "t2p2", "restricted"),
    Case("gemma3", "t3"),
    Case("gemma3", "p2", slots=3),
    Case("llama", "d4"),
    Case("llama", "t2p2", tied=False),
    Case("mistral", "t2p2", "restricted", tied=True),
]
REPLACED = [Case("llama", layout, what="version", slots=14) for layout in ("t2", "p2", "t2p2")]
ARRIVING = [Case("llama", layout, what="arrivals", slots=4) for layout in ("t2", "p2", "t2p2", "d2t2")]
ABORTED = [Case("llama", layout, what="abort", slots=8) for layout in ("t2", "t2p2")]
FRAMED = [Case("qwen3", layout, what="frames") for layout in ("t2", "t2p2", "p3")]
TIMED = [Case("llama", "p2", what="times", slots=slots) for slots in (4, 1)]
ROUNDED = [Case("llama", "t2p2", slots=40, dtype=dtype) for dtype in ("bfloat16", "float32")]
WRONG = [Case("llama", "t2", mistake="shard"), Case("llama", "p2", mistake="stage")]

COUNTS = range(1, 9)
LAYOUTS = [f"d{d}t{t}p{p}" for d in COUNTS for t in COUNTS for p in COUNTS if 1 < d * t * p <= 8]
EVERY = [
    Case(
        family,
        layout,
        ("plain", "restricted", "greedy")[(index + row + tied) % 3],
        slots=3 + (index + row) % 9,
        tied=tied,
    )
    for tied in (True, False)
    for row, family in enumerate(FAMILIES)
    for index, layout in enumerate(LAYOUTS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return launch(
        tmp_path_factory.mktemp("few"),
        [*FEW, *REPLACED, *ARRIVING, *ABORTED, *FRAMED, *TIMED, *ROUNDED, *WRONG],
        4,
        SMALL,
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    return launch(tmp_path_factory.mktemp("every"), EVERY, 8, DEEP)


def alone(folder: Path, case: Case) -> dict[str, torch.Tensor]:
    """What one rank draws."""
    models = [load_model(folder / f"{case.model}-{which}", dtype="float64") for which in ("first", "second")]
    return stored(generate(*models, Case(case.family, "d1", case.sampling, tied=case.tied), Place.alone()))


def check(folder: Path, case: Case) -> None:
    expected = alone(folder, case)
    assert len({tuple(t.tolist()) for name, t in expected.items() if name.endswith("tokens")}) > 10
    layout = Layout.parse(case.layout)
    found = found_by(folder, case)
    whole: dict[str, torch.Tensor] = {}
    for rank, one in enumerate(found):
        dp = rank // layout.tp % layout.dp
        first = found[dp * layout.tp]
        assert one.keys() == first.keys()
        assert all(torch.equal(one[name], first[name]) for name in one)  # bit for bit in a replica
        whole |= one
    assert whole.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("logprobs"):
            torch.testing.assert_close(whole[name], tensor, atol=1e-9, rtol=0)
        else:
            assert torch.equal(whole[name], tensor), name


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_layouts_draw_the_tokens_of_one_rank(folder: Path, case: Case) -> None:
    check(folder, case)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_family_generates_under_every_layout(everything: Path, case: Case) -> None:
    check(everything, case)


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_wrong_rank_changes_tokens_or_logprobs(folder: Path, case: Case) -> None:
    """The controls."""
    with pytest.raises(AssertionError):
        check(folder, case)


@pytest.mark.parametrize("case", ARRIVING, ids=lambda case: case.name)
def test_feeds_that_arrive_at_different_times(folder: Path, case: Case) -> None:
    check(folder, case)


@pytest.mark.parametrize("case", FRAMED, ids=lambda case: case.name)
def test_static_steps_of_parts(folder: Path, case: Case) -> None:
    check(folder, case)


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.name)
def test_ranks_agree_in_dtypes_that_round(folder: Path, case: Case) -> None:
    """Bit for bit among each other; log probabilities are those of the exact model but for rounding."""
    found = found_by(folder, case)
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in found[0])
    exact = load_model(folder / f"{case.model}-first", dtype="float64")
    errors = []
    for sample in sorted({name.partition("/")[0] for name in found[0]}):
        tokens, logprobs = (found[0][f"{sample}/{field}"] for field in ("tokens", "logprobs"))
        with torch.no_grad():
            ends = torch.tensor([0, len(tokens)]).int()
            states = exact.run(exact.prepare(tokens, torch.arange(len(tokens)), ends))
            scored = exact.head(states[:-1]).log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        drawn = logprobs[1:] != 0
        errors.append((scored[drawn] - logprobs[1:][drawn]).abs())
    mean = float(torch.cat(errors).mean())
    assert mean < (0.05 if case.dtype == "bfloat16" else 1e-5), mean


def test_stages_work_at_the_same_time(folder: Path) -> None:
    """Two groups of slots keep both stages busy; with one (the control) they take turns."""
    shares = []
    for case in TIMED:
        first, second = (one["spans"] for one in found_by(folder, case))
        both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in first.tolist() for c, d in second.tolist())
        shares.append(both / float((first[:, 1] - first[:, 0]).sum()))
    assert shares[0] > 0.5
    assert shares[1] < 0.01


@pytest.mark.parametrize("case", ABORTED, ids=lambda case: case.name)
def test_aborted_samples_leave_the_others_alone(folder: Path, case: Case) -> None:
    expected = alone(folder, case)
    found = found_by(folder, case)
    gone = {str(prompts()[0].sample_ids[1]), str(prompts()[-1].sample_ids[0])}
    for one in found:
        assert all(torch.equal(one[name], found[0][name]) for name in found[0])
        for name, tensor in expected.items():
            sample, _, field = name.partition("/")
            if sample not in gone:
                assert field == "logprobs" or torch.equal(one[name], tensor)
            else:
                assert len(one[name]) <= len(tensor)


@pytest.mark.parametrize("case", REPLACED, ids=lambda case: case.name)
def test_weights_replaced_between_two_steps(folder: Path, case: Case) -> None:
    """All ranks change over at the same token; with two stages a group has made half of the steps."""
    models = [load_model(folder / f"{case.model}-{which}", dtype="float64") for which in ("first", "second")]
    engine = engine_of(models[0], case)
    mine = prompts()
    engine.feed(mine[:2])
    steps = AGE // Layout.parse(case.layout).pp
    done = {f.sample_id: f for _ in range(steps) for f in engine.step()}
    models[0].flat.storage.copy_(models[1].flat.storage)
    engine.set_version(3)
    engine.feed(mine[2:])
    while engine.busy:
        done |= {f.sample_id: f for f in engine.step()}
    expected, found = stored(done), found_by(folder, case)
    mixed = [t.unique().tolist() for name, t in expected.items() if name.endswith("versions")]
    assert [-1, 0, 3] in mixed
    assert [-1, 3] in mixed
    for one in found:
        for name, tensor in expected.items():
            assert torch.equal(one[name], found[0][name])
            assert name.endswith("logprobs") or torch.equal(one[name], tensor), name
