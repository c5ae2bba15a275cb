"""Prompts and completions in tokens of the reward model that reads them, where a call says `retokenize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from realflow.data.balance import micro_batches
from realflow.data.batch import Batch, pack
from realflow.data.lengths import counted
from realflow.data.text import encode_pair
from realflow.errors import InputError, Problem
from realflow.graph.types import Call
from realflow.runtime.stats import Stats

ENDED = "stop"
"""The finish reason of an answer that its policy ended itself."""

Columns = Mapping[str, Sequence[Any]]
"""`prompt`, `completion` and, where these come from a rollout, `finish_reason`: a value for each sample."""


class Texts:
    """Texts as the model of a call reads them."""

    def __init__(self, call: Call, tokenizer: Any, system: str | None, positions: int) -> None:
        """`tokenizer` is that of the call's model, `positions` what the model can read at most, `system` the
        message before each prompt."""
        assert call.retokenize is not None
        self._name, self._spec = call.name, call.retokenize
        self._tokenizer, self._system = tokenizer, system
        self._limit = min(positions, self._spec.max_length or positions)

    def batches(self, columns: Columns, ids: Sequence[int], budget: int) -> tuple[list[Batch], Stats]:
        """Packed micro-batches of at most `budget` tokens (a longer sample has its own), with the field
        `tokens` (int64), and metrics: how long samples are, and how many were cut.

        Raises InputError for a sample that is too long where nothing is to be cut, and for what
        `realflow.data.text.encode_pair` refuses.
        """
        if not ids:
            return [], {}
        ends = columns.get("finish_reason", [ENDED] * len(ids))
        rows = zip(ids, columns["prompt"], columns["completion"], ends, strict=True)
        found = [self._tokens(*row) for row in rows]
        lengths = [len(tokens) for tokens, _ in found]
        batches = [
            pack(
                [ids[i] for i in part],
                [lengths[i] for i in part],
                {"tokens": [torch.tensor(found[i][0], dtype=torch.int64) for i in part]},
                {"tokens": "token"},
                {"tokens": "int"},
            )
            for part in micro_batches(lengths, budget)
        ]
        spread = [sum(lengths), len(lengths), min(lengths), max(lengths)]
        stats = {
            f"{self._name}/tokens": [float(number) for number in spread],
            f"{self._name}/truncated": counted([cut for _, cut in found]),
        }
        return batches, stats

    def _tokens(self, sample: int, prompt: Any, completion: Any, end: str) -> tuple[list[int], bool]:
        """Tokens of a sample within the limit, and whether it was cut. An answer that its policy did not end
        has no end-of-sequence token here either."""
        tokens, mask = encode_pair(self._tokenizer, prompt, completion, self._spec.chat, system=self._system)
        if end != ENDED:
            tokens, mask = tokens[:-1], mask[:-1]
        if len(tokens) <= self._limit:
            return tokens, False
        if self._spec.over == "truncate" and any(mask[: self._limit]):
            return tokens[: self._limit], True
        raise InputError(Problem(self._too_long(sample, len(tokens)), where=f"calls.{self._name}.retokenize"))

    def _too_long(self, sample: int, found: int) -> str:
        set_by_hand = self._limit == self._spec.max_length
        limit = f"{self._limit}" if set_by_hand else f"{self._limit} (the positions of the model)"
        what = f"sample {sample} has {found} tokens, more than {limit}"
        if self._spec.over == "truncate":
            return f"{what}, and its prompt alone fills these; allow more, or leave such rows out of the data"
        advice = f"set max_length to at least {found}, or " if set_by_hand else ""
        return f"{what}; {advice}say 'over: truncate' to have its end cut off"
