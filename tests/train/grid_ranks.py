"""Training and inference under many layouts in one launch, compared with plain Hugging Face.

Each rank compares what it holds with the reference of `grid_reference` and writes what it found as
JSON; each element of a tensor is compared by one of the ranks that count it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from comparing import largest
from grid_reference import (
    ALPHA,
    LOSSES,
    READS,
    SPEC,
    STEPS,
    TEMPERATURE,
    Case,
    make_adapter,
    make_model,
    micro_batches,
    reference,
    samples_of,
    wanted,
)
from safetensors.torch import load_file, save_file

from realflow.engines.infer import infer
from realflow.engines.norms import counts
from realflow.engines.objective import Objective
from realflow.engines.shards import Piece
from realflow.engines.state import load_state, save_state
from realflow.engines.train import TrainEngine
from realflow.errors import RunError
from realflow.graph.types import LoraSpec
from realflow.layout import Box, DeviceMesh
from realflow.models.causal import CausalModel, load_model
from realflow.models.lora import AdapterSource
from realflow.models.place import Place, groups_of

# ---------------------------------------------------------------- one rank


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*side) for side in box)


class Comparison:
    """Squared differences of the boxes that this rank holds from the reference's."""

    def __init__(self, expected: Mapping[str, torch.Tensor]) -> None:
        self.expected = expected
        self.found: dict[str, dict[str, list[float]]] = {}

    def add(self, kind: str, name: str, box: Box, values: torch.Tensor) -> None:
        """Values of a box of a parameter."""
        self._count(kind, name, values - self.wanted(kind, name)[_slices(box)])

    def add_flat(self, kind: str, piece: Piece, held: Box, values: torch.Tensor) -> None:
        """Values [last - first] of a range of the elements of a parameter, of which the rank holds a box."""
        there = self.wanted(kind, piece.name)[_slices(held)].reshape(-1)[piece.first : piece.last]
        self._count(kind, piece.name, values - there)

    def _count(self, kind: str, name: str, off: torch.Tensor) -> None:
        entry = self.found.setdefault(kind, {}).setdefault(name, [0.0, 0, self.norm(kind, name)])
        entry[0] += float(off.detach().double().square().sum())
        entry[1] += off.numel()

    def wanted(self, kind: str, name: str) -> torch.Tensor:
        return wanted(self.expected, kind, name)

    def norm(self, kind: str, name: str) -> float:
        return float(self.wanted(kind, name).norm())


