"""A generate dispatch on one rank: what is fed, kept and reported, and by whom."""

from __future__ import annotations

from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from realflow.engines.samples import Finished
from realflow.models.place import Axis
from realflow.runtime import streams
from realflow.runtime.messages import DispatchDone, Drain, Feed, Open, SampleReady


class Engine:
    """Each prompt's samples end one step after they were fed."""

    device = torch.device("cpu")

    def __init__(self, *, speaks: bool) -> None:
        self.speaks = speaks
        self.place = SimpleNamespace(replica=Axis((0,), 0, None))
        self.version = -1
        self.waiting: list[int] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def set_version(self, version: int) -> None:
        self.version = version

    def feed(self, prompts: list[Any]) -> None:
        self.waiting += [sample for prompt in prompts for sample in prompt.sample_ids]

    def step(self) -> list[Finished]:
        ended, self.waiting = self.waiting, []
        tokens = torch.arange(4)
        mask = tokens > 1
        return [Finished(i, i // 2, tokens, tokens.float(), mask, tokens, "stop", "") for i in ended]


@pytest.mark.parametrize("speaks", [True, False])
def test_only_the_speaking_rank_keeps_and_reports_samples(monkeypatch, speaks) -> None:
    call = SimpleNamespace(
        name="rollout", model="actor", reads={"prompt": "q"}, writes={"tokens": "t"}, chat=False
    )
    data = SimpleNamespace(prompt_tokens=10, max_length=None, system="be brief", over=None)
    graph = SimpleNamespace(call=lambda name: call, samples=2, data=data)
    engine, sent, kept = Engine(speaks=speaks), [], {}
    queue: SimpleQueue[Any] = SimpleQueue()
    for message in (Feed("rollout@0", [3]), Feed("rollout@0", [5, 6]), Drain("rollout@0")):
        queue.put(message)
    monkeypatch.setattr(streams, "main_rollout", lambda graph: call)
    monkeypatch.setattr(streams, "encode_prompt", lambda tokenizer, text, chat, system: [1, 2])
    counts = SimpleNamespace(of_prompts=lambda call, cut: {"data/fed": [float(len(cut)), 1.0, 0.0, 0.0]})
    runner = streams.Streams(
        SimpleNamespace(graph=graph),
        1,
        SimpleNamespace(generator=lambda call: engine, tokenizer=lambda model: None),
        SimpleNamespace(put=lambda field, values: kept.setdefault(field, {}).update(values)),
        SimpleNamespace(row=lambda group: {"q": "text"}, lengths=counts),
        SimpleNamespace(stream=lambda name: queue, send=sent.append, close_stream=lambda name: None),
    )
    runner.run(Open(1, "rollout@0", "rollout", 0, 4, 8))
    assert engine.version == 4
    assert isinstance(sent[-1], DispatchDone)
    ready = [message for message in sent if isinstance(message, SampleReady)]
    if speaks:
        assert sorted(i for message in ready for i in message.ids) == [6, 7, 10, 11, 12, 13]
        assert sorted(kept["t"]) == [6, 7, 10, 11, 12, 13]
        assert sent[-1].stats["response_length"] == [12.0, 6.0, 2.0, 2.0]
        assert sent[-1].stats["data/fed"][0] == 3
    else:
        assert not ready
        assert not kept
        assert sent[-1].stats == {}
