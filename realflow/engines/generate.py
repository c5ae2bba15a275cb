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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from realflow.data.random import uniform
from realflow.engines.decode import Pass, cache_shape
from realflow.engines.fused import make_decoder
from realflow.engines.kv_cache import KVCache
from realflow.engines.samples import Finished, FinishReason, Prompt, Sample
from realflow.engines.sampling import draw
from realflow.engines.slots import Slots
from realflow.engines.stops import Stops, Tokenizer
from realflow.errors import InputError, Problem
from realflow.graph.types import Sampling

__all__ = ["Finished", "GenerateStats", "NativeEngine", "Prompt"]


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
        self._slots = Slots(slots)

    @property
    def busy(self) -> bool:
        """Whether samples are queued or running."""
        return bool(self._slots.queue or self._slots.running)

    def feed(self, prompts: Iterable[Prompt]) -> None:
        """Queue prompts. Raises InputError, listing every bad prompt, and then queues none."""
        prompts = list(prompts)
        known = {sample.id for sample in (*self._slots.queue, *self._slots.running)}
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
            self._slots.queue.extend(Sample(prompt, index, limit) for index, limit in enumerate(limits))

    def step(self) -> list[Finished]:
        """Admit what fits and draw one token for each running sample; returns those that ended."""
        if not self.busy:
            return []
        started = time.perf_counter()
        with torch.inference_mode():
            if self._cache is None:
                self._cache = KVCache(self._shape, self._dtype, self._device)
            admitted, prefixes = self._slots.admit(self._cache, self.prefill_tokens)
            self._seed(admitted)
            self._slots.close_gaps(self._cache)
            running = self._slots.running
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
        self._slots.forget_prefixes()

    def abort(self, sample_ids: Iterable[int] | None = None) -> list[Finished]:
        """End the given samples, or all, as they are (finish reason `abort`). Unknown ids are ignored:
        a sample may have ended in the meantime."""
        ended = self._slots.remove(None if sample_ids is None else set(sample_ids))
        return [sample.finished("abort", self._stops, self._logprob_dtype) for sample in ended]

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

    def _seed(self, admitted: Sequence[Sample]) -> None:
        """Draw each new sample's uniform numbers, for all the tokens that it may get."""
        if not admitted:
            return
        most = max(sample.limit for sample in admitted)
        ids = torch.tensor([[sample.id] for sample in admitted])
        first = torch.tensor([[len(sample.prompt.tokens)] for sample in admitted])
        for sample, row in zip(admitted, uniform(self.seed, ids, 0, first + torch.arange(most)), strict=True):
            sample.uniforms = row[: sample.limit].tolist()

    def _append(
        self, running: Sequence[Sample], tokens: Sequence[int], logprobs: Sequence[float]
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
                self._slots.slots[slot] = None
                finished.append(sample.finished(reason, self._stops, self._logprob_dtype))
        return finished

    def _count(self, running: int, prefilled: int, started: float) -> None:
        stats = self.stats
        stats.steps += 1
        stats.slot_steps += len(self._slots.slots)
        stats.busy_slot_steps += running
        if self._slots.queue:
            stats.queued_slot_steps += len(self._slots.slots)
            stats.queued_busy_slot_steps += running
        stats.prefill_tokens += prefilled
        stats.tokens += running
        stats.seconds += time.perf_counter() - started


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
