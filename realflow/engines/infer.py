"""What a model says of given tokens: log probabilities of packed micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from realflow.data.batch import Batch
from realflow.errors import InputError
from realflow.models.causal import CausalModel
from realflow.models.logprobs import TokenStats, token_logprobs, token_stats


def scored_tokens(batch: Batch) -> torch.Tensor:
    """int64 [R]: places in the packed batch of the tokens to score, rising.

    Those where `loss_mask` is true, all without that field; never the first token of a sample,
    which nothing predicts.
    """
    scored = batch.positions > 0
    if "loss_mask" in batch.fields:
        scored &= batch.fields["loss_mask"].to(torch.bool).cpu()
    return scored.nonzero().flatten()


def score(model: CausalModel, batch: Batch, places: torch.Tensor, temperature: float) -> TokenStats:
    """Log probabilities and entropies ([R]) of the tokens at `places`, on the model's device.

    The head is computed for these rows only. Differentiable where gradients are enabled.
    """
    rows, targets = _predictions(model, batch, places, temperature)
    return token_stats(rows, model.head.weight, targets, temperature=temperature)


def _predictions(
    model: CausalModel, batch: Batch, places: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states [R, H] that predict the tokens at `places`, and these tokens [R]."""
    if temperature <= 0:
        raise InputError(f"temperature {temperature}: log probabilities need one above 0 (greedy has none)")
    tokens = batch.fields["tokens"].to(model.device)
    hidden = model.hidden(tokens, batch.positions, batch.cu_seqlens)
    places = places.to(model.device)
    return hidden.index_select(0, places - 1), tokens[places]


@torch.no_grad()
def infer_logprobs(
    model: CausalModel, micro_batches: Sequence[Batch], temperature: float = 1.0
) -> list[torch.Tensor]:
    """One tensor a sample, in the order of the micro-batches' samples: [L] on the CPU, float32
    (float64 for float64 models).

    Entry i is log p(tokens[i] | tokens[:i]) where `loss_mask` is true (everywhere without that
    field), else 0; entry 0 is 0.
    """
    results: list[torch.Tensor] = []
    for batch in micro_batches:
        places = scored_tokens(batch)
        rows, targets = _predictions(model, batch, places, temperature)
        found = token_logprobs(rows, model.head.weight, targets, temperature=temperature).cpu()
        packed = found.new_zeros(int(batch.lengths.sum()))
        packed[places] = found
        results.extend(packed.split(batch.lengths.tolist()))
    return results
