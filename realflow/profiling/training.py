"""The optimizer, and what a training engine does for a minibatch beside its passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from realflow.algorithms.losses import sft
from realflow.data.batch import Batch
from realflow.engines.infer import prepare, scored_tokens, scores
from realflow.engines.train import TrainEngine
from realflow.graph.types import OptimizerSpec
from realflow.models.causal import CausalModel
from realflow.profiling.bench import Bench, Job, Timed, clock
from realflow.profiling.layers import buffer, release
from realflow.profiling.models import Models, random_batch, streamed_layers, trained_layers
from realflow.profiling.request import SMALL_VOCABULARY, Setting, Subject, powers

_ROWS, _MANY = 64, 5
"""Tokens of a micro-batch, and how many micro-batches."""


def update_jobs(subject: Subject, setting: Setting, bench: Bench, models: Models) -> Iterator[Job]:
    """Seconds of `TrainEngine.update` by the parameters of a rank's part, for numbers of data ranks."""
    sizes = {
        (trained_layers(subject), SMALL_VOCABULARY),
        (streamed_layers(subject), SMALL_VOCABULARY),
        (1, None),
    }
    for data in (number for number in powers(setting.busy) if number in (1, setting.busy)):
        for layers, vocab in sorted(sizes, key=str):
            elements = _elements(models, subject, layers, vocab)

            def make(layers: int = layers, vocab: int | None = vocab, data: int = data) -> Timed:
                place = bench.place(Setting(setting.threads, setting.busy), data)
                return _updates(models.get(subject, layers, vocab, place))

            key: dict[str, str | int] = {"dtype": subject.dtype, "data": data}
            yield Job("update", key, ("elements",), (elements,), setting, make)


def _elements(models: Models, subject: Subject, layers: int, vocab: int | None) -> int:
    from realflow.models.card import build

    return build(models.path(subject, layers, vocab)).size


def _updates(model: CausalModel) -> Timed:
    release(model)
    engine = TrainEngine(model, OptimizerSpec(lr=1e-6))
    device = model.device

    def work() -> dict[str, float]:
        began = clock(device)
        engine.update()
        return {"": clock(device) - began}

    return work


def step_jobs(subject: Subject, setting: Setting, bench: Bench, models: Models) -> Iterator[Job]:
    """Seconds of a minibatch beside its passes and its update: `micro_batch` for each of those, `minibatch`
    for the whole."""

    def make() -> Timed:
        model = models.get(subject, 1, SMALL_VOCABULARY, bench.place(setting))
        return _minibatches(model)

    yield Job("train_step", {"dtype": subject.dtype}, ("rows",), (_ROWS,), setting, make)


def _minibatches(model: CausalModel) -> Timed:
    batch = random_batch(model, _ROWS, _ROWS)
    device = model.device
    alone = buffer(model)

    def passes() -> None:
        alone.begin(lambda data: None)
        states = model.run(prepare(model, batch))
        places = scored_tokens(batch)
        (scores(model, states, batch, places, 1.0).logprobs.sum() / _ROWS).backward()

    def step(engine: TrainEngine, batches: list[Batch]) -> float:
        began = clock(device)
        engine.backward(batches, objective())
        return clock(device) - began

    def work() -> dict[str, float]:
        nonlocal alone
        alone = buffer(model)
        passes()
        began = clock(device)
        passes()
        bare = clock(device) - began
        release(model)
        engine = TrainEngine(model, OptimizerSpec(lr=1e-6))
        step(engine, [batch])
        one, many = step(engine, [batch]), step(engine, [batch] * _MANY)
        engine.close()
        each = (many - one) / (_MANY - 1)
        return {"micro_batch": max(0.0, each - bare), "minibatch": max(0.0, one - each)}

    return work


def objective() -> Any:
    """Supervised fine-tuning: the cheapest loss."""
    from realflow.engines.objective import Objective

    return Objective(sft)
