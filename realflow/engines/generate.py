"""Native generation: continuous batching over fixed slots, with the model's own weights.

    engine.feed(prompts)
    while engine.busy:
        for sample in engine.step(): ...

A step admits queued prompts into free slots and draws one token for every slot: one forward pass
(`realflow.engines.passes`). The weights are read where they are; whoever replaces them in place
between two steps calls `set_version`.

Where a replica of the model has several ranks, all of them make the same calls of `feed`, `step`,
`abort` and `set_version` in the same order, hold the same samples, and return the same tokens and
log probabilities, bit for bit. Tensor ranks have their own heads and token ids. With p pipeline
stages the slots are p groups that take turns: a step is the pass of one group, and while a stage
makes it the others are at the passes of other groups. Its tokens are known when the group's next
turn comes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from realflow.data.random import uniform
from realflow.engines.cut_sampling import Cut, draw_cut
from realflow.engines.fused import make_decoder
from realflow.engines.kv_cache import KVCache
from realflow.engines.line import Flight, Line
from realflow.engines.part import HoldsPart, cache_shape, dtype_of, heads_of
from realflow.engines.passes import Pass, Prefix
from realflow.engines.samples import Finished, FinishReason, Prompt, Sample
from realflow.engines.sampling import draw
from realflow.engines.slots import Slots
from realflow.engines.static import with_graphs
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


class NativeEngine:
    """Draws samples of prompts with one replica of a model. Not thread-safe."""

    def __init__(
        self,
        model: HoldsPart,
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
        self.place = model.place
        self.sampling = sampling
        self.seed = seed
        self.version = version
        self.max_length = max_length
        self.prefill_tokens = prefill_tokens
        self.stats = GenerateStats()
        config = model.module.config.get_text_config()
        self._shape = cache_shape(model, slots, max_length)
        self._heads = heads_of(model)
        self._vocabulary: int = config.vocab_size
        self._dtype, self.device = dtype_of(model.module)
        self._stops = Stops(tokenizer, sampling.stop, eos_ids)
        self._cache: KVCache | None = None
        groups = min(self.place.pp.size, slots)
        self._slots = Slots(slots, groups)
        self._decoder = with_graphs(make_decoder(model), self._slots.groups, self.device)
        self._flights: list[Flight | None] = [None] * groups
        self._turn = 0
        self._line = Line(self.place.pp, config.hidden_size, self._dtype, self.device)
        tp = self.place.tp
        self._cut = Cut.over(tp, model.partition.vocabulary(tp.index)[0]) if tp.size > 1 else None

    @property
    def busy(self) -> bool:
        """Whether samples are queued or running, or tokens are on their way."""
        return bool(self._slots.queue or self._slots.running or any(self._flights))

    @property
    def speaks(self) -> bool:
        """Whether this rank speaks for its replica: tensor rank 0 of the last stage."""
        return self.place.is_last and self.place.tp.index == 0

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
        """Admit what fits and draw one token for each running sample (of the group whose turn it is);
        returns the samples that are known to have ended."""
        if not self.busy:
            return []
        started = time.perf_counter()
        group = self._next_turn()
        with torch.inference_mode():
            finished = self._collect(group)
            if self._cache is None:
                self._cache = KVCache(self._shape, self._dtype, self.device)
            admitted, prefixes = self._slots.admit(self._cache, self.prefill_tokens, group)
            self._seed(admitted)
            self._slots.close_gaps(self._cache, group)
            running = self._slots.running_in(group)
            if running:
                self._flights[group] = self._launch(group, running, prefixes)
                if self.place.pp.size == 1:  # the tokens are here
                    finished += self._collect(group)
        self._count(group, len(running), sum(len(prefix.tokens) for prefix in prefixes), started)
        return finished

    def _next_turn(self) -> int:
        """The next group that has something to do."""
        count = len(self._flights)
        while True:
            group, self._turn = self._turn, (self._turn + 1) % count
            if self._slots.queue or self._flights[group] or self._slots.running_in(group):
                return group

    def _launch(self, group: int, running: Sequence[Sample], prefixes: Sequence[Prefix]) -> Flight:
        """This rank's part of one pass."""
        assert self._cache is not None
        first = self._slots.groups[group][0]
        step = Pass(
            self._cache,
            self._heads,
            first,
            [s.newest for s in running],
            [s.length for s in running],
            prefixes,
        )
        drawn = torch.zeros(len(running), 2, dtype=torch.float64, device=self.device)
        flight = Flight(running, first, self.version, drawn, [])
        found = self._decoder(step, self._line.receive(len(step.tokens)))
        if self.place.is_last:
            numbers = torch.tensor([s.uniforms[len(s.response)] for s in running], dtype=torch.float64)
            if self._cut is None:
                tokens, logprobs = draw(found, numbers, self.sampling)
            else:
                tokens, logprobs = draw_cut(found, numbers, self.sampling, self._cut)
            drawn[:, 0], drawn[:, 1] = tokens, logprobs
            self._line.announce(flight)
        else:
            self._line.send(found, flight)
            self._line.expect(flight)
        return flight

    def _collect(self, group: int) -> list[Finished]:
        """Take what a group's last pass has drawn; free the slots of samples that end with it."""
        flight, self._flights[group] = self._flights[group], None
        finished: list[Finished] = []
        if flight is None:
            return finished
        for slot, (sample, token, logprob) in enumerate(
            zip(flight.samples, *flight.land(), strict=True), flight.first
        ):
            if self._slots.slots[slot] is not sample:  # aborted in the meantime
                continue
            self.stats.tokens += 1
            reason = self._append(sample, token, logprob, flight.version)
            if reason:
                self._slots.slots[slot] = None
                finished.append(sample.finished(reason, self._stops, self._logprob_dtype))
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
        ids = torch.tensor([[sample.draw_id] for sample in admitted])
        first = torch.tensor([[len(sample.prompt.tokens)] for sample in admitted])
        for sample, row in zip(admitted, uniform(self.seed, ids, 0, first + torch.arange(most)), strict=True):
            sample.uniforms = row[: sample.limit].tolist()

    def _append(self, sample: Sample, token: int, logprob: float, version: int) -> FinishReason | None:
        """Add a new token; whether, and why, the sample ends with it."""
        sample.response.append(token)
        sample.logprobs.append(logprob)
        sample.versions.append(version)
        if self._stops.ends(sample.response):
            return "stop"
        return "length" if len(sample.response) == sample.limit else None

    def _count(self, group: int, running: int, prefilled: int, started: float) -> None:
        stats, slots = self.stats, len(self._slots.groups[group])
        stats.steps += 1
        stats.slot_steps += slots
        stats.busy_slot_steps += running
        if self._slots.queue:
            stats.queued_slot_steps += slots
            stats.queued_busy_slot_steps += running
        stats.prefill_tokens += prefilled
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
