"""A run's directory made of invented numbers: learning curves, samples, and a trace of two ranks."""

from __future__ import annotations

import math
import random
from pathlib import Path

from realflow.graph.types import Call, DataSpec, FunctionDecl, Graph, ModelSpec, OptimizerSpec, Sampling
from realflow.layout import Layout
from realflow.observe.metrics import MetricsLog, SamplesLog
from realflow.observe.rundata import RunData, load_run
from realflow.observe.trace import Trace
from realflow.planfile import CallPlan, Cluster, Node, Plan, ReallocPlan

NASTY = "<script>alert('x')</script> & \"quotes\" \x1b[31m </svg></main>"
SECONDS = {"rollout": 4.1, "reward": 0.05, "ref": 1.2, "credit": 0.02, "train": 5.5}


def make_graph(steps: int = 45) -> Graph:
    """A GRPO graph as plain values."""
    decl = {name: FunctionDecl(name, "function") for name in SECONDS}
    calls = (
        Call("rollout", "generate", decl["rollout"], "actor", samples=8, sampling=Sampling(16)),
        Call("reward", "function", decl["reward"]),
        Call("ref", "infer", decl["ref"], "ref"),
        Call("credit", "function", decl["credit"]),
        Call("train", "train", decl["train"], "actor", minibatches=2),
    )
    models = {
        "actor": ModelSpec("actor", "smollm2-135m-instruct", optimizer=OptimizerSpec(lr=1e-5)),
        "ref": ModelSpec("ref", "smollm2-135m-instruct"),
    }
    data = DataSpec("reasoning_gym", {"prompt": "question", "answer": "answer"}, task="chain_sum")
    return Graph("grpo", models, data, calls, steps=steps, prompts=8, samples=8)


def make_plan(steps: int = 45, predictions: bool = True) -> Plan:
    """A plan of that graph on two ranks."""
    engines = {"rollout": "native", "reward": "python", "ref": "infer", "credit": "python", "train": "train"}
    calls = {
        name: CallPlan(
            (0, 1),
            Layout(dp=2),
            engines[name],  # type: ignore[arg-type]
            predicted_seconds=SECONDS[name] * 0.9 if predictions else None,
        )
        for name in SECONDS
    }
    memory = {rank: {"weights": 269_000_000, "masters": 404_000_000, "kv": 12_000_000} for rank in (0, 1)}
    return Plan(
        make_graph(steps),
        Cluster((Node("local", 2),)),
        calls,
        reallocs=(ReallocPlan("actor", "train", "rollout", 269_000_000, 269_000_000),),
        memory=memory,
        step_seconds=10.1 if predictions else None,
        notes=("A note with <b>markup</b> in it.",),
    )


def write_metrics(run_dir: Path, steps: int, seed: int = 0) -> None:
    """Metrics of a run that learns, with a NaN in one step."""
    draw = random.Random(seed)
    with MetricsLog(run_dir) as log:
        for step in range(steps):
            reward = 0.78 / (1 + math.exp(-(step - 18) / 5)) + draw.uniform(-0.08, 0.08) + 0.1
            values = {
                "critic/rewards/mean": max(0.0, reward),
                "critic/rewards/max": 1.0,
                "actor/pg_loss": draw.gauss(0, 0.02),
                "actor/kl_loss": 0.002 * step**1.2 + draw.random() * 0.01,
                "actor/ppo_kl": draw.gauss(0, 0.001),
                "actor/entropy": 1.4 * math.exp(-step / 30) + 0.1,
                "actor/grad_norm": float("nan") if step == 7 else 2.0 + draw.random(),
                "actor/lr": 1e-5,
                "response_length/mean": 12 - step / 10 + draw.random(),
                "response_length/max": 16.0,
                "perf/tokens_per_second": 700 + draw.random() * 50,
                "timing_s/step": sum(SECONDS.values()) + 0.2,
            }
            values |= {f"timing_s/{name}": each * draw.uniform(0.9, 1.2) for name, each in SECONDS.items()}
            log.step(step, values)


def write_samples(run_dir: Path, steps: int, seed: int = 0) -> None:
    """Eight samples of eight prompts a step; one completion tries to break the page."""
    draw = random.Random(seed)
    with SamplesLog(run_dir) as log:
        for step in range(steps):
            rows = []
            for number in range(64):
                a, b = draw.randrange(10), draw.randrange(10)
                right = draw.random() < (step + 4) / (steps + 8)
                said = f"{a} + {b} = {a + b if right else a + b + 3}"
                rows.append(
                    {
                        "step": step,
                        "sample_id": step * 64 + number,
                        "group_id": step * 8 + number // 8,
                        "prompt": f"State the final answer to the following arithmetic problem: {a} + {b} =",
                        "completion": NASTY if number == 1 else said,
                        "answer": str(a + b),
                        "rewards": None if number == 2 else float(right),
                        "finish_reason": "stop" if number % 5 else "length",
                        "length": 9 + number % 7,
                    }
                )
            log.write(rows)


def make_trace(steps: int, ranks: int = 2, seed: int = 0) -> Trace:
    """Spans of a run in which transfers and short waits lie between the calls."""
    draw = random.Random(seed)
    trace, now = Trace(), 1_700_000_000.0
    for step in range(steps):
        for name, each in SECONDS.items():
            ends = []
            for rank in range(ranks):
                end = now + each * draw.uniform(0.9, 1.1)
                trace.span(rank, f"{name}@{step}", now, end, tokens=draw.randrange(1000))
                ends.append(end)
            now = max(ends)
            for rank in range(ranks):
                trace.span(rank, f"{name}@{step}", ends[rank], now + 0.05, kind="move")
            now += 0.05
    return trace


def whole_run(folder: Path, steps: int = 45) -> RunData:
    """A complete run, without a plan file (`RunData.plan` is set by hand)."""
    run_dir = folder / "grpo-1"
    write_metrics(run_dir, steps)
    write_samples(run_dir, steps)
    make_trace(steps).write(run_dir / "trace.json")
    for name in ("step-000020", f"step-{steps:06d}"):
        (run_dir / "checkpoints" / name / "actor").mkdir(parents=True)
        (run_dir / "checkpoints" / name / "actor" / "model.safetensors").write_bytes(b"0" * 1000)
    (run_dir / "graph.yaml").write_text("name: grpo\n# <i>comment</i>\n", encoding="utf-8")
    return load_run(run_dir)
