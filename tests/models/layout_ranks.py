"""One of several gloo ranks that run every case of `test_layouts.py` in one launch.

Usage: python layout_ranks.py RANK WORLD FOLDER

FOLDER holds `cases.json` (a list of `Case`s), the models, and the ranks' meeting file; this rank writes
`found-RANK.json`: case -> {what: error}. Once all cases have run, the checks of `layout_facts` do.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import layout_facts
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from realflow.layout import DeviceMesh, Layout
from realflow.models.causal import CausalModel, Packed, load_model
from realflow.models.logprobs import TokenStats, token_logprobs, token_stats
from realflow.models.place import Place, groups_of
from realflow.models.precision import full_precision

TEMPERATURE = 0.8


@dataclass(frozen=True)
class Case:
    """One comparison with the plain model. `spoil` names a control that must fail."""

    model: str
    layout: str
    sequence: bool = False
    recompute: bool = False
    defer: bool = False
    dtype: str = "float64"
    spoil: str = ""

    @property
    def name(self) -> str:
        flags = [key for key, value in asdict(self).items() if value is True]
        return "-".join([self.model, self.layout, *flags, self.dtype, *filter(None, [self.spoil])])


@dataclass(frozen=True)
class Data:
    """A packed batch with beginnings in common, and the pull of its loss on each scored token."""

    tokens: torch.Tensor
    lengths: list[int]
    places: torch.Tensor
    pull: torch.Tensor

    @property
    def targets(self) -> torch.Tensor:
        return self.tokens[self.places]


@cache
def data_of(replica: int) -> Data:
    """Data of a data-parallel replica: different lengths and tokens on each."""
    generator = torch.Generator().manual_seed(100 + replica)
    beginning = torch.randint(0, 100, (5 + replica,), generator=generator)
    rows = [torch.randint(0, 100, (n,), generator=generator) for n in (3, 9, 4 + replica)]
    rows.append(torch.tensor([0, 25, 33, 50, 66, 75, 99]))  # padding id, and first ids of ranks' parts
    rows = [torch.cat([beginning, row]) for row in rows[:3]] + rows[3:]
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])
    places = (positions > 0).nonzero().flatten()
    pull = torch.randn(len(places), generator=generator, dtype=torch.float64)
    return Data(torch.cat(rows), lengths, places, pull)


def loss_of(stats: TokenStats, data: Data) -> torch.Tensor:
    pull = data.pull.to(stats.logprobs.dtype)
    return (stats.logprobs * pull).sum() + 0.3 * (stats.entropy * pull.flip(0)).sum()


@cache
def reference(folder: Path, replica: int) -> dict[str, torch.Tensor]:
    """Log probabilities, entropies and gradients of the plain model, one sequence at a time."""
    data = data_of(replica)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with full_precision(torch.float64):
        logits = [model(piece[None]).logits[0, :-1] for piece in data.tokens.split(data.lengths)]
    log_p = torch.log_softmax(torch.cat(logits) / TEMPERATURE, -1)
    stats = TokenStats(log_p.gather(1, data.targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1))
    loss_of(stats, data).backward()
    gradients = {f"grad/{name}": p.grad for name, p in model.named_parameters()}
    return {"logprobs": stats.logprobs.detach(), "entropy": stats.entropy.detach(), **gradients}


def forward(model: CausalModel, packed: Packed) -> tuple[torch.Tensor | None, torch.Tensor]:
    """This stage's input (a leaf, None on the first) and output."""
    hidden = None
    if not model.stage.embeds:
        rows = model.boundary_rows(packed)
        hidden = torch.empty(rows, model.config.hidden_size, dtype=model.dtype)
        dist.recv(hidden, model.place.pp.ranks[model.place.pp.index - 1])
        hidden.requires_grad_()
    output = model.run(packed, hidden)
    if not model.stage.ends:
        assert len(output) == model.boundary_rows(packed)
        dist.send(output.detach().contiguous(), model.place.pp.ranks[model.place.pp.index + 1])
    return hidden, output


