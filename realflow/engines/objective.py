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
from realflow.graph.types import Extent

Loss = Callable[..., LossTerms]

OUTPUTS: Mapping[str, tuple[str, ...]] = {"lm": ("logprobs", "entropy"), "value": ("values",)}
"""Head of a model -> outputs that a loss may ask for, each [T].

`logprobs` and `entropy` at i are of the choice of `tokens[i]` and 0 where the loss does not count;
`values` at i is the number of the state after `tokens[:i + 1]`, at every token.
"""


@dataclass(frozen=True)
class Objective:
    """`loss` is called with each field of `reads` (parameter -> field), those of `OUTPUTS` and
    `lengths` that its signature names, and `options`.

    Numeric sample fields are repeated over tokens unless `extents` says that the parameter is read
    for each sample. `normalise` is `token` (mean over all loss tokens of the minibatch) or `sequence`
    (mean over sequences of token means). `temperature` is that of log probabilities.
    """

    loss: Loss
    reads: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    normalise: str = "token"
    extents: Mapping[str, Extent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.normalise not in ("token", "sequence"):
            raise InputError(f"normalise {self.normalise!r}: expected token or sequence")

    def evaluate(
        self, part: Part, outputs: Mapping[str, torch.Tensor], tokens: int, sequences: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A micro-batch's share of the minibatch's loss, and sums over its loss tokens by metric.

        `tokens` and `sequences` are the minibatch's counts on all ranks. Raises InputError where the
        loss returns something else than a value for each token.
        """
        batch, device = part.batch, next(iter(outputs.values())).device
        terms = self.loss(**self._arguments(batch, outputs, device), **self.options)
        _check(terms, int(batch.lengths.sum()), outputs)
        places = part.places.to(device)
        per_token = terms.per_token.index_select(0, places)  # elsewhere it may be anything, NaN too
        weights = self._weights(part, tokens, sequences).to(device, per_token.dtype)
        total = (per_token * weights).sum()
        sums = {"loss": total.detach().double()}
        if "entropy" in outputs:
            sums["entropy"] = outputs["entropy"].detach().index_select(0, places).double().sum()
        for name, values in terms.metrics.items():
            sums[name] = values.detach().index_select(0, places).double().sum()
        return total, sums

    def _weights(self, part: Part, tokens: int, sequences: int) -> torch.Tensor:
        """float64 [R]: what each loss token counts; they sum to 1 over the minibatch."""
        if self.normalise == "token":
            return torch.full((len(part.places),), 1 / tokens, dtype=torch.float64)
        counts = to_tokens(part.per_sample, part.batch.lengths)[part.places]
        return 1 / (counts.double() * sequences)

    def _arguments(
        self, batch: Batch, outputs: Mapping[str, torch.Tensor], device: torch.device
    ) -> dict[str, Any]:
        """What the loss is called with. Floating fields get the dtype of the outputs."""
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
        known = {**outputs, "lengths": batch.lengths.to(device)}
        arguments.update({name: value for name, value in known.items() if name in wanted})
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
