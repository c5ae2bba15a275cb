"""How evenly sequences are divided among ranks and micro-batches, and how long deciding takes.

    python experiments/balance/bench.py

Prints two tables and stores them under experiments/balance/results/. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from realflow.data.balance import CostModel, imbalance, micro_batches, partition

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from record import record  # noqa: E402

MODEL = CostModel.for_sizes(params=134_515_008, layers=30, hidden=576)  # SmolLM2-135M
DIVISIONS = [(512, 8), (8192, 8), (8192, 64), (8192, 256)]
BUDGETS = [(512, 8192), (8192, 8192), (8192, 32768)]
SEEDS = 5
REPEATS = 5


def lognormal_lengths(count: int, seed: int, median: int = 300, largest: int = 8000) -> list[int]:
    """Log-normal lengths with this median, clipped at `largest`, which occurs."""
    draw = random.Random(seed)
    sigma = math.log(largest / median) / 3.1  # the largest of some thousand draws lies there
    lengths = [min(largest, max(1, round(median * math.exp(sigma * draw.gauss(0, 1))))) for _ in range(count)]
    lengths[draw.randrange(count)] = largest
    return lengths


def main() -> None:
    """Measure, print and store."""
    table = {
        "ranks": [ranks(count, parts) for count, parts in DIVISIONS],
        "micro_batches": [packed(count, budget) for count, budget in BUDGETS],
    }
    for name, rows in table.items():
        show(name, rows)
    print("stored in", record(HERE / "results" / "balance.json", table).relative_to(HERE.parents[1]))


def ranks(count: int, parts: int) -> dict[str, Any]:
    """Largest rank's estimated time over the mean: ours, and sequences dealt out in order."""
    ours, dealt, least, seconds = [], [], [], []
    for seed in range(SEEDS):
        costs = [MODEL(length) for length in lognormal_lengths(count, seed)]
        ours.append(imbalance(costs, partition(costs, parts)))
        dealt.append(imbalance(costs, [range(part, count, parts) for part in range(parts)]))
        least.append(max(1.0, max(costs) * parts / sum(costs)))  # the longest sequence cannot be cut
        seconds.append(median_seconds(lambda costs=costs: partition(costs, parts)))
    return {
        "sequences": count,
        "ranks": parts,
        "worst_largest_over_mean": round(max(ours), 5),
        "lower_bound_there": round(least[ours.index(max(ours))], 5),
        "dealt_in_order": round(max(dealt), 3),
        "median_cpu_ms": round(1e3 * statistics.median(seconds), 2),
    }


def packed(count: int, budget: int) -> dict[str, Any]:
    """Number of micro-batches against the tokens over the budget, rounded up."""
    lengths = lognormal_lengths(count, 1)
    found = micro_batches(lengths, budget)
    totals = [sum(lengths[i] for i in batch) for batch in found]
    return {
        "sequences": count,
        "budget": budget,
        "micro_batches": len(found),
        "lower_bound": math.ceil(sum(lengths) / budget),
        "largest": max(totals),
        "smallest": min(totals),
        "median_cpu_ms": round(1e3 * median_seconds(lambda: micro_batches(lengths, budget)), 2),
    }


def median_seconds(work: Callable[[], object]) -> float:
    """Median processor time of a few runs, which other work on the machine disturbs least."""
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows with equal keys as a table."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
