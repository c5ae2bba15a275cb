"""What a train call minimises: a loss for each token, and what each token counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from realflow.algorithms.terms import LossTerms
from realflow.data.batch import Batch, to_tokens
from realflow.engines.infer import scored_tokens
from realflow.errors import InputError
from realflow.graph.types import Extent, Normalise

Loss = Callable[..., LossTerms]

OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "lm": ("logprobs", "entropy"),
    "value": ("values",),
    "reward": ("scores",),
}
"""Head of a model -> outputs that a loss may ask for, each [T].

`logprobs` and `entropy` at i are of the choice of `tokens[i]` and 0 where the loss does not count;
`values` at i is the number of the state after `tokens[:i + 1]`, at every token; `scores` is the number
at the last token of a sample, at every one of its tokens.
"""


@dataclass(frozen=True)
class Objective:
    """`loss` is called with each field of `reads` (parameter -> field), those of `OUTPUTS`, `mask` (bool
    [T], the loss tokens) and `lengths` (int64 [S]) that its signature names, and `options`.

    Numeric sample fields are repeated over tokens unless `extents` says that the parameter is read
    for each sample. `normalise` is `token` (mean over all loss tokens of the minibatch), `sequence`
    (mean over sequences of token means) or `{"constant": n}` (mean over sequences of token sums, over
    n); sequences without loss tokens are left out. `temperature` is that of log probabilities.
    """

    loss: Loss
    reads: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    normalise: Normalise = "token"
    extents: Mapping[str, Extent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        constant = isinstance(self.normalise, Mapping) and self.normalise.get("constant", 0) > 0
        if not constant and self.normalise not in ("token", "sequence"):
            raise InputError(
                f"normalise {self.normalise!r}: expected token, sequence or {{constant: a number above 0}}"
            )

    def evaluate(
        self, part: Part, outputs: Mapping[str, torch.Tensor], tokens: int, sequences: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A micro-batch's share of the minibatch's loss, and sums over its loss tokens by metric. Over the
        minibatch's number of tokens they are means: of tokens, of `sequence` means where that normalises.

        `tokens` and `sequences` are the minibatch's counts on all ranks. Raises InputError where the
        loss returns something else than a value for each token.
        """
        batch, device = part.batch, next(iter(outputs.values())).device
        terms = self.loss(**self._arguments(part, outputs, device), **self.options)
        _check(terms, int(batch.lengths.sum()), outputs)
        places = part.places.to(device)
        per_token = terms.per_token.index_select(0, places)  # elsewhere it may be anything, NaN too
        weights = self._weights(part, tokens, sequences).to(device)
        total = (per_token * weights.to(per_token.dtype)).sum()
        shown = {"entropy": outputs["entropy"]} if "entropy" in outputs else {}
        sums = {"loss": total.detach().double()}
        for name, values in {**shown, **terms.metrics}.items():
            told = values.detach().index_select(0, places).double()
            sums[name] = (told * weights * tokens if self.normalise == "sequence" else told).sum()
        return total, sums

    def _weights(self, part: Part, tokens: int, sequences: int) -> torch.Tensor:
        """float64 [R]: what each loss token counts; over the minibatch they sum to 1, unless a constant
        says how many tokens a sequence counts for."""
        if self.normalise == "token":
            return torch.full((len(part.places),), 1 / tokens, dtype=torch.float64)
        if isinstance(self.normalise, Mapping):
            each = 1 / (self.normalise["constant"] * sequences)
            return torch.full((len(part.places),), each, dtype=torch.float64)
        counts = to_tokens(part.per_sample, part.batch.lengths)[part.places]
        return 1 / (counts.double() * sequences)

    def _arguments(
        self, part: Part, outputs: Mapping[str, torch.Tensor], device: torch.device
    ) -> dict[str, Any]:
        """What the loss is called with. Floating fields get the dtype of the outputs."""
        batch = part.batch
        total, samples = int(batch.lengths.sum()), len(batch.ids)
        wide = next(iter(outputs.values())).dtype
        arguments: dict[str, Any] = {}
        for parameter, name in self.reads.items():
            value = batch.fields[name]
            if isinstance(value, torch.Tensor):
                finest = self.extents.get(parameter, "token") == "token"
                if finest and len(value) == samples and total != samples:
                    value = to_tokens(value, batch.lengths)
                value = value.to(device, wide if value.is_floating_point() else value.dtype)
            arguments[parameter] = value
        wanted = inspect.signature(self.loss).parameters
        known = {**outputs, "mask": part.mask.to(device), "lengths": batch.lengths.to(device)}
        arguments.update({k: v for k, v in known.items() if k in wanted and k not in self.reads})
        return arguments


@dataclass(frozen=True)
class Part:
    """A micro-batch; `places` (int64 [R], rising) are its loss tokens."""

    batch: Batch
    places: torch.Tensor

    @classmethod
    def of(cls, batch: Batch) -> Part:
        """With the loss tokens that its `loss_mask` says."""
        return cls(batch, scored_tokens(batch))

    @property
    def mask(self) -> torch.Tensor:
        """bool [T]: the loss tokens."""
        found = torch.zeros(int(self.batch.lengths.sum()), dtype=torch.bool)
        found[self.places] = True
        return found

    @property
    def per_sample(self) -> torch.Tensor:
        """int64 [S]: how many loss tokens each sample has."""
        sample = torch.bucketize(self.places, self.batch.cu_seqlens[1:].long(), right=True)
        return torch.bincount(sample, minlength=len(self.batch.ids))


def counts_of(parts: Sequence[Part]) -> tuple[int, int]:
    """Loss tokens, and sequences that have any."""
    return sum(len(part.places) for part in parts), sum(int((part.per_sample > 0).sum()) for part in parts)


def _check(terms: LossTerms, total: int, outputs: Mapping[str, torch.Tensor]) -> None:
    for name, values in {"per_token": terms.per_token, **terms.metrics}.items():
        if tuple(values.shape) != (total,):
            raise InputError(
                f"loss: {name} has shape {list(values.shape)}, expected [{total}], a value for each token"
            )
    if not terms.per_token.requires_grad:
        raise InputError(
            f"loss: per_token does not depend on the model's outputs ({', '.join(sorted(outputs))})"
        )
