"""The models of one worker: loaded once, shared by all calls of the same model on this rank."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from realflow.engines.generate import NativeEngine
from realflow.engines.state import load_state
from realflow.engines.train import TrainEngine
from realflow.errors import InputError
from realflow.graph.types import Call, Graph, Sampling
from realflow.models.causal import CausalModel, load_model
from realflow.models.paths import resolve_model
from realflow.planfile import Plan
from realflow.realloc.execute import Buckets, Moved, execute, local_shards, verify
from realflow.realloc.transfers import Schedule, replicated, transfers
from realflow.runtime.readiness import dispatches_before, main_rollout

Groups = Mapping[tuple[int, ...], dist.ProcessGroup]


@dataclass
class Host:
    """One model on this rank. Train and generate engines work on the same storage."""

    model: CausalModel
    tokenizer: Any
    path: Path
    trainer: TrainEngine | None = None


class Hosts:
    """Every model that this rank's calls use."""

    def __init__(
        self, plan: Plan, rank: int, device: torch.device, groups: Groups, checkpoint: Path | None = None
    ) -> None:
        """Load them; trained models continue from `checkpoint`, if one is given."""
        self._plan, self.rank, self._device, self._groups = plan, rank, device, groups
        self._generators: dict[str, NativeEngine] = {}
        self._schedules: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Schedule] = {}
        self._buckets = Buckets(device=device)
        self.hosts: dict[str, Host] = {}
        for name, spec in plan.graph.models.items():
            calls = [c for c in plan.graph.calls if c.model == name and rank in plan.calls[c.name].ranks]
            if not calls:
                continue
            continued = checkpoint is not None and name in plan.graph.trained()
            path = checkpoint / name if checkpoint and continued else resolve_model(spec.path)
            model = load_model(path, dtype=spec.dtype, device=device)
            host = Host(model, AutoTokenizer.from_pretrained(path, local_files_only=True), path)
            train = next((call for call in calls if call.op == "train"), None)
            if train is not None:
                host.trainer = self._trainer(train, model)
                if checkpoint and continued:
                    load_state(host.trainer, checkpoint / "state" / name)
            self.hosts[name] = host

    def _trainer(self, call: Call, model: CausalModel) -> TrainEngine:
        mesh = self._plan.calls[call.name].mesh
        ranks = mesh.group_of("dp", self.rank)
        spec = self._plan.graph.models[str(call.model)].optimizer
        assert spec is not None
        return TrainEngine(
            model,
            spec,
            total_steps=dispatches_before(call, self._plan.graph.steps) * call.minibatches,
            group=self._groups.get(ranks),
            rank=ranks.index(self.rank),
            size=len(ranks),
        )

    def generator(self, call: Call) -> NativeEngine:
        """The generation engine of a generate call, made at its first use."""
        if call.name not in self._generators:
            assert call.sampling is not None
            host = self.hosts[str(call.model)]
            self._generators[call.name] = NativeEngine(
                host.model,
                call.sampling,
                slots=self._plan.calls[call.name].slots,
                max_length=max_length(host.model, self._plan.graph.data.prompt_tokens, call.sampling),
                seed=draw_seed(self._plan.graph, call),
                eos_ids=eos_ids(host),
                tokenizer=host.tokenizer,
            )
        return self._generators[call.name]

    def reallocate(self, model: str, sources: Sequence[int], destinations: Sequence[int]) -> Moved:
        """Copy a model's weights from ranks `sources` to ranks `destinations`; all of them call it together.

        The first time for the same ranks, checksums of every parameter are compared.
        """
        flat = self.hosts[model].model.flat
        shapes = {name: slot.shape for name, slot in flat.slots.items()}
        itemsize = flat.storage.itemsize
        there, here = (replicated(shapes, itemsize, ranks) for ranks in (sources, destinations))
        edge = (model, tuple(sources), tuple(destinations))
        first = edge not in self._schedules
        if first:
            nodes = [name.rpartition(":")[0] for name in self._plan.cluster.devices]
            self._schedules[edge] = transfers(there, here, dict(enumerate(nodes))).part(self.rank)
        part = self._schedules[edge]
        tensors = {name: flat.view(name) for name in shapes}
        read, write = (local_shards(specs, self.rank, tensors) for specs in (there, here))
        moved = execute(part, self.rank, None, read, write, self._buckets)
        if first:
            verify(part, self.rank, None, read, write)
        return moved


def draw_seed(graph: Graph, call: Call) -> int:
    """The seed (below 2**64) under which a generate call draws.

    The main rollout has the run's own. Every other call has that mixed with its name: its samples
    have the same ids, and would otherwise be drawn with the same numbers.
    """
    if call == main_rollout(graph):
        return graph.seed
    digest = hashlib.blake2b(f"{graph.seed} {call.name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def max_length(model: CausalModel, prompt: int, sampling: Sampling) -> int:
    """The longest sequence that a KV cache slot must hold, for prompts of at most `prompt` tokens."""
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)
    return min(limit, prompt + sampling.max_new_tokens)


def eos_ids(host: Host) -> tuple[int, ...]:
    """The tokens that end a response: those of the generation config and of the tokenizer."""
    configured = (
        host.model.module.generation_config.eos_token_id if host.model.module.generation_config else None
    )
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if host.tokenizer.eos_token_id is not None:
        ids.append(host.tokenizer.eos_token_id)
    if not ids:
        raise InputError(
            f"model {host.path}: neither its generation config nor its tokenizer names an end token"
        )
    return tuple(dict.fromkeys(ids))
