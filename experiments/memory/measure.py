"""Memory that plans promise, against the peaks of live tensor storage that runs of them record.

    python experiments/memory/measure.py tiny               # a random model of 1M parameters, 1 and 2 ranks
    python experiments/memory/measure.py 10m --only t2
    python experiments/memory/measure.py smollm2-135m-instruct --only d1,p2

For each plan and rank, at the call whose peak is highest: the peak, the estimate for the lengths that the run
recorded, and the certificate. Results go to results/MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner import Assumptions, local_cluster, make_plan, parse_layouts, rank_memory
from planner.loads import Batch
from realflow.api import load_graph, run
from realflow.models.card import Card, card
from realflow.models.paths import models_dir
from realflow.planfile import Plan
from realflow.planfile.types import TRACK_MEMORY

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # later: experiments/ has a planner too

from record import record

LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "d1": ("d1",),
    "d1-recompute": ("d1", "train=d1:recompute"),
    "d1-offload": ("d1", "ref=d1:offload", "train=d1:offload"),
    "d2": ("d2",),
    "t2": ("t2",),
    "t2-sequence": ("t2:sequence_parallel",),
    "p2": ("p2",),
    "p2-zero-bubble": ("p2", "train=p2:zero_bubble"),
    "moved": ("d2", "train=t2"),
    "apart": ("d1@0", "train=d1@1"),
}
"""Name -> the layouts of a plan."""

SIZES: Mapping[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2000,
    },
    "10m": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8000,
    },
}
"""Random models that are made here."""

OWN = ("process", "margin")
"""Causes that are no tensors."""


@dataclass(frozen=True)
class Compared:
    """Bytes of one rank: the highest peak, at the call `at`; the estimate and the certificate without the
    process (and, of the estimate, without the margin)."""

    plan: str
    rank: int
    at: str
    peak: int
    estimate: int
    certificate: int
    estimated_at: str

    def __str__(self) -> str:
        return (
            f"{self.plan:16} rank {self.rank}  peak {self.peak / 1e6:9.2f} MB at {self.at:12} estimate "
            f"{self.estimate / self.peak:6.3f} (at {self.estimated_at})  certificate "
            f"{self.certificate / self.peak:6.3f}"
        )


def recorded(run_dir: Path, steps: int) -> list[Batch]:
    """The lengths of each step of a run, from its samples."""
    found: list[dict[int, tuple[int, list[int]]]] = [{} for _ in range(steps)]
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    for row in sorted(rows, key=lambda row: row["sample_id"]):
        group = found[row["step"]].setdefault(row["group_id"], (row["prompt_length"], []))
        group[1].append(row["length"])
    return [list(step.values()) for step in found]


def peaks(metrics: Sequence[Mapping[str, float]], rank: int) -> dict[str, int]:
    """Call -> the highest peak of a rank."""
    found: dict[str, int] = {}
    for step in metrics:
        for name, value in step.items():
            if name.startswith("memory/peak/") and name.endswith(f"/rank{rank}"):
                call = name.split("/")[2]
                found[call] = max(found.get(call, 0), int(value))
    return found


def compare(
    name: str,
    plan: Plan,
    cards: Mapping[str, Card],
    metrics: Sequence[Mapping[str, float]],
    lengths: list[Batch],
) -> Iterator[Compared]:
    """A run against its plan, rank by rank."""
    args = plan.graph, plan.calls, cards, plan.cluster, Assumptions()
    certificate = rank_memory(*args)
    estimates = [rank_memory(*args, batch=batch) for batch in lengths]
    for rank in sorted(plan.memory):
        found = {call: size for call, size in peaks(metrics, rank).items() if call != "checkpoint"}
        at = max(found, key=lambda call: found[call])
        highest = max(estimates, key=lambda one: _tensors(one[rank].sizes))[rank]
        yield Compared(
            name,
            rank,
            at,
            found[at],
            _tensors(highest.sizes),
            sum(size for cause, size in certificate[rank].sizes.items() if cause != "process"),
            highest.moment,
        )


def _tensors(sizes: Mapping[str, int]) -> int:
    return sum(size for cause, size in sizes.items() if cause not in OWN)


def make_model(folder: Path, size: Mapping[str, int]) -> Path:
    """A random Llama with the tokenizer of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from tiny import tiny_model

    sizes = dict(size)
    vocab = sizes.pop("vocab_size")
    return tiny_model(folder, dtype="bfloat16", vocab=vocab, scale=1.0, max_position_embeddings=2048, **sizes)


def measure(
    name: str, model: Path, layouts: Sequence[str], overrides: Sequence[str], where: Path, tokens: int = 4096
) -> list[Compared]:
    """Plan, run and compare."""
    graph = load_graph("grpo", [f"model={model}", *overrides])
    devices = max(1, *(2 for text in layouts if any(mark in text for mark in ("2", "@1"))), 1)
    cards = dict.fromkeys(graph.models, card(model))
    plan = make_plan(graph, local_cluster(devices), parse_layouts(layouts), cards, micro_batch_tokens=tokens)
    plan = replace(plan, extra={**plan.extra, TRACK_MEMORY: True})
    result = run(plan, run_dir=where, quiet=True)
    return list(compare(name, plan, cards, result.metrics, recorded(where, graph.steps)))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description="Memory promised against memory taken.")
    parser.add_argument("model", help=f"{', '.join(SIZES)}, or a model of the cache")
    parser.add_argument("--only", help="names of layouts, with commas between")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("overrides", nargs="*", help="params of the graph, such as max_new_tokens=64")
    args = parser.parse_intermixed_args(arguments)
    names = args.only.split(",") if args.only else list(LAYOUTS)
    found: list[Compared] = []
    with tempfile.TemporaryDirectory() as folder:
        model = models_dir() / args.model
        if args.model in SIZES:
            model = make_model(Path(folder) / "model", SIZES[args.model])
        for name in names:
            rows = measure(name, model, LAYOUTS[name], args.overrides, Path(folder) / name, args.tokens)
            for row in rows:
                print(row, flush=True)
            found += rows
    record(Path(__file__).parent / "results" / f"{args.model}.json", _stored(found, args))
    return 0


def _stored(found: Sequence[Compared], args: Any) -> dict[str, Any]:
    return {"params": args.overrides, "tokens": args.tokens, "rows": [vars(row) for row in found]}


if __name__ == "__main__":
    sys.exit(main())