def run_case(case: Case, folder: Path, place: Place, expected: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Infer, train, compare; what this rank found."""
    dp = place.dp
    adapters = adapters_of(folder, case)
    model = load_model(folder / case.model, dtype=case.dtype, place=place, head=case.head, adapters=adapters)
    start = {name: view(model, name).clone() for name in model.trained.slots}
    frozen = frozen_weights(model)
    model.recompute, model.sequence_parallel = case.recompute, case.sequence
    spec = replace(SPEC, eps=1e-5) if case.mistake == "eps" else SPEC
    engine = TrainEngine(model, spec, schedule=case.schedule, bucket=1024)
    objective = Objective(LOSSES[case.head], READS, {}, TEMPERATURE, case.normalise, {"advantages": "token"})
    if case.mistake == "infinite":
        return {"error": refuses_infinite(engine, objective, dp.index, dp.size)}
    found = Comparison(expected)
    result: dict[str, Any] = {"found": found.found}
    if not case.after:
        result["inferred"] = compare_inferred(case, folder, model, expected)
    make_mistake(case, engine, model, place.everyone.index)
    steps = range(STEPS)
    if case.after:
        load_state(engine, folder / f"state-{case.reference}-{case.after}")
        assert engine.version == STEPS
        steps = range(STEPS, STEPS + 1)
    result["metrics"] = [train_step(case, engine, objective, step, found) for step in steps]
    assert engine.version == steps[-1] + 1
    result |= compare_weights(engine, start, steps[-1] + 1, found)
    after = frozen_weights(model)
    result["frozen"] = all(torch.equal(values, after[name]) for name, values in frozen.items())
    if case.dtype == "float32":
        gradient_after(case, engine, objective, found)
    if any(other.after == case.layout for other in ALL[case.reference]) and not case.mistake:
        save_state(engine, folder / f"state-{case.reference}-{case.layout}")
    engine.close()
    return result


def adapters_of(folder: Path, case: Case) -> AdapterSource | None:
    if not case.lora:
        return None
    alpha = ALPHA * (1 + 1e-3) if case.mistake == "another-scale" else ALPHA
    return AdapterSource(LoraSpec(case.lora, alpha), folder=folder / case.adapter)


def view(model: CausalModel, name: str) -> torch.Tensor:
    """A trained parameter as this rank holds it."""
    return replace(model.flat, slots=model.trained.slots).view(name)


def frozen_weights(model: CausalModel) -> dict[str, torch.Tensor]:
    """Copies of the weights that are not to change."""
    names = model.flat.slots.keys() - model.trained.slots.keys()
    return {name: model.flat.view(name).clone() for name in names}


def train_step(
    case: Case, engine: TrainEngine, objective: Objective, step: int, found: Comparison
) -> dict[str, float]:
    """One optimizer step, its gradient compared; after the second the engine is away for a while."""
    place = engine.model.place
    batches = micro_batches(step, place.dp.index, place.dp.size)
    if case.mistake == "scaled-sample" and place.everyone.index == place.everyone.size - 1 and step == 0:
        batches[0].fields["advantages"].mul_(1 + 1e-6)
    metrics = engine.backward(batches, objective)
    if case.mistake == "averaged":
        for gradient in engine.gradients():
            gradient.div_(place.dp.size)
    compare_gradient(engine, f"g{step}", found)
    metrics.update(engine.update())
    if step == 1:
        engine.offload()
        engine.restore()
    return metrics


def gradient_after(case: Case, engine: TrainEngine, objective: Objective, found: Comparison) -> None:
    """The gradient after `STEPS` updates, from the reference's weights: in float32 those of two runs differ
    by what rounding makes of an update of lr, and deep models multiply that."""
    model, dp = engine.model, engine.model.place.dp
    for name, box in model.trained.boxes.items():
        view(model, name).copy_(found.expected[f"w{STEPS}/{name}"][_slices(box)])
    engine.backward(micro_batches(STEPS, dp.index, dp.size), objective)
    compare_gradient(engine, f"g{STEPS}", found)


def compare_gradient(engine: TrainEngine, kind: str, found: Comparison) -> None:
    """The parts of this step's gradient that this rank owns, and no other counts."""
    place, data = engine.model.place, engine._gradients.data
    for run in engine.masters.runs:
        if counts(engine.arrangement, place, run.order):
            for piece in engine.arrangement.names(run.order, run.order + run.size):
                values = data[piece.order : piece.order + piece.last - piece.first]
                found.add_flat(kind, piece, engine.model.trained.boxes[piece.name], values)


def compare_weights(
    engine: TrainEngine, start: Mapping[str, torch.Tensor], step: int, found: Comparison
) -> dict[str, Any]:
    """Masters of this rank's shard; compute weights of everything that it holds."""
    model, kind = engine.model, f"update{step}"
    boxes, worst, digests = model.trained.boxes, 0.0, {}
    for shard in engine.masters.shards():
        if shard.counted:
            before = found.expected[f"w0/{shard.name}"][_slices(shard.box)]
            found.add(kind, shard.name, shard.box, shard.tensors["master"] - before)
    for name, box in boxes.items():
        values = view(model, name)
        if step == STEPS:  # a run that continues did not start from the first weights
            off = values.double() - start[name].double() - found.wanted(kind, name)[_slices(box)]
            worst = largest((worst, float(off.norm()) / found.norm(kind, name)))
        content = values.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digests[f"{name} {box}"] = hashlib.sha256(content).hexdigest()
    same = all(rounded(model, boxes[shard.name], shard) for shard in engine.masters.shards())
    return {"weights": worst, "digests": digests, "rounded": same}


ALL: dict[str, list[Case]] = {}
"""Reference -> the cases of this launch that are compared with it."""


def rounded(model: CausalModel, held: Box, shard: Any) -> bool:
    """Whether the compute weights of a shard are its masters, rounded."""
    local = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(shard.box, held, strict=True))
    values = view(model, shard.name)[local]
    return torch.equal(values, shard.tensors["master"].to(values.dtype))


def refuses_infinite(engine: TrainEngine, objective: Objective, replica: int, dp: int) -> str:
    """The last replica's gradients are infinite: all ranks say so and change nothing."""
    batches = micro_batches(0, replica, dp)
    if replica == dp - 1:
        batches[-1].fields["advantages"].fill_(float("inf"))
    before = engine.model.flat.storage.clone()
    engine.backward(batches, objective)
    try:
        engine.update()
    except RunError as error:
        assert torch.equal(engine.model.flat.storage, before) and engine.version == 0
        return str(error)
    return ""


