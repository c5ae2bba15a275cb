"""What a model says of given tokens: log probabilities, values or rewards of packed micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch

from realflow.data.batch import Batch
from realflow.engines.links import Links
from realflow.errors import InputError
from realflow.models.causal import CausalModel, Packed
from realflow.models.heads import values
from realflow.models.logprobs import TokenStats, token_logprobs, token_stats

OUTPUTS = {"lm": ("logprobs",), "value": ("values",), "reward": ("rewards", "values")}
"""Head of a model -> what can be inferred with it."""


def scored_tokens(batch: Batch) -> torch.Tensor:
    """int64 [R]: places in the packed batch of the tokens to score, rising.

    Those where `loss_mask` is true, all without that field; never the first token of a sample,
    which nothing predicts.
    """
    scored = batch.positions > 0
    if "loss_mask" in batch.fields:
        scored &= batch.fields["loss_mask"].to(torch.bool).cpu()
    return scored.nonzero().flatten()


def check_temperature(temperature: float) -> None:
    """Raise InputError for one that log probabilities cannot have."""
    if temperature <= 0:
        raise InputError(f"temperature {temperature}: log probabilities need one above 0 (greedy has none)")


def prepare(model: CausalModel, batch: Batch) -> Packed:
    """What every stage needs to know of a micro-batch."""
    return model.prepare(batch.fields["tokens"], batch.positions, batch.cu_seqlens)


def links(model: CausalModel, schedule: str, packed: Iterable[Packed]) -> Links:
    """The ways to the neighbouring stages for one run over micro-batches."""
    like = torch.empty(0, model.config.hidden_size, dtype=model.dtype, device=model.device)
    return Links(model.place, schedule, [model.boundary_rows(part) for part in packed], like)


def scores(
    model: CausalModel, states: torch.Tensor, batch: Batch, places: torch.Tensor, temperature: float
) -> TokenStats:
    """Log probabilities and entropies ([R]) of the tokens at `places`, on the model's device, from
    the final states [T, H]. The head is computed for these rows only. Differentiable.
    """
    rows, targets = _predictions(model, states, batch, places, temperature)
    return token_stats(rows, model.head.weight, targets, temperature=temperature, vocabulary=model.vocabulary)


@torch.no_grad()
def infer(
    model: CausalModel, micro_batches: Sequence[Batch], output: str = "logprobs", temperature: float = 1.0
) -> list[torch.Tensor]:
    """What `output` asks for, one tensor a sample in the order of the micro-batches' samples, on the
    CPU in float32 (float64 for float64 models).

    - `logprobs` [L]: entry i is log p(tokens[i] | tokens[:i]) where `loss_mask` is true (everywhere
      without that field), else 0; entry 0 is 0.
    - `values` [L]: entry i is the number of a value or reward head for the state after
      `tokens[:i + 1]`, at every token.
    - `rewards` []: the number of a reward head at the last token.

    All ranks of a replica call it with the same micro-batches, which follow one another through the
    stages. The ranks of the last stage return the results, the others an empty list. Raises
    InputError where the model's head has no such output.
    """
    kinds = OUTPUTS[model.head_kind]
    if output not in kinds:
        raise InputError(
            f"infer: a model with head {model.head_kind!r} gives {' or '.join(kinds)}, not {output!r}"
        )
    if output == "logprobs":
        check_temperature(temperature)
    packed = deque(prepare(model, batch) for batch in micro_batches)
    ways = links(model, "forward", packed)
    results: list[torch.Tensor] = []
    for index, batch in enumerate(micro_batches):
        states = model.run(packed.popleft(), ways.states(index))
        if model.place.is_last:
            results.extend(_outputs(model, states, batch, output, temperature))
        else:
            ways.send_states(index, states)
    ways.finish()
    return results


def _outputs(
    model: CausalModel, states: torch.Tensor, batch: Batch, output: str, temperature: float
) -> Iterator[torch.Tensor]:
    """The results of one micro-batch's samples."""
    if output == "logprobs":
        places = scored_tokens(batch)
        rows, targets = _predictions(model, states, batch, places, temperature)
        found = token_logprobs(
            rows, model.head.weight, targets, temperature=temperature, vocabulary=model.vocabulary
        ).cpu()
        every = found.new_zeros(int(batch.lengths.sum()))
        every[places] = found
        yield from every.split(batch.lengths.tolist())
    elif output == "values":
        yield from values(model, states).cpu().split(batch.lengths.tolist())
    else:
        ends = batch.cu_seqlens[1:].long() - 1
        yield from values(model, states.index_select(0, ends.to(states.device))).cpu()


def _predictions(
    model: CausalModel, states: torch.Tensor, batch: Batch, places: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states [R, H] that predict the tokens at `places`, and these tokens [R]."""
    places = places.to(model.device)
    tokens = batch.fields["tokens"].to(model.device)
    return states.index_select(0, places - 1), tokens[places]
