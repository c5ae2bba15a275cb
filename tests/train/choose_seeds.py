"""Chooses the seeds of the grid's float32 models: `grid_reference.SEEDS`. Not a test.

    PYTHONPATH=.:tests python tests/train/choose_seeds.py [--check] [MODEL ...]

Only plain Hugging Face is asked. For three orders and groupings of the samples its float32 run must be near
its own float64 run: the updates, and the gradients from equal weights before the first and after the last.
Prints for each model the seeds tried, and for each run `gradient/update`, the largest relative difference of
a parameter. With `--check` only the seeds in use are tried, and the status is 1 where one is too far.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grid_reference import SEED, SEEDS, STEPS, TEMPERATURE, Case, make_model, ppo, rounding, samples_of, train
from test_grid import EVERY, SLICE
from torch.nn.utils.rnn import pad_sequence

GRADIENTS, UPDATES = 4e-6, 2e-4  # the bounds of the test are 1e-5 and 2e-3
ORDERS = 3


def batched(order: int) -> Callable[[torch.nn.Module, Case, int], torch.Tensor]:
    """Padded batches: all samples as they come, all in another order, and three batches in a third order."""

    def backward(model: torch.nn.Module, case: Case, step: int) -> torch.Tensor:
        samples = samples_of(step)
        if order:
            random.Random(order).shuffle(samples)
        batches = [samples] if order < 2 else [samples[:9], samples[9:20], samples[20:]]
        scored = [int(sample["loss_mask"][1:].sum()) for sample in samples]
        count = sum(scored) if case.normalise == "token" else sum(map(bool, scored))
        total = torch.zeros((), dtype=next(model.parameters()).dtype)
        for batch in batches:
            loss = summed(model, case, batch) / count
            loss.backward()
            total += loss.detach()
        return total

    return backward


def summed(model: torch.nn.Module, case: Case, batch: list[dict[str, Any]]) -> torch.Tensor:
    """The sum over tokens, or over the means of samples."""
    tokens = pad_sequence([sample["tokens"] for sample in batch], batch_first=True)
    mask = pad_sequence([sample["loss_mask"] for sample in batch], batch_first=True)[:, 1:]
    old = pad_sequence([sample["logprobs"].double() for sample in batch], batch_first=True)[:, 1:]
    log_p = torch.log_softmax(model(tokens).logits[:, :-1] / TEMPERATURE, -1)
    advantages = torch.tensor([sample["advantages"] for sample in batch], dtype=log_p.dtype)[:, None]
    chosen = log_p.gather(2, tokens[:, 1:, None])[..., 0]
    terms = ppo(chosen, old.to(log_p.dtype), advantages, entropy=-(log_p.exp() * log_p).sum(-1)).per_token
    if case.normalise == "token":
        return terms[mask].sum()
    counts = mask.sum(1)
    return ((terms * mask).sum(1)[counts > 0] / counts[counts > 0]).sum()


def distances(case: Case, seed: int) -> list[tuple[float, float]]:
    """(gradients, updates) of each order until one is too far."""
    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), case, seed)
        for order in range(ORDERS):
            run = train(Path(folder), case, STEPS + 1, torch.float32, batched(order))
            truth = train(Path(folder), case, STEPS + 1, torch.float64, batched(0), last=run)
            gradients = max(rounding(run, truth, kind) for kind in ("g0", f"g{STEPS}"))
            found.append((gradients, rounding(run, truth, f"update{STEPS}")))
            if not near(found):
                break
    return found


def near(found: list[tuple[float, float]]) -> bool:
    """Whether every run is near enough."""
    return all(gradients <= GRADIENTS and updates <= UPDATES for gradients, updates in found)


def main() -> None:
    """Try seeds for every model, from the first on until one is near enough under each way to normalise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("models", nargs="*", help="beginnings of names such as gemma3-tied")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    models: dict[str, dict[str, Case]] = {}
    for case in (*EVERY, *SLICE):
        if case.dtype == "float32" and case.model.startswith(tuple(chosen.models or [""])):
            models.setdefault(case.model, {})[case.normalise] = case
    far = False
    for model, cases in sorted(models.items()):
        for seed in [SEEDS.get(model, SEED)] if chosen.check else itertools.count(SEED):
            found = {normalise: distances(case, seed) for normalise, case in cases.items()}
            texts = {name: [f"{g:.1e}/{u:.1e}" for g, u in runs] for name, runs in found.items()}
            holds = all(map(near, found.values()))
            print(model, seed, "near" if holds else "far", texts, flush=True)
            if holds:
                break
        far |= not holds
    sys.exit(1 if far else 0)


if __name__ == "__main__":
    main()
