"""How many pairs of answers `rewards.math` judges in a second on one core, and how many it misjudges.

    python experiments/rewards/answers.py --require 20

Pairs are those of the tests, or of `--pairs FILE.jsonl`: lines with `truth`, `same`, and an `answer` (which
is put into a box) or a whole `completion`. The process and its worker share one core. The first pairs, for
which the worker starts, are counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from realflow.rewards.answers import extract, same
from realflow.rewards.answers.symbolic import prepare
from realflow.rewards.math import math, truths_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import record

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests" / "rewards"


def read(path: Path) -> list[dict[str, Any]]:
    """The pairs of a file, each with a `completion`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row.get("answer"):
            row["completion"] = rf"So the answer is $\boxed{{{row['answer']}}}$."
    return rows


def slowest(rows: list[dict[str, Any]]) -> tuple[float, str]:
    """Seconds of the pair that takes longest to compare in this process, and its truth."""
    prepare()
    found = (0.0, "")
    for row in rows:
        start = time.perf_counter()
        answer = extract(row["completion"])
        if answer is not None:
            any(same(answer, truth) for truth in truths_of(row["truth"]))
        found = max(found, (time.perf_counter() - start, str(row["truth"])))
    return found


def study(path: Path, seconds: float) -> dict[str, Any]:
    """Judge all pairs of a file twice: with a worker that must start, and with one that is there."""
    rows = read(path)
    completions, truths = [row["completion"] for row in rows], [row["truth"] for row in rows]
    times = []
    for _ in range(2):
        start = time.perf_counter()
        found = math(completions, truths, seconds=seconds)
        times.append(time.perf_counter() - start)
    wrong = [
        {"completion": row["completion"], "truth": row["truth"], "reward": reward, "same": row["same"]}
        for row, reward in zip(rows, found["rewards"], strict=True)
        if reward != float(row["same"])
    ]
    longest, truth = slowest(rows)
    return {
        "pairs": len(rows),
        "right": sum(row["same"] for row in rows),
        "misjudged": len(wrong),
        "which": wrong,
        "over_the_limit": round(found["metrics"]["reward/math/timeout"] * len(rows)),
        "pairs_per_second": len(rows) / times[1],
        "first_seconds": times[0],
        "slowest_pair_seconds": longest,
        "slowest_pair": truth,
    }


def main() -> int:
    """Print and store what was found; 1 where it is slower than `--require`, or misjudges more than 1 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, action="append", help="a file of pairs (default: the tests')")
    parser.add_argument("--seconds", type=float, default=5.0, help="the limit for one pair")
    parser.add_argument("--require", type=float, default=0.0, help="pairs a second")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "answers.json")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    table = {}
    for path in options.pairs or [TESTS / "math_pairs.jsonl", TESTS / "math_more_pairs.jsonl"]:
        table[path.name] = found = study(path, options.seconds)
        print(
            f"{path.name}: {found['pairs']} pairs, {found['misjudged']} misjudged, "
            f"{found['pairs_per_second']:.0f} pairs/s on one core (the first time "
            f"{found['first_seconds']:.1f} s), slowest {found['slowest_pair_seconds'] * 1e3:.0f} ms, "
            f"{found['over_the_limit']} over the limit"
        )
        for wrong in found["which"]:
            print(f"  {wrong}")
    print(f"stored in {record(options.out, table)}")
    slow = any(found["pairs_per_second"] < options.require for found in table.values())
    return int(slow or any(found["misjudged"] > found["pairs"] / 100 for found in table.values()))


if __name__ == "__main__":
    raise SystemExit(main())
