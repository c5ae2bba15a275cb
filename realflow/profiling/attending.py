"""Attention alone: what samples that share their beginnings pay for all of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, product

import torch

from realflow.engines.part import heads_of
from realflow.models.attention import Packing, attend_packed
from realflow.models.causal import CausalModel
from realflow.models.sharing import find_shared
from realflow.profiling.bench import Bench, Job, Timed, clock
from realflow.profiling.models import Models, uneven
from realflow.profiling.request import SMALL_VOCABULARY, Grids, Setting, Subject

_GROUP = 8
"""Samples that share the first three quarters of their tokens."""


def attention_jobs(
    subject: Subject, setting: Setting, bench: Bench, models: Models, grids: Grids
) -> Iterator[Job]:
    """Seconds of one layer's attention (no products with weights) by tokens and tokens of a sequence:
    `attention` of tokens that all are distinct, `spread` of as many that groups of samples share."""
    key = {"model": subject.name}
    for (tokens, length), what in product(grids.attention, ("attention", "spread")):

        def make(tokens: int = tokens, length: int = length, what: str = what) -> Timed:
            model = models.get(subject, 1, SMALL_VOCABULARY, bench.place(setting))
            return _attention(model, tokens, length, shares=what == "spread")

        yield Job(what, key, ("tokens", "length"), (tokens, length), setting, make)


def _attention(model: CausalModel, tokens: int, length: int, *, shares: bool) -> Timed:
    count = max(1, tokens // length)
    lengths = uneven(count, length)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    shared = find_shared(_ids(lengths, length), ends) if shares else None
    packing = Packing.of(ends, model.device, shared)
    rows = int(ends[-1]) if shared is None else len(shared.keep)
    heads, config = heads_of(model), model.config.get_text_config()
    kept = heads.cached if heads.fill_grid else heads.query  # uneven heads are picked one for each query head
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    query, key, value = (
        torch.randn(rows, number, size, device=model.device, dtype=model.dtype, requires_grad=True)
        for number in (heads.query, kept, kept)
    )
    scale, device = size**-0.5, model.device

    def work() -> dict[str, float]:
        with torch.no_grad():
            began = clock(device)
            attend_packed(query, key, value, packing, scale, None)
            inferred = clock(device)
        again = clock(device)
        output = attend_packed(query, key, value, packing, scale, None)
        forward = clock(device)
        torch.autograd.backward(output, torch.ones_like(output))
        backward = clock(device)
        for tensor in (query, key, value):
            tensor.grad = None
        return {"infer": inferred - began, "forward": forward - again, "backward": backward - forward}

    return work


def _ids(lengths: Sequence[int], mean: int) -> torch.Tensor:
    """Tokens of sequences: those of a group have as many in common as are three quarters of the mean."""
    common, found, last = mean * 3 // 4, [], 0
    for index, length in enumerate(lengths):
        own = torch.arange(last, last + length)
        if index % _GROUP == 0:
            first = own
        same = min(common, length, len(first))
        found.append(torch.cat([first[:same], own[same:]]))
        last += length
    return torch.cat(found)
