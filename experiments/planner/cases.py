"""The scenarios: graph, params and cluster of each, and what is asked of its plan.

Needs no weights: models are the published configs in `models/`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from planner.hardware import filled
from planner.options import Models
from realflow import api
from realflow.planfile import Cluster, Node

HERE = Path(__file__).parent
KIND = "h100"
PER_NODE = 8


@dataclass(frozen=True)
class Case:
    """`models` are params of the graph that name a config in `models/`. A search with meshes of powers of two
    must come within `powers` of its bound in `seconds`, one with any length of runs within `any`."""

    name: str
    graph: str
    devices: int
    models: Mapping[str, str]
    params: Mapping[str, object] = field(default_factory=dict)
    calls: int = 6
    """Calls of models, at most."""

    @property
    def seconds(self) -> float:
        """Wall clock that a search may take (2 cores)."""
        if self.devices <= 16:
            return 10.0
        return 30.0 if self.devices <= 128 and self.calls <= 6 else 60.0

    def gap(self, meshes: str) -> float:
        """The largest gap that a search may leave."""
        if self.devices <= 16:
            return 1e-4  # proven, up to rounding
        return 0.01 if meshes == "powers" and self.calls <= 6 else 0.05


def _ppo(name: str, devices: int, size: str, critic: str, **params: object) -> Case:
    return Case(name, "ppo", devices, {"actor": size, "critic": critic}, params)


def _context(tokens: int, prompts: int) -> Case:
    prompt = min(2048, tokens // 2)
    lengths = {"prompt": prompt, "response": tokens - prompt, "prompt_mean": prompt // 2}
    spread = {"response_mean": (tokens - prompt) // 2, "response_std": (tokens - prompt) // 4}
    model, name = "llama-3.1-70b", f"ppo-4x70b-{tokens // 1024}k-128"
    return _ppo(name, 128, model, model, prompts=prompts, minibatches=4, **lengths, **spread)


def _grpo(name: str, devices: int, model: str, **params: object) -> Case:
    return Case(name, "grpo", devices, {"model": model}, params, calls=3)


LLAMA = "llama-2-7b"
CASES = (
    _ppo("ppo-7b-7b-8", 8, LLAMA, LLAMA, prompts=256),
    _ppo("ppo-7b-7b-16", 16, LLAMA, LLAMA, prompts=512),
    _ppo("ppo-7b-7b-128", 128, LLAMA, LLAMA, prompts=2048),
    _ppo("ppo-7b-7b-1024", 1024, LLAMA, LLAMA, prompts=8192),
    _ppo("ppo-70b-7b-64", 64, "llama-3-70b", "llama-3-8b", prompts=512),
    _context(2048, 1024),
    _context(8192, 512),
    _context(32768, 256),
    _grpo("grpo-1.5b-8", 8, "qwen2.5-1.5b", prompts=128),
    _grpo("grpo-7b-32", 32, "qwen2.5-7b", prompts=256),
    _grpo("grpo-32b-128", 128, "qwen2.5-32b", prompts=512, response=8192, response_mean=3000),
    Case("remax-32b-1024", "remax", 1024, {"model": "qwen2.5-32b"}, {"prompts": 4096}),
    _grpo("grpo-235b-moe-256", 256, "qwen3-235b-a22b", prompts=1024),
    Case("eight-calls-128", "eight", 128, {"actor": LLAMA, "critic": LLAMA}, {"prompts": 2048}, calls=8),
    _grpo("async-grpo-7b-128", 128, "qwen2.5-7b", prompts=1024, staleness=1),
    _grpo("async-grpo-32b-1024", 1024, "qwen2.5-32b", prompts=4096, staleness=1),
)


def cluster(case: Case) -> Cluster:
    """Nodes of 8 H100."""
    nodes = (Node(f"node{index:03}", PER_NODE, KIND) for index in range(case.devices // PER_NODE))
    return Cluster(tuple(filled(node) for node in nodes))


def models(case: Case) -> Models:
    """The graph of a case, and what is known of its models: what `realflow plan` would find."""
    overrides = [f"{name}={config_folder(model)}" for name, model in case.models.items()]
    overrides += [f"{name}={value}" for name, value in case.params.items()]
    return api.known_models(api.load_graph(HERE / "graphs" / f"{case.graph}.yaml", overrides))


@lru_cache
def config_folder(model: str) -> Path:
    """A model's folder with nothing but its config."""
    folder = Path(tempfile.gettempdir()) / "realflow-configs" / model
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(HERE / "models" / f"{model}.json", folder / "config.json")
    return folder
