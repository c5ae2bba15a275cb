"""Generalised advantage estimation on packed samples: the compiled kernel against torch.

    python experiments/kernels/gae.py --samples 512 --tokens 1024 --rounds 9 --threads 1

Samples are of 1 to twice `--tokens` tokens. The two are compared before anything is timed; the ratio of
their times is what counts. Results are stored under results/ with `--record`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from realflow.algorithms.advantages import gae
from realflow.algorithms.advantages.gae import gae_in_torch
from realflow.kernels import operator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import record

DECAYS = {"gamma": 0.99, "lam": 0.95}
Fields = dict[str, torch.Tensor]


def batch(samples: int, tokens: int, device: str) -> Fields:
    """Random numbers, of which one in twenty was not chosen by the policy."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2 * tokens, (samples,), generator=generator)
    total = int(lengths.sum())
    rewards, values = torch.randn(2, total, generator=generator, dtype=torch.float64)
    mask = torch.rand(total, generator=generator) > 0.05
    made = {"token_rewards": rewards.clone(), "values": values.clone(), "lengths": lengths, "mask": mask}
    return {name: field.to(device) for name, field in made.items()}


def seconds(work: Callable[[], object], rounds: int, device: str) -> float:
    """Median seconds of a call, after two that are not counted."""
    taken = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def contest(samples: int, tokens: int, rounds: int, device: str) -> dict[str, float]:
    """Seconds of both, and how many times faster the kernel is."""
    assert operator("gae", torch.device(device)) is not None, f"the kernel is not built for {device}"
    fields = batch(samples, tokens, device)
    after = torch.zeros(samples, dtype=torch.float64, device=device)
    found = gae(**fields, bootstrap=after, **DECAYS)
    wanted = gae_in_torch(**fields, after=after, **DECAYS)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    compiled = seconds(lambda: gae(**fields, bootstrap=after, **DECAYS), rounds, device)
    plain = seconds(lambda: gae_in_torch(**fields, after=after, **DECAYS), rounds, device)
    return {
        "tokens": len(fields["values"]),
        "kernel_seconds": round(compiled, 6),
        "torch_seconds": round(plain, 6),
        "speedup": round(plain / compiled, 2),
    }


def main() -> None:
    """Measure on the CPU, and on a GPU if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024, help="mean length of a sample")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="store the results")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        found = contest(chosen.samples, chosen.tokens, chosen.rounds, device)
        print(device, found, flush=True)
        if chosen.record:
            name = f"gae-{device}-threads-{chosen.threads}.json" if device == "cpu" else "gae-cuda.json"
            record(Path(__file__).parent / "results" / name, {**vars(chosen), **found})


if __name__ == "__main__":
    main()