def gradients(model: CausalModel, data: Data, spoil: str) -> dict[str, torch.Tensor]:
    """Forward and backward through all stages; gradients by name, summed over tp and ends."""
    positions = torch.cat([torch.arange(n) for n in data.lengths])
    cu = torch.tensor([0, *data.lengths]).cumsum(0).int()
    packed = model.prepare(data.tokens, positions, cu)
    hidden, output = forward(model, packed)
    found: dict[str, torch.Tensor] = {}
    if model.stage.ends:
        rows = output[data.places - 1]
        options = {"temperature": TEMPERATURE, "vocabulary": model.vocabulary}
        stats = token_stats(rows, model.head.weight, data.targets, **options)
        again = token_logprobs(rows, model.head.weight, data.targets, **options)
        assert torch.equal(stats.logprobs, again)
        found |= {"logprobs": stats.logprobs.detach(), "entropy": stats.entropy.detach()}
        loss_of(stats, data).backward()
    else:
        received = torch.empty_like(output)
        dist.recv(received, model.place.pp.ranks[model.place.pp.index + 1])
        output.backward(received)
    if hidden is not None:
        dist.send(hidden.grad.contiguous(), model.place.pp.ranks[model.place.pp.index - 1])
    named = dict(model.module.named_parameters())
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in named.items()}
    owner = {id(p): name for name, p in named.items()}
    if model.deferred.defer:
        inner = [p.grad for name, p in named.items() if ".layers." in name and p.dim() > 1]
        assert inner and all(grad is None for grad in inner), "a weight's gradient was not deferred"
        model.deferred.take().run(lambda p, grad: grads[owner[id(p)]].add_(grad))
    if spoil != "partial":
        for name in model.partition.partial(sequence=model.sequence_parallel):
            if name in grads:
                dist.all_reduce(grads[name], group=model.place.tp.group)
    ends = model.place.ends
    if spoil != "tied" and ends is not None and ends.size > 1:
        for name in model.partition.tied:
            dist.all_reduce(grads[name], group=ends.group)
    return {**found, **{f"grad/{name}": grad for name, grad in grads.items()}}


def spoil(model: CausalModel, what: str) -> None:
    """Make one mistake that must show."""
    modules = dict(model.module.named_modules())
    last = model.place.everyone.index == model.place.everyone.size - 1
    if what == "shard" and last:  # one rank's part of one layer is wrong
        name = next(name for name in model.flat.slots if name.endswith("up_proj.weight"))
        model.flat.view(name).mul_(1.001)
    if what == "picks":  # query heads take the wrong one of the shared key heads
        for module in modules.values():
            if hasattr(module, "kv_picks"):
                module.kv_picks = 1 - module.kv_picks
    if what == "padding":  # every rank's first row is taken for that of the padding id
        for module in modules.values():
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = 0
    if what == "bias":  # every rank adds the bias, and the sum has it t times
        for module in modules.values():
            if isinstance(module, torch.nn.Linear) and "forward" in vars(module):
                layer = module
                layer.forward = lambda x, layer=layer: model.region.leave(
                    torch.nn.functional.linear(x, layer.weight, layer.bias)
                )


def run_case(case: Case, folder: Path, place: Place) -> dict[str, float]:
    """Error of each result: norm of the difference over the norm of the plain model's."""
    model = load_model(folder / case.model, dtype=case.dtype, place=place)
    model.sequence_parallel, model.recompute = case.sequence, case.recompute
    model.deferred.defer = case.defer
    with torch.no_grad():
        spoil(model, case.spoil)
    replica = place.dp.index
    expected = reference(folder / case.model, replica)
    boxes = model.boxes()
    errors = {}
    for what, value in gradients(model, data_of(replica), case.spoil).items():
        right = expected[what]
        if what.startswith("grad/"):
            right = right[tuple(slice(*span) for span in boxes[what.removeprefix("grad/")])]
        assert right.shape == value.shape, (what, right.shape, value.shape)
        errors[what] = float((value.double() - right).norm() / expected[what].norm())
    return errors


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    cases = [Case(**entry) for entry in json.loads((folder / "cases.json").read_text())]
    texts = {*(case.layout for case in cases), *layout_facts.LAYOUTS}
    layouts = {text: Layout.parse(text) for text in texts}
    meshes = {text: DeviceMesh(tuple(range(lay.size)), lay) for text, lay in layouts.items()}
    wanted = sorted({ranks for mesh in meshes.values() for ranks in groups_of(mesh)})
    groups = {ranks: dist.new_group(list(ranks)) for ranks in wanted}
    found: dict[str, dict[str, float]] = {}
    for case in cases:
        mesh = meshes[case.layout]
        if rank in mesh.ranks:
            found[case.name] = run_case(case, folder, Place.of(mesh, rank, groups))
    if rank < 4:
        found["facts"] = layout_facts.find(folder, rank, groups)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
