"""Parts of models under tensor and pipeline layouts against plain Hugging Face: one launch of gloo ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from comparing import largest
from layout_facts import LENGTHS
from layout_ranks import Case
from safetensors import safe_open
from tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from realflow.models.paths import resolve_model

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 4
MORE = ("starcoder2", "granite")  # biases after the sum; scaled embeddings

SLICE = [
    Case("llama-tied", "t2p2", sequence=True, recompute=True, defer=True),
    Case("llama-untied", "t3", sequence=True),
    Case("llama-tied", "p4", defer=True),
    Case("qwen2-untied", "t4"),
    Case("qwen2-tied", "t2p2", recompute=True),
    Case("qwen3-tied", "d2t2", sequence=True, recompute=True),
    Case("qwen3-untied", "t3", defer=True),
    Case("mistral-tied", "t3"),
    Case("mistral-untied", "d2p2", recompute=True, defer=True),
    Case("gemma3-tied", "t2p2", sequence=True),
    Case("gemma3-untied", "t4", sequence=True),
    Case("starcoder2-tied", "t2p2", sequence=True),
    Case("starcoder2-tied", "t3"),
    Case("granite-untied", "t2p2"),
]
SINGLE = [Case("llama-tied", "t2p2", dtype="float32"), Case("qwen3-tied", "t3", dtype="float32")]
HALF = [
    Case("llama-tied", "t2p2", sequence=True, dtype="bfloat16"),
    Case("gemma3-untied", "t3", dtype="bfloat16"),
]
REAL = [
    Case("smollm2", layout, sequence=sequence, dtype="float32")
    for layout, sequence in (("t2", False), ("t3", True), ("p2", False), ("t2p2", True))
]
CONTROLS = [
    Case("llama-tied", "t2", spoil="shard"),
    Case("qwen3-tied", "t2", spoil="partial"),  # the sums of q_norm and k_norm
    Case("llama-tied", "t3", spoil="partial"),  # those of keys and values that all ranks hold
    Case("llama-untied", "t2", sequence=True, spoil="partial"),  # those of norms between the blocks
    Case("llama-tied", "p2", spoil="tied"),
    Case("llama-untied", "t3", spoil="picks"),
    Case("llama-untied", "t2", spoil="padding"),
    Case("starcoder2-tied", "t2", spoil="bias"),
]


def grid() -> list[Case]:
    """Every t * p of at most 8 ranks for every family, tied and untied, with each option somewhere."""
    shapes = [(t, p) for t in range(1, 5) for p in range(1, 5) if 1 < t * p <= 8]
    cases = []
    for family in FAMILIES:
        for number, (t, p) in enumerate(shapes):
            for tied in ("tied", "untied"):
                flags = {"recompute": number % 2 == 0, "defer": p > 1 and number % 3 == 0}
                d = 2 if t * p <= 4 else 1
                text = f"d{d}t{t}p{p}"
                cases += [Case(f"{family}-{tied}", text, **flags)]
                cases += [Case(f"{family}-{tied}", text, sequence=True, **flags)] if t > 1 else []
    return cases


def make_models(folder: Path) -> None:
    for family in (*FAMILIES, *MORE):
        for tied in (True, False):
            changes: dict[str, object] = {"num_hidden_layers": LAYERS}
            if family == "gemma3":
                changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
            if family == "granite":
                changes |= {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}
            path = folder / f"{family}-{'tied' if tied else 'untied'}"
            tiny_model(path, family, "float64", tied=tied, **changes)
    torch.manual_seed(7)
    value = AutoModelForSequenceClassification.from_pretrained(folder / "qwen3-tied", num_labels=1)
    torch.nn.init.normal_(value.score.weight)
    value.save_pretrained(folder / "value")


def launch(folder: Path, cases: Sequence[Case], world: int, seconds: int = 270) -> list[dict[str, dict]]:
    """What each rank found."""
    make_models(folder)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    script = str(Path(__file__).with_name("layout_ranks.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(outputs)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, dict]]:
    return launch(folder, [*SLICE, *SINGLE, *HALF, *CONTROLS], 4)


def worst(found: Sequence[dict[str, dict]], case: Case) -> tuple[float, str]:
    """The largest error of any tensor on any rank, and whose it is; infinite where one is NaN."""
    errors = [(largest([error]), what) for rank in found for what, error in rank.get(case.name, {}).items()]
    assert errors
    return max(errors)


def check(found: Sequence[dict[str, dict]], case: Case) -> None:
    assert worst(found, case) <= (1e-11, "")


def test_control_an_error_that_is_not_a_number_shows() -> None:
    case = SLICE[0]
    right = [{case.name: {"a": 1e-15, "b": 0.0}}]
    check(right, case)
    with pytest.raises(AssertionError):
        check([{case.name: {"a": 1e-15, "b": math.nan}}], case)


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_states_logprobs_entropies_and_gradients(found: list[dict[str, dict]], case: Case) -> None:
    check(found, case)
    everything = {what for rank in found for what in rank.get(case.name, {})}
    assert {"logprobs", "entropy", "grad/model.embed_tokens.weight", "grad/model.norm.weight"} <= everything
    assert sum(what.endswith("mlp.up_proj.weight") or "c_fc.weight" in what for what in everything) == LAYERS


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
def test_float32(found: list[dict[str, dict]], case: Case) -> None:
    assert 0 < worst(found, case)[0] <= 1e-5


@pytest.mark.parametrize("case", HALF, ids=lambda case: case.name)
def test_bfloat16_is_near(found: list[dict[str, dict]], case: Case) -> None:
    assert 1e-4 < worst(found, case)[0] <= 0.1


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.name)
def test_control_a_mistake_shows(found: list[dict[str, dict]], case: Case) -> None:
    assert 1e-4 < worst(found, case)[0] < math.inf
    with pytest.raises(AssertionError):
        check(found, case)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_every_layout_of_eight_ranks(tmp_path: Path) -> None:
    cases = grid()
    everything = launch(tmp_path, cases, 8, seconds=840)
    wrong = {case.name: worst(everything, case) for case in cases if worst(everything, case)[0] > 1e-11}
    assert not wrong and len(cases) > 100


@pytest.mark.full
@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_smollm2_with_uneven_heads(tmp_path: Path) -> None:
    (tmp_path / "smollm2").symlink_to(resolve_model("smollm2-135m-instruct"))
    everything = launch(tmp_path, REAL, 4, seconds=840)
    for case in REAL:
        assert 0 < worst(everything, case)[0] <= 1e-4, case.name


def test_a_value_head_is_whole_on_every_tensor_rank(found: list[dict[str, dict]]) -> None:
    facts = [rank["facts"]["value"] for rank in found]
    assert all(error <= 1e-11 for fact in facts for error in fact.values())
    assert [sorted(fact) for fact in facts[2:]] == [
        ["gradients-False", "gradients-True", "values-False", "values-True"]
    ] * 2


def test_only_the_boxes_of_a_rank_are_read(found: list[dict[str, dict]]) -> None:
    counts = [rank["facts"]["read"] for rank in found]
    assert all(count["read"] == count["held"] for count in counts)
    assert len({count["held"] for count in counts}) > 1


def test_masters_of_a_part_are_read_by_boxes(found: list[dict[str, dict]]) -> None:
    assert [rank["facts"]["masters"] for rank in found] == [True] * 4


def test_logits_are_never_gathered_and_a_block_sends_once(found: list[dict[str, dict]]) -> None:
    """Messages of a head have a few numbers for each row; those of a block the hidden states, once."""
    tokens, shared, hidden = sum(LENGTHS), 4, 32
    rows = tokens - shared
    seen = {key: [tuple(entry) for entry in value] for key, value in found[0]["facts"]["messages"].items()}
    for sequence in ("False", "True"):
        assert seen[f"head-{sequence}"] == [("all_reduce", tokens), ("all_reduce", 3 * tokens)]
    blocks = 2 * LAYERS
    assert seen["forward-False"] == [("all_reduce", rows * hidden)] * (1 + blocks)
    assert seen["backward-False"] == [("all_reduce", rows * hidden)] * (1 + blocks)
    padded = -(-rows // 4) * 4 * hidden
    gathers, scatters = ("all_gather_single", padded), ("reduce_scatter_single", padded)
    assert seen["forward-True"] == [scatters, *[gathers, scatters] * blocks, gathers]
    assert seen["backward-True"] == [scatters, *[gathers, scatters] * blocks, gathers]


@pytest.mark.parametrize(
    ("name", "source", "kind", "files"),
    [
        ("tied", "llama-tied", AutoModelForCausalLM, 2),
        ("small", "qwen2-untied", AutoModelForCausalLM, 4),
        ("value", "value", AutoModelForSequenceClassification, 1),
    ],
)
def test_parts_are_saved_as_one_checkpoint(
    found: list[dict[str, dict]], folder: Path, name: str, source: str, kind: type, files: int
) -> None:
    saved, start = (
        kind.from_pretrained(path, dtype=torch.float32)
        for path in (folder / f"saved-{name}", folder / source)
    )
    expected = dict(start.named_parameters())
    assert {n: p.shape for n, p in saved.named_parameters()} == {n: p.shape for n, p in expected.items()}
    assert all(torch.equal(parameter, expected[key]) for key, parameter in saved.named_parameters())
    assert saved.config.architectures == [type(saved).__name__] and saved.config.dtype == torch.float32
    there = sorted(path.name for path in (folder / f"saved-{name}").iterdir())
    assert sum(path.endswith(".safetensors") for path in there) >= files
    told = [rank["facts"]["saved"][name] for rank in found]
    assert told[0] == there and told[1:] == [[]] * 3  # the first rank knows the digests of all files
    keys = [key for path in (folder / f"saved-{name}").glob("*.safetensors") for key in keys_of(path)]
    assert sorted(keys) == sorted(expected)  # each parameter in one file, a tied one once
    assert not list(folder.glob(".saved-*"))


def keys_of(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
