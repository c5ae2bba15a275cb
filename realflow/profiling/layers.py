"""Forward and backward of layers, embedding and head, as the inference and training engines run them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from realflow.engines.gradients import Gradients
from realflow.engines.infer import prepare, scored_tokens, scores
from realflow.engines.shards import arrange
from realflow.models.causal import CausalModel
from realflow.models.heads import values
from realflow.models.logprobs import token_logprobs
from realflow.profiling.bench import Bench, Job, Timed, clock
from realflow.profiling.models import Models, random_batch, trained_layers
from realflow.profiling.request import SMALL_VOCABULARY, Grids, Setting, Subject


def layer_jobs(
    subject: Subject, setting: Setting, bench: Bench, models: Models, grids: Grids
) -> Iterator[Job]:
    """Seconds of one layer by tokens and tokens of a sequence: `infer`, `forward`, `backward`."""
    key = {"model": subject.name}
    for tokens, length in grids.layers:

        def make(tokens: int = tokens, length: int = length) -> Timed:
            layers = trained_layers(subject, tokens)
            model = models.get(subject, layers, SMALL_VOCABULARY, bench.place(setting))
            return _layers(model, layers, tokens, length)

        yield Job("layer", key, ("tokens", "length"), (tokens, length), setting, make)


def _layers(model: CausalModel, layers: int, tokens: int, length: int) -> Timed:
    packed = prepare(model, random_batch(model, tokens, length))
    gradients = buffer(model)
    device = model.device

    def work() -> dict[str, float]:
        with torch.no_grad():
            began = clock(device)
            model.run(packed)
            inferred = clock(device)
        gradients.begin(lambda data: None)
        again = clock(device)
        states = model.run(packed)
        forward = clock(device)
        torch.autograd.backward(states, torch.ones_like(states))
        backward = clock(device)
        found = {"infer": inferred - began, "forward": forward - again, "backward": backward - forward}
        return {name: seconds / layers for name, seconds in found.items()}

    return work


def buffer(model: CausalModel) -> Gradients:
    """The gradients of a model, in the float32 buffer of a training engine."""
    release(model)
    parameters = dict(model.module.named_parameters())
    return Gradients(parameters, arrange(model.flat.slots, 1), torch.float32)


def release(model: CausalModel) -> None:
    """Let go of buffers and engines that have gathered the gradients of a model."""
    for parameter in model.module.parameters():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooks:
            hooks.clear()


def end_jobs(subject: Subject, setting: Setting, bench: Bench, models: Models, grids: Grids) -> Iterator[Job]:
    """Seconds of a pass outside its layers: `embedding` by tokens, `head` (of a last stage), `ends` (of a
    pipeline of one stage) and `values` (of a last stage with a value head) by rows that are scored."""
    key = {"model": subject.name}
    parts = [("embedding", grids.tokens), ("ends", grids.rows), ("values", grids.tokens)]
    if bench.ranks > 1:  # stages apart
        parts.append(("head", grids.rows))
    for what, grid in parts:
        for rows in grid:

            def make(what: str = what, rows: int = rows) -> Timed:
                kind = "value" if what == "values" else "lm"
                model = models.get(subject, 1, None, bench.place(setting), kind)
                return _ends(model, rows, what)

            yield Job(what, key, ("rows",), (rows,), setting, make)


def _ends(model: CausalModel, rows: int, what: str) -> Timed:
    batch = random_batch(model, rows + 1, rows + 1)
    tokens, places = batch.fields["tokens"].to(model.device), scored_tokens(batch)
    table = model.module.get_input_embeddings()
    made = torch.randn(rows + 1, int(model.config.get_text_config().hidden_size), device=model.device)
    made = made.to(model.dtype)
    gradients = buffer(model)
    device = model.device

    def entering(differentiable: bool) -> torch.Tensor:
        if what in ("head", "values"):
            return made.clone().requires_grad_(differentiable)
        with model.region.passing(rows + 1, sequence=False):
            states: torch.Tensor = table(tokens[None])[0]
            return states

    def work() -> dict[str, float]:
        with torch.no_grad():
            began = clock(device)
            states = entering(False)
            if what == "values":
                values(model, states)
            elif what != "embedding":
                found = states.index_select(0, places.to(device) - 1)
                targets = tokens[places.to(device)]
                token_logprobs(found, model.head.weight, targets, vocabulary=model.vocabulary)
            inferred = clock(device)
        gradients.begin(lambda data: None)
        again = clock(device)
        states = entering(True)
        if what == "embedding":
            result, gradient = states, torch.ones_like(states)
        elif what == "values":
            result, gradient = values(model, states).sum(), None
        else:
            result, gradient = scores(model, states, batch, places, 1.0).logprobs.sum() / rows, None
        forward = clock(device)
        torch.autograd.backward(result, gradient)
        backward = clock(device)
        return {"infer": inferred - began, "forward": forward - again, "backward": backward - forward}

    return work
