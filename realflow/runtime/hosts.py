"""The models of one worker: a part for each holding, shared by the calls whose holdings are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from realflow.engines.average import Average
from realflow.engines.generate import NativeEngine
from realflow.engines.state import load_shards, load_state
from realflow.engines.train import TrainEngine
from realflow.errors import InputError
from realflow.graph.evaluate import EVAL
from realflow.graph.types import Call, Graph, Sampling
from realflow.layout import Box
from realflow.models.causal import CausalModel, load_model
from realflow.models.flat import FlatBuffer
from realflow.models.lora import AdapterSource
from realflow.models.paths import resolve_model
from realflow.models.place import Groups, Place
from realflow.models.residence import Residence
from realflow.models.savelora import adapters_folder
from realflow.planfile import Plan
from realflow.planfile.holdings import After, Holding, holdings, put_away
from realflow.realloc.storage import Computed, Storage
from realflow.runtime.readiness import dispatches_before, main_rollout
from realflow.runtime.weights import kept


@dataclass(frozen=True)
class Host:
    """One holding on this rank: a part of a model. `after` is what becomes of its weights between calls;
    `average` is behind them where they follow others too coarsely."""

    model: CausalModel
    residence: Residence
    after: After
    average: Average | None = None

    @property
    def flat(self) -> FlatBuffer:
        """What reallocations read and write."""
        return self.average.flat if self.average else self.model.flat

    def bound(self, name: str, box: Box) -> Storage | Computed:
        """What reallocations read of a parameter that is held here: its memory, or, where it has an adapter,
        the two merged as they are sent."""
        adapters = self.model.adapters
        if adapters is None or not adapters.has(name):
            return Storage.of(box, self.flat.view(name))
        return Computed(box, self.model.dtype, partial(self.model.weight, name))

    def restore(self) -> None:
        """Everything is needed, the average too."""
        self.residence.restore()
        if self.average:
            self.average.residence.restore()

    def spread(self) -> None:
        """`flat` has changed: where it is an average, the weights follow from it."""
        if self.average:
            self.average.spread()

    def put_away(self) -> None:
        """Nobody needs the weights for now."""
        if self.after == "offload":
            self.residence.offload()
            if self.average:
                self.average.residence.offload()
        elif self.after == "free":
            self.residence.free()


class Hosts:
    """Every part of a model that this rank's calls use, and the engines on them."""

    def __init__(
        self, plan: Plan, rank: int, device: torch.device, groups: Groups, checkpoint: Path | None = None
    ) -> None:
        """Load them; trained models continue from `checkpoint`, if one is given."""
        self._plan, self.rank, self._device, self._groups = plan, rank, device, groups
        self._checkpoint = checkpoint
        self._generators: dict[str, NativeEngine] = {}
        self._trainers: dict[str, TrainEngine] = {}
        self._tokenizers: dict[str, Any] = {}
        self._parts: dict[tuple[str, Holding], Host] = {}
        self._models: dict[str, CausalModel] = {}
        """Call -> its view of the part that it shares: the same weights, at the call's own place."""
        for call in plan.graph.calls:
            if call.model is not None and rank in plan.calls[call.name].ranks:
                self._load(call, call.model)
                host = self._parts[call.model, self._holding(call)]
                if host.after == "offload":
                    host.put_away()
                elif host.after == "free":  # it is needed once, before anything moves
                    host.residence.offload()

    def _load(self, call: Call, name: str) -> None:
        spec, where, path = self._plan.graph.models[name], self._plan.calls[call.name], self._path(name)
        if name not in self._tokenizers:
            self._tokenizers[name] = AutoTokenizer.from_pretrained(path, local_files_only=True)
        place, key = Place.of(where.mesh, self.rank, self._groups), (name, self._holding(call))
        if key not in self._parts:
            model = load_model(
                path,
                dtype=spec.dtype,
                device=self._device,
                place=place,
                head=spec.head,
                new_head=spec.optimizer is not None,
                adapters=self._adapters(name, key[1]),
            )
            self._parts[key] = self._host(name, key[1], model)
        self._parts[key].residence.restore()
        view = replace(
            self._parts[key].model,
            place=place,
            sequence_parallel=where.sequence_parallel,
            recompute=where.recompute,
        )
        self._models[call.name] = view
        if call.op == "train":
            assert spec.optimizer is not None
            total = dispatches_before(call, self._plan.graph.steps) * call.minibatches
            trainer = TrainEngine(view, spec.optimizer, total_steps=total, schedule=where.schedule)
            if self._checkpoint is not None:
                load_state(trainer, self._checkpoint / "state" / name)
            if where.after == "offload":
                trainer.offload()
            self._trainers[name] = trainer

    def _host(self, name: str, holding: Holding, model: CausalModel) -> Host:
        graph = self._plan.graph
        after = put_away(graph, self._plan.calls, name)[self.rank, holding]
        residence = Residence(model.flat.storage, constant=name not in kept(graph))
        if graph.models[name].average is None:
            return Host(model, residence, after)
        average = Average(model)
        if self._checkpoint is not None:
            load_shards(model, list(average.shards(model.place)), self._checkpoint / "state" / name)
        return Host(model, residence, after, average)

    def _adapters(self, model: str, holding: Holding) -> AdapterSource | None:
        """Where the adapters of a holding come from: beside its weights where the model is trained there,
        else merged into them, of which as new there is nothing."""
        spec = self._plan.graph.models[model].lora
        if spec is None:
            return None
        train = self._plan.calls[self._plan.graph.trained()[model].name]
        beside = self.rank in train.ranks and holdings(train)[self.rank] == holding
        folder = None if self._checkpoint is None else adapters_folder(self._checkpoint / model, spec)
        if folder is None and not beside:
            return None
        return AdapterSource(spec, self._plan.graph.seed, folder, merged=not beside)

    def _path(self, model: str) -> Path:
        """Where a model is loaded from; under adapters lies the model that they are for."""
        frozen = self._plan.graph.models[model].lora is not None
        if self._checkpoint is not None and model in kept(self._plan.graph) and not frozen:
            return self._checkpoint / model
        return resolve_model(self._plan.graph.models[model].path)

    def _holding(self, call: Call) -> Holding:
        return holdings(self._plan.calls[call.name])[self.rank]

    def part(self, model: str, holding: Holding) -> Host:
        """The part of a model under a holding of this rank."""
        return self._parts[model, holding]

    def tokenizer(self, model: str) -> Any:
        """A model's tokenizer; None where no call of this rank runs the model."""
        return self._tokenizers.get(model)

    def trainer(self, model: str) -> TrainEngine:
        """The engine that trains a model."""
        return self._trainers[model]

    def average(self, call: Call) -> Average | None:
        """What is behind the weights of a call where they follow others too coarsely; it is here until
        these are put away."""
        average = self._parts[str(call.model), self._holding(call)].average
        if average:
            average.residence.restore()
        return average

    @contextmanager
    def using(self, call: Call) -> Iterator[CausalModel]:
        """A call runs: its weights are there, of a train call all else that it needs too. What the plan
        does not keep is put away behind it."""
        host, model = self._parts[str(call.model), self._holding(call)], self._models[call.name]
        trainer = self._trainers[str(call.model)] if call.op == "train" else None
        after = self._plan.calls[call.name].after
        assert host.residence.where != "freed", f"{call.name}: nothing has brought its weights again"
        host.residence.restore()
        model.region.axis = model.place.tp  # calls that share a part may have other tensor groups
        if trainer is not None and after == "offload":
            trainer.restore()
        yield model
        if trainer is not None and after == "offload":
            trainer.offload()
        if after != "keep":  # its KV cache too, and graphs captured on weights that may lie elsewhere later
            self._generators.pop(call.name, None)
        host.put_away()

    def forget_generators(self, examines: bool) -> None:
        """Let go of the generation engine of the evaluation, or, where it is that which begins, of all
        others: their caches are never both there."""
        for name in list(self._generators):
            if (name == EVAL) != examines:
                del self._generators[name]

    def generator(self, call: Call) -> NativeEngine:
        """The generation engine of a generate call, made at its first use."""
        if call.name not in self._generators:
            assert call.sampling is not None
            model = self._models[call.name]
            self._generators[call.name] = NativeEngine(
                model,
                call.sampling,
                slots=self._plan.calls[call.name].slots,
                max_length=max_length(model, self._plan.graph.data.prompt_tokens, call.sampling),
                seed=draw_seed(self._plan.graph, call),
                eos_ids=eos_ids(model, self._tokenizers[str(call.model)]),
                tokenizer=self._tokenizers[str(call.model)],
            )
        return self._generators[call.name]


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
    return min(positions(model), prompt + sampling.max_new_tokens)


def positions(model: CausalModel) -> int:
    """The longest sequence that a model can read."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)


def eos_ids(model: CausalModel, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a response: those of the generation config and of the tokenizer."""
    configured = model.module.generation_config.eos_token_id if model.module.generation_config else None
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise InputError(
            f"model {model.source}: neither its generation config nor its tokenizer names an end token"
        )
    return tuple(dict.fromkeys(ids))
