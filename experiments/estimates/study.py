"""Estimates against reality: plans are predicted from a profile of this machine, run, and compared.

    python experiments/estimates/study.py profile                     # under 4 minutes for each model
    python experiments/estimates/study.py measure                     # every plan, about an hour
    python experiments/estimates/study.py measure --only 10m-grpo/d2 135m-grpo
    python experiments/estimates/study.py compare                     # predicts again, runs nothing

Every run is stored when it ends (results/runs/<pair>/<plan>.json), and is not repeated while there are as
many as asked for (`--again` begins anew). All plans are run once before any is run again, so that no plan
has all its runs in a slow hour of the machine. `compare` prints the table and stores it as
results/estimates.json.

Machines are shared: the same run takes a fifth longer at one moment than at another. Beside every run fixed
pieces of work are measured (`realflow.profiling.yardstick`), as before and after the profile. Seconds are
given as they were, and as they would have been at the profile's pace: against these predictions are held.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE.parent)]  # experiments/planner is no package

from predict import predict  # noqa: E402
from record import record  # noqa: E402
from workloads import PAIRS, Pair, Setup, model_path, overrides  # noqa: E402

from planner.profile import read_profile  # noqa: E402
from realflow.api import plan, run  # noqa: E402
from realflow.commands.profile import YARDSTICK_SECONDS, measure_yardstick  # noqa: E402
from realflow.planfile import Plan  # noqa: E402

RESULTS = HERE / "results"
RUNS = RESULTS / "runs"
PROFILES = RESULTS / "profiles"
WARM = 2
"""Steps that are not counted: the first makes what is made once."""

MEDIAN, WORST, RANK, APART = 0.10, 0.25, 0.8, 0.10
"""Targets: errors of step times on 1 and 2 ranks; rank correlation within a pair, over plans that differ by
more than `APART`."""


def main() -> int:
    """Profile, measure or compare; returns the exit code."""
    args = _parser().parse_args()
    return {"profile": profile, "measure": measure, "compare": compare}[args.what](args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Predicted against measured seconds of plans.")
    parser.add_argument("what", choices=["profile", "measure", "compare"])
    parser.add_argument("--only", nargs="+", default=[], metavar="PAIR[/PLAN]", help="some pairs, or plans")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each plan (default: 3)")
    parser.add_argument(
        "--params", nargs="+", default=[], metavar="KEY=VALUE", help="other params, to try the pieces quickly"
    )
    parser.add_argument("--again", action="store_true", help="run also what is stored")
    parser.add_argument("--profiles", type=Path, default=PROFILES, help="folder of the profiles of models")
    parser.add_argument("--from", dest="runs", type=Path, default=RUNS, help="the measurements to compare")
    return parser


def _chosen(only: Sequence[str]) -> Iterator[tuple[str, Pair, str, Setup]]:
    for name, pair in PAIRS.items():
        for plan_name, setup in pair.plans.items():
            if not only or name in only or f"{name}/{plan_name}" in only:
                yield name, pair, plan_name, setup


def profile(args: argparse.Namespace) -> int:
    """Measure the machine for the model of each pair, as many ranks as its plans have; returns the exit code
    of the first that fails."""
    most = max(setup.devices for _, _, _, setup in _chosen(args.only))
    for model in dict.fromkeys(pair.model for _, pair, _, _ in _chosen(args.only)):
        path = args.profiles / f"{model}.json"
        if path.exists() and not args.again:
            print(f"{model}: profiled already")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "realflow", "profile", model_path(model)]
        code = subprocess.run([*command, "--devices", str(most), "-o", str(path)], check=False).returncode
        if code:
            return code
    return 0


def measure(args: argparse.Namespace) -> int:
    """Run the plans that are not stored yet, until each has been run as often as asked for."""
    chosen = list(_chosen(args.only))
    if args.again:
        for name, _, plan_name, _ in chosen:
            (args.runs / name / f"{plan_name}.json").unlink(missing_ok=True)
    for repeat in range(args.repeats):
        for name, pair, plan_name, setup in chosen:
            path = args.runs / name / f"{plan_name}.json"
            runs = json.loads(path.read_text())["results"]["runs"] if path.exists() else []
            if len(runs) > repeat:
                continue
            found = _run(_plan(pair, setup, args.params), Path("runs") / "estimates" / f"{name}-{plan_name}")
            record(path, {"pair": name, "plan": plan_name, "steps": pair.steps, "runs": [*runs, found]})
            beside = " and ".join(f"{1e3 * seconds:.2f}" for seconds in found["yardstick"].values())
            told = f"{_step(found):.3f} s a step, beside yardsticks of {beside} ms"
            print(f"{name}/{plan_name}: {told}", flush=True)
    return 0


def _plan(pair: Pair, setup: Setup, params: Sequence[str]) -> Plan:
    return plan(
        pair.graph,
        devices=setup.devices,
        layouts=setup.layouts,
        overrides=overrides(pair, params),
        micro_batch_tokens=setup.micro_batch_tokens,
        slots=setup.slots,
    )


def _run(made: Plan, folder: Path) -> dict[str, Any]:
    """One run: the seconds of its steps and calls, and the lengths of its samples."""
    shutil.rmtree(folder, ignore_errors=True)
    before = measure_yardstick(YARDSTICK_SECONDS)
    rows = run(made, run_dir=folder, quiet=True).metrics
    after = measure_yardstick(YARDSTICK_SECONDS)
    beside = {piece: (before[piece] + after[piece]) / 2 for piece in before}
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    kept = [s for s in samples if s["step"] >= WARM]
    names = [name for name in rows[-1] if name.startswith("timing_s/")]
    return {
        "yardstick": beside,
        "seconds": {
            name.removeprefix("timing_s/"): [row[name] for row in rows[WARM:] if name in row]
            for name in names
        },
        "moves": {
            name: [row[name] for row in rows[WARM:] if name in row]
            for name in rows[-1]
            if name.startswith("realloc/") and name.endswith("seconds")
        },
        "idle": statistics.median(row["perf/idle_fraction"] for row in rows[WARM:]),
        "lengths": [(s["prompt_length"], s["length"]) for s in kept],
        "common": _common(made, [s["prompt"] for s in kept]),
    }


def _common(made: Plan, prompts: Sequence[str]) -> int:
    """Tokens that all prompts begin with."""
    from transformers import AutoTokenizer

    from realflow.data.text import encode_prompt
    from realflow.models.paths import resolve_model

    rollout = next(call for call in made.graph.calls if call.op == "generate")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(made.graph.models[str(rollout.model)].path))
    distinct = [encode_prompt(tokenizer, text, rollout.chat) for text in dict.fromkeys(prompts)]
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*distinct, strict=False))
    return sum(1 for _ in alike)


def _step(result: Mapping[str, Any]) -> float:
    return statistics.fmean(result["seconds"]["step"])


def compare(args: argparse.Namespace) -> int:
    """Predict every stored plan and hold it against its runs; exit code 1 where a target is missed."""
    known, rows = {}, []
    for name, pair, plan_name, setup in _chosen(args.only):
        path = args.runs / name / f"{plan_name}.json"
        if not path.exists():
            continue
        stored = json.loads(path.read_text())["results"]
        first = _lengths_of(args.runs, name, stored)
        if pair.model not in known:
            known[pair.model] = read_profile(args.profiles / f"{pair.model}.json")
            if "yardstick_large" not in known[pair.model].constants:
                print(f"the profile of {pair.model} has no yardsticks: `profile --again`", file=sys.stderr)
                return 2
        made = _plan(pair, setup, args.params)
        found = predict(made, known[pair.model], first["lengths"], first["common"])
        ops = {call.name: call.op for call in made.graph.calls}
        runs = [at_pace(one, known[pair.model].constants, ops) for one in stored["runs"]]
        rows.append(_row(name, plan_name, setup.devices, stored["runs"], runs, found))
    if not rows:
        print(f"nothing is measured in {args.runs}: run `measure` first", file=sys.stderr)
        return 2
    verdict = judge(rows)
    _show(rows, verdict)
    record(
        RESULTS / "estimates.json",
        {"plans": rows, "verdict": verdict, "profiles": {m: p.hash for m, p in known.items()}},
    )
    return 0 if verdict["met"] else 1


def _lengths_of(runs: Path, name: str, stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """The lengths that all plans of a pair are predicted with: those of one former run."""
    former = runs / name / "d1.json"
    source = json.loads(former.read_text())["results"] if former.exists() else stored
    found: Mapping[str, Any] = source["runs"][0]
    return found


def at_pace(
    result: Mapping[str, Any], constants: Mapping[str, float], ops: Mapping[str, str]
) -> dict[str, float]:
    """Mean seconds of a run's calls and of its step, as they would have been at the pace of the profile.

    Rollouts are many small operators, everything else is large ones; a step is longer or shorter as its calls
    are together."""
    slower = {
        piece: seconds / constants[f"yardstick_{piece}"] for piece, seconds in result["yardstick"].items()
    }
    plain = {name: statistics.fmean(values) for name, values in result["seconds"].items() if values}
    calls = {
        name: plain[name] / slower["small" if op == "generate" else "large"]
        for name, op in ops.items()
        if name in plain
    }
    share = sum(calls.values()) / sum(plain[name] for name in calls)
    return {**calls, "step": plain["step"] * share}


def _row(
    pair: str,
    name: str,
    devices: int,
    stored: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, float]],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """One plan: predicted and measured seconds of the step and of each call (`runs`: at the profile's pace)
    and, for the step, as the clock said (`stored`)."""
    steps = [result["step"] for result in runs]
    measured = statistics.fmean(steps)
    calls = {
        call: {"predicted": seconds, "measured": statistics.fmean(result[call] for result in runs)}
        for call, seconds in found["calls"].items()
        if all(result.get(call) for result in runs)
    }
    return {
        "pair": pair,
        "plan": name,
        "ranks": devices,
        "predicted": found["step"],
        "measured": measured,
        "as_measured": statistics.fmean(_step(result) for result in stored),
        "error": found["step"] / measured - 1,
        "noise": (max(steps) - min(steps)) / 2 / measured,
        "calls": calls,
        "moves": found["moves"],
        "parts": found["parts"],
        "uncertain": found["uncertain"],
    }


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the targets say of the errors."""
    few = [row for row in rows if row["ranks"] <= 2]
    errors = [abs(row["error"]) for row in few]
    missed = [
        f"{row['pair']}/{row['plan']}" for row in few if abs(row["error"]) > max(WORST, 2 * row["noise"])
    ]
    ranks = {
        pair: correlation([row for row in rows if row["pair"] == pair])
        for pair in dict.fromkeys(row["pair"] for row in rows)
    }
    known = [value for value in ranks.values() if value is not None]
    met = statistics.median(errors) <= MEDIAN and not missed and all(value >= RANK for value in known)
    return {
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "beyond": missed,
        "rank_correlation": ranks,
        "met": met,
    }


def correlation(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Kendall's rank correlation over the pairs of plans whose measured steps differ by more than `APART`;
    None where there are none."""
    agree = count = 0
    for index, one in enumerate(rows):
        for other in rows[:index]:
            low, high = sorted((one["measured"], other["measured"]))
            if high > (1 + APART) * low:
                count += 1
                agree += (one["measured"] < other["measured"]) == (one["predicted"] < other["predicted"])
    return 2 * agree / count - 1 if count else None


def _show(rows: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any]) -> None:
    table = Table(
        "plan", "ranks", "predicted s", "measured s", "at its pace", "error", "repeat noise", "calls: error"
    )
    for row in rows:
        calls = " ".join(
            f"{name} {call['predicted'] / call['measured'] - 1:+.0%}"
            for name, call in row["calls"].items()
            if call["measured"] > 0.03 * row["measured"]
        )
        table.add_row(
            f"{row['pair']}/{row['plan']}",
            str(row["ranks"]),
            f"{row['predicted']:.3f}",
            f"{row['as_measured']:.3f}",
            f"{row['measured']:.3f}",
            f"{row['error']:+.1%}",
            f"{row['noise']:.1%}",
            calls,
        )
    console = Console(width=170 if not sys.stdout.isatty() else None)
    console.print(table)
    ranks = ", ".join(
        f"{p} {'-' if v is None else f'{v:.2f}'}" for p, v in verdict["rank_correlation"].items()
    )
    console.print(
        f"1 and 2 ranks: median error {verdict['median_error']:.1%} (target {MEDIAN:.0%}), worst "
        f"{verdict['worst_error']:.1%} (target {WORST:.0%} or twice the noise; beyond: "
        f"{', '.join(verdict['beyond']) or 'none'}). Rank correlation: {ranks} (target {RANK})."
    )


if __name__ == "__main__":
    sys.exit(main())
