"""Native generation: continuous batching over fixed slots, with the model's own weights.

    engine.feed(prompts)
    while engine.busy:
        for sample in engine.step(): ...

A step admits queued prompts into free slots and draws one token for every slot: one forward pass
(`realflow.engines.decode`). The weights are read where they are; whoever replaces them in place
between two steps calls `set_version`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel

from realflow.data.random import uniform
from realflow.engines.decode import Pass, Prefix, cache_shape
from realflow.engines.fused import make_decoder
from realflow.engines.kv_cache import KVCache
from realflow.engines.sampling import draw
from realflow.engines.stops import Stops, Tokenizer
from realflow.errors import InputError, Problem
from realflow.graph.types import Sampling

FinishReason = Literal["stop", "length", "abort"]
_WORTH_COPYING = 8  # tokens


@dataclass(frozen=True)
class Prompt:
    """One prompt and the samples that are wanted of it.

    `max_new_tokens` has one entry for each sample where it differs from the sampling's.
    """

    group_id: int
    sample_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    max_new_tokens: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Finished:
    """One finished sample; every tensor is [L], aligned with `tokens`.

    `tokens` int64: prompt and response with the end token that was drawn. `logprobs` float32
    (float64 for a float64 model), 0 on the prompt. `loss_mask` bool, true on the response.
    `versions` int64, -1 on the prompt. `completion` is the response's text, cut before a stop string.
    """

    sample_id: int
    group_id: int
    tokens: torch.Tensor
    logprobs: torch.Tensor
    loss_mask: torch.Tensor
    versions: torch.Tensor
    finish_reason: FinishReason
    completion: str


@dataclass
class GenerateStats:
    """Sums since the engine was made.

    A slot-step is one slot in one step; `queued_*` count only the steps after whose admission
    prompts were still waiting.
    """

    steps: int = 0
    slot_steps: int = 0
    busy_slot_steps: int = 0
    queued_slot_steps: int = 0
    queued_busy_slot_steps: int = 0
    prefill_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0


class HoldsModule(Protocol):
    """A model as `realflow.models` loads it: `module` is the Hugging Face causal LM."""

    @property
    def module(self) -> PreTrainedModel:
        """The Hugging Face causal LM."""


class _Sample:
    """A sample on its way: queued, then in a slot."""

    def __init__(self, prompt: Prompt, index: int, limit: int) -> None:
        self.prompt = prompt
        self.id = prompt.sample_ids[index]
        self.limit = limit
        self.response: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.uniforms: list[float] = []

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.response)

    @property
    def newest(self) -> int:
        return self.response[-1] if self.response else self.prompt.tokens[-1]

    def finished(self, reason: FinishReason, stops: Stops, dtype: torch.dtype) -> Finished:
        """The sample as it leaves the engine."""
        before = len(self.prompt.tokens)
        return Finished(
            sample_id=self.id,
            group_id=self.prompt.group_id,
            tokens=torch.tensor([*self.prompt.tokens, *self.response]),
            logprobs=torch.tensor([0.0] * before + self.logprobs, dtype=dtype),
            loss_mask=torch.tensor([False] * before + [True] * len(self.response)),
            versions=torch.tensor([-1] * before + self.versions),
            finish_reason=reason,
            completion=stops.text(self.response),
        )


class NativeEngine:
    """Draws samples of prompts with one model on one device. Not thread-safe."""

    def __init__(
        self,
        model: HoldsModule,
        sampling: Sampling,
        *,
        slots: int,
        max_length: int,
        seed: int,
        eos_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        version: int = 0,
        prefill_tokens: int = 4096,
    ) -> None:
        """`slots` sequences of at most `max_length` tokens are decoded at once.

        A pass prefills at most `prefill_tokens` tokens (one prompt always fits). `tokenizer` may be
        None where neither text nor stop strings are wanted. Raises InputError for settings or
        models that cannot be decoded.
        """
        _check_settings(sampling, slots, max_length)
        module = model.module
        parameter = next(module.parameters())
        self.sampling = sampling
        self.seed = seed
        self.version = version
        self.max_length = max_length
        self.prefill_tokens = prefill_tokens
        self.stats = GenerateStats()
        self._shape = cache_shape(module, slots, max_length)
        self._vocabulary = module.get_input_embeddings().weight.shape[0]
        self._dtype, self._device = parameter.dtype, parameter.device
        self._decoder = make_decoder(module)
        self._stops = Stops(tokenizer, sampling.stop, eos_ids)
        self._cache: KVCache | None = None
        self._queue: deque[_Sample] = deque()
        self._slots: list[_Sample | None] = [None] * slots
        self._prefixes: list[tuple[int, ...]] = [()] * slots  # prompt prefix whose KV a slot holds

    @property
    def busy(self) -> bool:
        """Whether samples are queued or running."""
        return bool(self._queue) or any(self._slots)

    @property
    def cache_bytes(self) -> int:
        """Memory of the KV cache when it is allocated."""
        return self._shape.bytes(self._dtype)

    def feed(self, prompts: Iterable[Prompt]) -> None:
        """Queue prompts. Raises InputError, listing every bad prompt, and then queues none."""
        prompts = list(prompts)
        known = {sample.id for sample in (*self._queue, *filter(None, self._slots))}
        problems = []
        for prompt in prompts:
            problems += [
                Problem(text, where=f"prompt {prompt.group_id}") for text in self._problems(prompt, known)
            ]
            known.update(prompt.sample_ids)
        if problems:
            raise InputError(problems)
        for prompt in prompts:
            limits = self._limits(prompt)
            self._queue.extend(_Sample(prompt, index, limit) for index, limit in enumerate(limits))

    def step(self) -> list[Finished]:
        """Admit what fits and draw one token for each running sample; returns those that ended."""
        if not self.busy:
            return []
        started = time.perf_counter()
        with torch.inference_mode():
            if self._cache is None:
                self._cache = KVCache(self._shape, self._dtype, self._device)
            prefixes = self._admit(self._cache)
            self._close_gaps(self._cache)
            running = [sample for sample in self._slots if sample is not None]
            step = Pass(self._cache, [s.newest for s in running], [s.length for s in running], prefixes)
            numbers = torch.tensor([s.uniforms[len(s.response)] for s in running], dtype=torch.float64)
            tokens, logprobs = draw(self._decoder(step), numbers, self.sampling)
        finished = self._append(running, tokens.tolist(), logprobs.tolist())
        self._count(len(running), sum(len(prefix.tokens) for prefix in prefixes), started)
        return finished

    def set_version(self, version: int) -> None:
        """The weights have been replaced in place: tokens drawn from now on carry `version`.

        Running samples keep the keys and values of their past tokens; prompts that enter later are
        prefilled with the new weights.
        """
        self.version = version
        self._prefixes = [()] * len(self._slots)

    def abort(self, sample_ids: Iterable[int] | None = None) -> list[Finished]:
        """End the given samples, or all, as they are (finish reason `abort`). Unknown ids are ignored:
        a sample may have ended in the meantime."""
        chosen = None if sample_ids is None else set(sample_ids)
        ended = []
        for slot, sample in enumerate(self._slots):
            if sample is not None and (chosen is None or sample.id in chosen):
                ended.append(sample)
                self._slots[slot] = None
        ended += [sample for sample in self._queue if chosen is None or sample.id in chosen]
        gone = {sample.id for sample in ended}
        self._queue = deque(sample for sample in self._queue if sample.id not in gone)
        return [sample.finished("abort", self._stops, self._logprob_dtype) for sample in ended]

    def free_cache(self) -> None:
        """Give the KV cache's memory back; the next step allocates it again. Only while not running."""
        assert not any(self._slots), "the cache of running samples cannot be freed"
        self._cache = None
        self._prefixes = [()] * len(self._slots)

    @property
    def _logprob_dtype(self) -> torch.dtype:
        return torch.float64 if self._dtype == torch.float64 else torch.float32

    def _limits(self, prompt: Prompt) -> tuple[int, ...]:
        return prompt.max_new_tokens or (self.sampling.max_new_tokens,) * len(prompt.sample_ids)

    def _problems(self, prompt: Prompt, known: set[int]) -> list[str]:
        """What is wrong with a prompt; `known` are the sample ids that are taken."""
        found = []
        ids, limits = prompt.sample_ids, self._limits(prompt)
        if not prompt.tokens:
            found.append("it has no tokens; a prompt needs at least one")
        elif min(prompt.tokens) < 0 or max(prompt.tokens) >= self._vocabulary:
            found.append(f"token ids must be from 0 to {self._vocabulary - 1}; is it another tokenizer's?")
        if len(limits) != len(ids) or min(limits, default=1) < 1:
            found.append(f"max_new_tokens {list(limits)}: expected {len(ids)} numbers of at least 1")
        longest = len(prompt.tokens) + max(limits, default=0)
        if longest > self.max_length:
            found.append(
                f"{len(prompt.tokens)} prompt tokens and {max(limits)} new ones are {longest}, more than "
                f"max_length {self.max_length}; shorten the prompt or max_new_tokens"
            )
        if len(set(ids)) != len(ids) or known & set(ids):
            found.append(f"sample ids {list(ids)} are given twice or are still running")
        return found

    def _admit(self, cache: KVCache) -> list[Prefix]:
        """Move queued samples into free slots, lowest first; returns what the pass has to prefill.

        A prompt's tokens but the last are its prefix. Where a slot holds the keys and values of
        the same prefix or of one that begins alike (samples of one prompt, the common begin of a
        chat format), they are copied: now, or by the pass where it has yet to compute them.
        """
        fresh: dict[int, Prefix] = {}
        origin: dict[int, int] = {}  # slot -> the fresh slot that the pass copies all its tokens from
        budget = self.prefill_tokens
        admitted: list[_Sample] = []
        for slot in [slot for slot, sample in enumerate(self._slots) if sample is None]:
            if not self._queue:
                break
            tokens = self._queue[0].prompt.tokens[:-1]
            source, common = self._holder(tokens, slot)
            rest = tokens[common:]
            if rest and fresh and len(rest) > budget:
                break
            source = origin.get(source, source)
            if source in fresh and common:
                held = fresh[source]
                fresh[source] = replace(held, copies=(*held.copies, (slot, common)))
                if not rest:
                    origin[slot] = source
            elif source != slot and common:
                cache.copy(source, slot, common)
            if rest:
                fresh[slot] = Prefix(slot, rest, common)
                budget -= len(rest)
            self._prefixes[slot] = tokens
            sample = self._queue.popleft()
            self._slots[slot] = sample
            admitted.append(sample)
        self._seed(admitted)
        return list(fresh.values())

    def _holder(self, prefix: tuple[int, ...], slot: int) -> tuple[int, int]:
        """The slot that holds the most of a prefix from its begin, best `slot` itself, and how many tokens.

        Fewer tokens than `_WORTH_COPYING` count as none unless they are the whole prefix.
        """
        best, most = slot, _common(self._prefixes[slot], prefix)
        for other, held in enumerate(self._prefixes):
            if most == len(prefix):
                return best, most
            if (common := _common(held, prefix)) > most:
                best, most = other, common
        return (best, most) if most >= _WORTH_COPYING or most == len(prefix) else (slot, 0)

    def _seed(self, admitted: Sequence[_Sample]) -> None:
        """Draw each new sample's uniform numbers, for all the tokens that it may get."""
        if not admitted:
            return
        most = max(sample.limit for sample in admitted)
        ids = torch.tensor([[sample.id] for sample in admitted])
        first = torch.tensor([[len(sample.prompt.tokens)] for sample in admitted])
        for sample, row in zip(admitted, uniform(self.seed, ids, 0, first + torch.arange(most)), strict=True):
            sample.uniforms = row[: sample.limit].tolist()

    def _close_gaps(self, cache: KVCache) -> None:
        """Make the running samples occupy the lowest slots, so that a pass reads one slice of the cache.

        Needed only when free slots could not be filled; those just admitted lie lowest and stay.
        """
        low, high = 0, len(self._slots) - 1
        while True:
            while low < high and self._slots[low] is not None:
                low += 1
            while low < high and self._slots[high] is None:
                high -= 1
            if low >= high:
                return
            moved = self._slots[high]
            assert moved is not None and moved.response, "a sample that was just admitted is moved"
            cache.copy(high, low, moved.length - 1)
            self._slots[low], self._slots[high] = moved, None
            self._prefixes[low] = self._prefixes[high]

    def _append(
        self, running: Sequence[_Sample], tokens: Sequence[int], logprobs: Sequence[float]
    ) -> list[Finished]:
        """Add each sample's new token; free the slots of those that end with it."""
        finished = []
        for slot, (sample, token, logprob) in enumerate(zip(running, tokens, logprobs, strict=True)):
            sample.response.append(token)
            sample.logprobs.append(logprob)
            sample.versions.append(self.version)
            reason: FinishReason | None = None
            if self._stops.ends(sample.response):
                reason = "stop"
            elif len(sample.response) == sample.limit:
                reason = "length"
            if reason:
                self._slots[slot] = None
                finished.append(sample.finished(reason, self._stops, self._logprob_dtype))
        return finished

    def _count(self, running: int, prefilled: int, started: float) -> None:
        stats = self.stats
        stats.steps += 1
        stats.slot_steps += len(self._slots)
        stats.busy_slot_steps += running
        if self._queue:
            stats.queued_slot_steps += len(self._slots)
            stats.queued_busy_slot_steps += running
        stats.prefill_tokens += prefilled
        stats.tokens += running
        stats.seconds += time.perf_counter() - started


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens two sequences have in common at the begin."""
    if one == other:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _check_settings(sampling: Sampling, slots: int, max_length: int) -> None:
    """Raise InputError for numbers that make no sense."""
    rules = (
        (slots >= 1, f"slots is {slots}; expected at least 1"),
        (max_length >= 2, f"max_length is {max_length}; expected at least 2"),
        (sampling.temperature >= 0, f"temperature is {sampling.temperature}; expected 0 (greedy) or more"),
        (0 < sampling.top_p <= 1, f"top_p is {sampling.top_p}; expected above 0 and at most 1 (off)"),
        (sampling.top_k >= 0, f"top_k is {sampling.top_k}; expected 0 (off) or more"),
        (sampling.max_new_tokens >= 1, f"max_new_tokens is {sampling.max_new_tokens}; expected at least 1"),
    )
    problems = [Problem(text, where="generation") for right, text in rules if not right]
    if problems:
        raise InputError(problems)
