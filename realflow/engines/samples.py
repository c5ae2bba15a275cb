"""Prompts, samples on their way, and finished samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from realflow.engines.stops import Stops

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One prompt and the samples that are wanted of it.

    `max_new_tokens` has one entry for each sample where it differs from the sampling's. Sample k is drawn
    with the random numbers of the id `draw_id + k`, or of its own id where there is no `draw_id`.
    """

    group_id: int
    sample_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    max_new_tokens: tuple[int, ...] | None = None
    draw_id: int | None = None


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


class Sample:
    """A sample on its way: queued, then in a slot."""

    def __init__(self, prompt: Prompt, index: int, limit: int) -> None:
        self.prompt = prompt
        self.id = prompt.sample_ids[index]
        self.draw_id = self.id if prompt.draw_id is None else prompt.draw_id + index
        self.limit = limit
        self.response: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.uniforms: list[float] = []

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt.tokens) + len(self.response)

    @property
    def newest(self) -> int:
        """The last token."""
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
