"""The commands against a cache of their own, in which the shipped graphs' model has a card, and another
model, `small-llama`, one that tells how it can be cut."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
from calling import Launched
from small_cards import llama_card

from realflow.models.card import Card, Parameter, config_hash, store
from realflow.planfile import Plan

MODEL = "smollm2-135m-instruct"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
"""What the planner counts with; the card says how it can be cut (not at all)."""
SMALL = CONFIG | {
    "hidden_size": 72,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def model_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a model folder (a config only) and its card; the current folder is empty."""
    cache, work = tmp_path / "cache", tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("REALFLOW_CACHE", str(cache))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMIX_NAMESPACE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    folder = cache / "models" / MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    store(
        Card(
            hash=config_hash(folder),
            architecture="LlamaForCausalLM",
            model_type="llama",
            parameters=(Parameter("model.embed_tokens.weight", (100, 16), "bfloat16"),),
            tied={},
            layers=2,
            hidden=16,
            intermediate=32,
            heads=4,
            kv_heads=2,
            head_dim=4,
            vocab=100,
            max_positions=64,
            tensor_styles={},
            pipeline_styles={},
        )
    )
    other = cache / "models" / "small-llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(SMALL))
    store(dataclasses.replace(llama_card(hidden=72, heads=9, kv_heads=3), hash=config_hash(other)))
    return cache


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """A test that has this can start no processes: both doors lead here."""
    seen = Launched()

    def supervise(plan: Plan, run_dir: Path, *, quiet: bool = False, restarts: int = 0) -> object:
        seen.calls.append((plan, run_dir, quiet))
        if seen.error is not None:
            raise seen.error
        return types.SimpleNamespace(run_dir=run_dir, metrics=[{"step": 0}])

    def worker_main(plan_path: Path, run_dir: Path) -> int:
        seen.calls.append((plan_path, run_dir))
        return seen.code

    def module(name: str, **content: object) -> None:
        fake = types.ModuleType(name)
        vars(fake).update(content)
        monkeypatch.setitem(sys.modules, name, fake)
        package, _, short = name.rpartition(".")
        monkeypatch.setattr(sys.modules[package], short, fake, raising=False)

    import realflow.launch
    import realflow.runtime  # noqa: F401

    module("realflow.launch.local", supervise=supervise)
    module("realflow.runtime.worker", main=worker_main)
    return seen
