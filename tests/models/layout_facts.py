"""What four ranks of `layout_ranks.py` find out beside the comparisons: heads, files, reads, messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from comparing import largest
from transformers import AutoModelForSequenceClassification

from realflow.layout import DeviceMesh, Layout
from realflow.models.causal import CausalModel, load_model, master_values
from realflow.models.checkpoint import Checkpoint
from realflow.models.heads import values
from realflow.models.logprobs import token_stats
from realflow.models.place import Groups, Place
from realflow.models.precision import full_precision
from realflow.models.save import save_model

LAYOUTS = ("t2p2", "t4", "d2t2")
TOKENS = torch.tensor([5, 50, 99, 0, 7, 5, 50, 99, 0, 8, 9, 3, 4])
LENGTHS = [5, 6, 2]
COLLECTIVES = ("all_reduce", "all_gather_single", "reduce_scatter_single")


def find(folder: Path, rank: int, groups: Groups) -> dict[str, Any]:
    """All facts, as JSON values."""
    places = {
        text: Place.of(DeviceMesh(tuple(range(4)), Layout.parse(text)), rank, groups) for text in LAYOUTS
    }
    return {
        "value": value_errors(folder, places["t2p2"]),
        "saved": saved(folder, places),
        "read": read(folder, places["t2p2"]),
        "masters": masters(folder, places["t2p2"]),
        "messages": messages(folder, places["t4"]),
    }


def packed_arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return TOKENS, positions, torch.tensor([0, *LENGTHS]).cumsum(0).int()


def through(model: CausalModel, loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Forward and backward through both stages of t2p2."""
    packed = model.prepare(*packed_arguments())
    other = model.place.pp.ranks[1 - model.place.pp.index]
    if model.stage.embeds:
        output = model.run(packed)
        dist.send(output.detach().contiguous(), other)
        gradient = torch.empty_like(output)
        dist.recv(gradient, other)
        output.backward(gradient)
    else:
        hidden = torch.empty(model.boundary_rows(packed), model.config.hidden_size, dtype=model.dtype)
        dist.recv(hidden, other)
        hidden.requires_grad_()
        loss(model.run(packed, hidden)).backward()
        dist.send(hidden.grad, other)


def value_errors(folder: Path, place: Place) -> dict[str, float]:
    """A value head under t2p2, with and without sequence parallelism, against the plain classifier."""
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "value", dtype=torch.float64)
    pull = torch.linspace(-1, 2, len(TOKENS), dtype=torch.float64)
    with full_precision(torch.float64):
        states = [plain.model(piece[None]).last_hidden_state[0] for piece in TOKENS.split(LENGTHS)]
        expected = plain.score(torch.cat(states))[:, 0]
    (expected * pull).sum().backward()
    named = dict(plain.named_parameters())
    worst: dict[str, float] = {}
    for sequence in (False, True):
        model = load_model(folder / "value", dtype="float64", place=place, head="value")
        model.sequence_parallel = sequence
        kept: dict[str, float] = {}

        def loss(states: torch.Tensor, model: CausalModel = model, kept: dict = kept) -> torch.Tensor:
            found = values(model, states)
            kept["values"] = float((found - expected).abs().max())
            return (found * pull).sum()

        through(model, loss)
        for name, parameter in model.module.named_parameters():
            grad = parameter.grad
            if name in model.partition.partial(sequence=sequence):
                dist.all_reduce(grad, group=place.tp.group)
            box = tuple(slice(*span) for span in model.boxes()[name])
            error = float((grad - named[name].grad[box]).norm() / named[name].grad.norm())
            kept["gradients"] = largest((kept.get("gradients", 0.0), error))
        worst |= {f"{what}-{sequence}": error for what, error in kept.items()}
    return worst


def saved(folder: Path, places: dict[str, Place]) -> dict[str, list[str]]:
    """Models saved from their parts, into `saved-*`; the files that each rank was told of."""
    told = {}
    for name, source, head, text, limit in (
        ("tied", "llama-tied", "lm", "t2p2", 2**30),
        ("small", "qwen2-untied", "lm", "d2t2", 20_000),
        ("value", "value", "value", "t4", 2**30),
    ):
        model = load_model(folder / source, dtype="float32", place=places[text], head=head)
        told[name] = sorted(save_model(model, None, folder / f"saved-{name}", file_bytes=limit))
    return told


def read(folder: Path, place: Place) -> dict[str, int]:
    """How many elements loading a part reads, and how many this rank holds."""
    count = 0
    whole = Checkpoint.read

    def counted(checkpoint: Checkpoint, key: str, box: Any) -> torch.Tensor:
        nonlocal count
        found = whole(checkpoint, key, box)
        count += found.numel()
        return found

    Checkpoint.read = counted
    try:
        model = load_model(folder / "llama-untied", dtype="float32", place=place)
    finally:
        Checkpoint.read = whole
    return {"read": count, "held": sum(slot.size for slot in model.flat.slots.values())}


def masters(folder: Path, place: Place) -> bool:
    """Masters of a bfloat16 part are the float64 checkpoint's numbers, read again by boxes."""
    narrow, wide = (load_model(folder / "qwen3-tied", dtype=d, place=place) for d in ("bfloat16", "float32"))
    start, stop = 100, len(narrow.flat.storage) - 77
    found = master_values(narrow, start, stop, torch.float32)
    assert not torch.equal(found, narrow.flat.storage[start:stop].float())
    return torch.equal(found, wide.flat.storage[start:stop])


@contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """The collectives that are called, with the elements of their larger side."""
    seen: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, max(arg.numel() for arg in args if isinstance(arg, torch.Tensor))))
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, wrap(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def messages(folder: Path, place: Place) -> dict[str, list[tuple[str, int]]]:
    """The collectives of a forward pass, of the head, and of the backward pass, with and without
    sequence parallelism."""
    model = load_model(folder / "llama-untied", dtype="float64", place=place)
    found = {}
    for sequence in (False, True):
        model.sequence_parallel = sequence
        with recorded() as forward:
            states = model.run(model.prepare(*packed_arguments()))
        with recorded() as head:
            stats = token_stats(states, model.head.weight, TOKENS, vocabulary=model.vocabulary)
        with recorded() as backward:
            (stats.logprobs.sum() + stats.entropy.sum()).backward()
        found |= {
            f"forward-{sequence}": forward,
            f"head-{sequence}": head,
            f"backward-{sequence}": backward,
        }
    return found