def compare_inferred(
    case: Case, folder: Path, model: CausalModel, expected: Mapping[str, torch.Tensor]
) -> float:
    """The largest difference of this replica's inferred numbers (only the last stage has any)."""
    place = model.place
    batches = micro_batches(0, place.dp.index, place.dp.size)
    found = infer(model, batches, {"lm": "logprobs", "value": "values"}[case.head], TEMPERATURE)
    rewards: list[torch.Tensor] = []
    if case.head == "value":  # the same checkpoint as a reward model
        judge = load_model(folder / case.model, dtype=case.dtype, place=place, head="reward")
        rewards = infer(judge, batches, "rewards")
    if not place.is_last:
        assert found == rewards == []
        return 0.0
    starts = list(itertools.accumulate((len(sample["tokens"]) for sample in samples_of(0)), initial=0))
    wanted = [expected["inferred"][starts[i] : starts[i + 1]] for batch in batches for i in batch.ids]
    pairs = list(zip(found, wanted, strict=True))
    if rewards:
        pairs += [(reward, there[-1]) for reward, there in zip(rewards, wanted, strict=True)]
    return largest(float((values - there).abs().max()) for values, there in pairs)


def make_mistake(case: Case, engine: TrainEngine, model: CausalModel, rank: int) -> None:
    if case.mistake == "no-partial-sum":
        engine._sum_partial = lambda: None  # type: ignore[method-assign]
    elif case.mistake == "no-tied-sum":
        engine._sum_tied = lambda: None  # type: ignore[method-assign]
    elif case.mistake == "perturbed" and rank == 1:
        name = next(name for name in model.flat.slots if "mlp" in name)
        model.flat.view(name).mul_(1 + (1e-5 if case.dtype == "float64" else 1e-3))


# ---------------------------------------------------------------- the launch


def worker(rank: int, folder: Path, ranks: int, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=240 + 12 * len(cases)),
    )
    meshes = {case.layout: DeviceMesh(tuple(range(case.shape.size)), case.shape) for case in cases}
    needed = sorted(set().union(*(groups_of(mesh) for mesh in meshes.values())))
    groups = {members: dist.new_group(list(members)) for members in needed}
    references = sorted({case.reference: case for case in cases}.items())
    for case in cases:
        ALL.setdefault(case.reference, []).append(case)
    for index, (name, case) in enumerate(references):
        if index % ranks == rank:
            steps = STEPS + 1 if any(other.after for other in ALL[name]) else STEPS
            save_file(reference(folder, case, steps), folder / f"{name}.reference")
    dist.barrier()
    current: tuple[str, dict[str, torch.Tensor]] = ("", {})
    for case in cases:
        if case.after:  # every rank has written its part
            dist.barrier()
        if rank >= case.shape.size:
            continue
        if current[0] != case.reference:
            current = case.reference, load_file(folder / f"{case.reference}.reference")
        place = Place.of(meshes[case.layout], rank, groups)
        result = run_case(case, folder, place, current[1])
        (folder / f"{case.name}.{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def launch(folder: Path, ranks: int, cases: list[Case]) -> Path:
    """Run `cases` on `ranks` processes; what they found lies in `folder`."""
    for case in {case.model: case for case in cases}.values():
        make_model(folder, case)
    for case in {case.adapter: case for case in cases if case.lora}.values():
        make_adapter(folder, case)
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(worker, (folder, ranks, cases), nprocs=ranks)
    return folder


def collected(folder: Path, case: Case) -> list[dict[str, Any]]:
    """What each rank found."""
    return [json.loads((folder / f"{case.name}.{rank}.json").read_text()) for rank in range(case.shape.size)]


def differences(results: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Parameter -> ‖a - b‖ / ‖b‖ over the whole tensor, of which each element must be counted once."""
    total: dict[str, list[float]] = {}
    for result in results:
        for name, (square, count, norm) in result["found"].get(kind, {}).items():
            entry = total.setdefault(name, [0.0, 0, norm])
            entry[0] += square
            entry[1] += count
    return {name: math.sqrt(square) / norm for name, (square, _, norm) in total.items()}


def elements(results: list[dict[str, Any]], kind: str) -> dict[str, int]:
    """Parameter -> how many elements of it the ranks counted."""
    total: dict[str, int] = {}
    for result in results:
        for name, (_, count, _) in result["found"].get(kind, {}).items():
            total[name] = total.get(name, 0) + count
    return total
