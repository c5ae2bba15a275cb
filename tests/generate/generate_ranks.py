"""Ranks that generate with parts of tiny models, and what one rank draws: for `test_generate_layouts`.

A case is run by the first ranks of a launch, as many as its layout has. Every rank stores what it
returned; feeds come in two portions, the second while the first is under way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Timer

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from realflow.engines.decode import Decoder, ModuleDecoder
from realflow.engines.fused import FusedDecoder
from realflow.engines.generate import Finished, NativeEngine, Prompt
from realflow.engines.lockstep import Arrivals
from realflow.engines.passes import Pass
from realflow.engines.static import StaticDecoder
from realflow.graph.types import Sampling
from realflow.layout import DeviceMesh, Layout
from realflow.models.causal import CausalModel, load_model
from realflow.models.place import Place, groups_of

# 6 query and 3 key heads: cut over 2 ranks the key heads are shared, over 3 they divide; over 4 query
# heads are uneven too. 97 token ids divide by nothing.
SMALL = {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
# 9 and 3 heads, as SmolLM2 has; enough heads and layers for 8 ranks.
DEEP = {"num_hidden_layers": 8, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
SAMPLINGS = {
    "plain": Sampling(max_new_tokens=9),
    "restricted": Sampling(max_new_tokens=9, temperature=0.8, top_k=30, top_p=0.9),
    "greedy": Sampling(max_new_tokens=9, temperature=0.0),
}
LATE = 3  # steps before the second portion of prompts
AGE = 6  # steps before weights are replaced


@dataclass(frozen=True)
class Case:
    """`mistake` is a control; `what` is `samples`, `version` (weights replaced on the way), `arrivals`
    (feeds that reach the ranks at different times), `abort`, `frames` (static steps) or `times` (passes
    that last a while, and when each rank was at one). Every other family is tied unless it is said."""

    family: str
    layout: str
    sampling: str = "plain"
    what: str = "samples"
    modules: bool = False
    slots: int = 5
    mistake: str = ""
    dtype: str = "float64"
    tied: bool | None = None

    @property
    def model(self) -> str:
        tied = FAMILIES.index(self.family) % 2 == 0 if self.tied is None else self.tied
        return f"{self.family}-{'tied' if tied else 'untied'}"

    @property
    def name(self) -> str:
        parts = [
            self.model,
            self.layout,
            self.sampling,
            self.what,
            str(self.slots),
            self.mistake,
            self.dtype,
        ]
        return "-".join([part for part in parts if part] + (["modules"] if self.modules else []))

    @property
    def size(self) -> int:
        return Layout.parse(self.layout).size


def write_models(folder: Path, models: Sequence[str], sizes: dict[str, int]) -> None:
    layers = sizes["num_hidden_layers"] // 2
    special = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"] * layers}}
    for index, model in enumerate(models):
        family, tied = model.split("-")
        for which in ("first", "second"):
            seed = 2 * index + (which == "second")
            values = {**sizes, **special.get(family, {}), "head_dim": 8}
            path = folder / f"{model}-{which}"
            tiny_model(path, family, "float64", vocab=97, seed=seed, tied=tied == "tied", **values)


def prompts(first: int = 0, count: int = 7) -> list[Prompt]:
    """Prompts of 1 to 30 tokens that mostly begin alike, two samples each, of limits of their own."""
    generator = torch.Generator().manual_seed(first)
    begin = torch.randint(0, 97, (18,), generator=generator).tolist()
    made = []
    for group in range(first, first + count):
        shared, own = torch.randint(1, 18, (2,), generator=generator).tolist()
        tail = torch.randint(0, 97, (own * 12 // 17 + 1,), generator=generator).tolist()
        limits = torch.randint(1, 10, (2,), generator=generator).tolist()
        tokens = (begin[:shared] if group % 4 else []) + tail
        made.append(Prompt(group, (2 * group, 2 * group + 1), tuple(tokens), tuple(limits)))
    return made


def engine_of(model: CausalModel, case: Case) -> NativeEngine:
    engine = NativeEngine(
        model, SAMPLINGS[case.sampling], slots=case.slots, max_length=64, seed=5, eos_ids=(7,), tokenizer=None
    )
    if case.modules:
        engine._decoder = ModuleDecoder(model)
    if case.what == "frames":
        engine._decoder = StaticDecoder(FusedDecoder(model), engine._slots.groups, capture=False)
    return engine


def generate(model: CausalModel, other: CausalModel, case: Case, place: Place) -> dict[int, Finished]:
    engine = engine_of(model, case)
    mine = prompts(count=7 if case.dtype == "float64" else 14)[place.dp.index :: place.dp.size]
    if case.what == "arrivals":
        return arriving(engine, mine)
    if case.what == "times":
        engine._decoder = Slow(engine._decoder)
    if case.what == "version":
        return with_new_weights(engine, model, other, mine)
    done: dict[int, Finished] = {}
    engine.feed(mine[:4])
    steps = 0
    while engine.busy:
        if steps == LATE:
            engine.feed(mine[4:])
            if case.what == "abort":
                done |= {
                    f.sample_id: f for f in engine.abort([mine[0].sample_ids[1], mine[-1].sample_ids[0]])
                }
        done |= {f.sample_id: f for f in engine.step()}
        steps += 1
    assert not any(engine._flights)
    if case.what == "times":
        SPANS[:] = engine._decoder.spans
    return done


SPANS: list[tuple[float, float]] = []


class Slow:
    """A decoder whose passes last a while, without using a core."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.spans: list[tuple[float, float]] = []

    def __call__(self, step: Pass, hidden: torch.Tensor | None = None) -> torch.Tensor:
        started = time.monotonic()
        time.sleep(0.03)
        out = self.decoder(step, hidden)
        self.spans.append((started, time.monotonic()))
        return out


