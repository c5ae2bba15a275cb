"""Passes of the generation engine: decoding, prefill, and what it does beside the layers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from realflow.engines.fused import make_decoder
from realflow.engines.generate import NativeEngine, Prompt
from realflow.engines.kv_cache import KVCache
from realflow.engines.part import cache_shape, heads_of
from realflow.engines.passes import Pass, Prefix
from realflow.graph.types import Sampling
from realflow.models.causal import CausalModel
from realflow.profiling.bench import Bench, Job, Timed, clock
from realflow.profiling.models import Models, streamed_layers, trained_layers
from realflow.profiling.request import SMALL_VOCABULARY, Grids, Setting, Subject

_STEPS = 6
"""Steps of the engine that are timed together."""
_CONTEXT = 64


def decode_jobs(
    subject: Subject, setting: Setting, bench: Bench, models: Models, grids: Grids
) -> Iterator[Job]:
    """Seconds of one layer: `decode` by slots and context, `prefill` by tokens and those of a prefix."""
    key = {"model": subject.name}
    for slots, context in grids.decode:

        def decode(slots: int = slots, context: int = context) -> Timed:
            layers = streamed_layers(subject)
            model = models.get(subject, layers, SMALL_VOCABULARY, bench.place(setting))
            return passes(model, layers, [context] * slots, ())

        yield Job("decode", key, ("slots", "context"), (slots, context), setting, decode)
    for tokens, length in grids.layers:

        def prefill(tokens: int = tokens, length: int = length) -> Timed:
            layers = trained_layers(subject, tokens)
            model = models.get(subject, layers, SMALL_VOCABULARY, bench.place(setting))
            count = max(1, tokens // length)
            # a prefix and the row of its slot are `length` tokens
            given = [Prefix(slot, tuple(range(1, min(length, tokens)))) for slot in range(count)]
            return passes(model, layers, [min(length, tokens)] * count, given)

        yield Job("prefill", key, ("tokens", "length"), (tokens, length), setting, prefill)


def passes(
    model: CausalModel, layers: int, lengths: list[int], prefixes: tuple[Prefix, ...] | list[Prefix]
) -> Timed:
    """Seconds of a layer in a pass over slots whose sequences have these lengths; a vocabulary so small that
    the rest does not count."""
    decoder, heads, device = make_decoder(model), heads_of(model), model.device
    vocabulary = int(model.config.get_text_config().vocab_size)
    cache = KVCache(cache_shape(model, len(lengths), max(lengths) + 1), model.dtype, device)
    given = [Prefix(one.slot, tuple(token % vocabulary for token in one.tokens)) for one in prefixes]

    def work() -> dict[str, float]:
        with torch.inference_mode():
            step = Pass(cache, heads, 0, [1] * len(lengths), lengths, given)
            began = clock(device)
            decoder(step)
            return {"": (clock(device) - began) / layers}

    return work


def engine_jobs(
    subject: Subject, setting: Setting, bench: Bench, models: Models, grids: Grids
) -> Iterator[Job]:
    """Seconds of a step of the engine without its layers, by slots: `engine` with embedding, final norm,
    logits and drawing tokens, `engine_middle` where a stage has none of that (a small vocabulary)."""
    parts: list[tuple[str, int | None]] = [("engine", None)]
    if bench.ranks > 1:  # stages apart
        parts.append(("engine_middle", SMALL_VOCABULARY))
    for (what, vocab), slots in product(parts, grids.slots):

        def make(slots: int = slots, vocab: int | None = vocab) -> Timed:
            model = models.get(subject, 1, vocab, bench.place(setting))
            layer = bench.known("decode", (slots, _CONTEXT), model=subject.name, **setting.key)
            return _steps(model, slots, layer or 0.0)

        yield Job(what, {"model": subject.name}, ("slots",), (slots,), setting, make)


def _steps(model: CausalModel, slots: int, layer: float) -> Timed:
    device = model.device
    engine = NativeEngine(
        model,
        Sampling(max_new_tokens=1 << 20),
        slots=slots,
        max_length=min(int(model.config.max_position_embeddings), 4 * _CONTEXT),
        seed=1,
        eos_ids=(),
        tokenizer=None,
    )
    left = 4 * _CONTEXT - _CONTEXT - 2
    group = 0

    def work() -> dict[str, float]:
        nonlocal group
        limits = (min(left, _STEPS + 2),) * slots
        prompt = tuple(range(1, _CONTEXT - _STEPS // 2))
        engine.feed([Prompt(group, tuple(range(group * slots, (group + 1) * slots)), prompt, limits)])
        group += 1
        engine.step()  # the prefill
        began = clock(device)
        for _ in range(_STEPS):
            engine.step()
        seconds = (clock(device) - began) / _STEPS
        engine.abort()
        return {"": max(0.0, seconds - layer)}

    return work