def with_new_weights(
    engine: NativeEngine, model: CausalModel, other: CausalModel, mine: list[Prompt]
) -> dict[int, Finished]:
    """All slots are filled at once; the weights change when each sample has AGE / stages tokens."""
    engine.feed(mine[:2])
    done = {f.sample_id: f for _ in range(AGE) for f in engine.step()}
    kept = model.flat.storage.clone()
    model.flat.storage.copy_(other.flat.storage)
    engine.set_version(3)
    engine.feed(mine[2:])
    while engine.busy:
        done |= {f.sample_id: f for f in engine.step()}
    model.flat.storage.copy_(kept)
    return done


def arriving(engine: NativeEngine, mine: list[Prompt]) -> dict[int, Finished]:
    """Every rank gets its messages at times of its own; the stream ends with an empty one."""
    queue: SimpleQueue[list[Prompt]] = SimpleQueue()
    arrivals = Arrivals(queue, engine.place.replica, engine.device)
    generator = torch.Generator().manual_seed(dist.get_rank())
    times = (torch.rand(4, generator=generator) * 0.2).cumsum(0).tolist()
    for delay, portion in zip(times, (mine[:1], mine[1:3], mine[3:], []), strict=True):
        timer = Timer(delay, queue.put, (portion,))
        timer.daemon = True
        timer.start()
    done: dict[int, Finished] = {}
    drained = False
    while engine.busy or not drained:
        if not drained:
            for portion in arrivals.take(wait=not engine.busy):
                drained = not portion
                engine.feed(portion)
        done |= {f.sample_id: f for f in engine.step()}
    arrivals.close()
    return done


def spoil(model: CausalModel, mistake: str) -> None:
    """Make one rank wrong."""
    place = model.place
    name = f"model.layers.{model.stage.first}.self_attn.o_proj.weight"
    if mistake == "shard" and place.tp.index == place.tp.size - 1:
        model.flat.view(name).mul_(1.001)
    if mistake == "stage" and place.is_last:
        model.flat.view(name).mul_(1.001)


def stored(done: dict[int, Finished]) -> dict[str, torch.Tensor]:
    tensors = {}
    for sample in done.values():
        for field in ("tokens", "logprobs", "versions"):
            tensors[f"{sample.sample_id}/{field}"] = getattr(sample, field)
    return tensors


def worker(rank: int, size: int, folder: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    meshes = {case.layout: DeviceMesh(tuple(range(case.size)), Layout.parse(case.layout)) for case in cases}
    needed = sorted({group for mesh in meshes.values() for group in groups_of(mesh)})
    groups = {ranks: dist.new_group(list(ranks)) for ranks in needed}
    models: dict[tuple[str, ...], tuple[CausalModel, CausalModel]] = {}
    for case in cases:
        if rank >= case.size:
            continue
        place = Place.of(meshes[case.layout], rank, groups)
        key = case.model, case.layout, case.dtype
        if key not in models or case.mistake:
            models[key] = tuple(
                load_model(folder / f"{case.model}-{which}", dtype=case.dtype, place=place)
                for which in ("first", "second")
            )
        spoil(models[key][0], case.mistake)
        started = time.monotonic()
        found = stored(generate(*models[key], case, place))
        found["seconds"] = torch.tensor(time.monotonic() - started)
        if case.what == "times":
            found["spans"] = torch.tensor(SPANS, dtype=torch.float64)
        save_file(found, folder / f"{case.name}.{rank}")
        if case.mistake:
            del models[key]
    dist.barrier()
    dist.destroy_process_group()


def launch(folder: Path, cases: list[Case], size: int, sizes: dict[str, int]) -> Path:
    os.environ["OMP_NUM_THREADS"] = "1"
    write_models(folder, sorted({case.model for case in cases}), sizes)
    mp.spawn(worker, (size, folder, cases), nprocs=size)
    return folder


def found_by(folder: Path, case: Case) -> list[dict[str, torch.Tensor]]:
    """What each rank returned."""
    found = [load_file(folder / f"{case.name}.{rank}") for rank in range(case.size)]
    for one in found:
        del one["seconds"]
    return found
