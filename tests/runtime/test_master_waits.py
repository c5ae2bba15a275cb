"""The master costs nothing while it waits for its workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from scenes import grpo, place

from realflow.runtime import master
from realflow.runtime.master import Master


def test_it_sleeps_while_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what it will tell them (the schedule of a move) is ready long before: the cores are theirs."""
    monkeypatch.setattr(master, "STARTUP_SECONDS", 1.5)
    told: list[str] = []
    files = SimpleNamespace(failed=told.append)
    waiting = Master(place(grpo(), 2, {"rollout": (0,), "train": (1,)}), files, emit=lambda event: None)  # type: ignore[arg-type]
    waiting.listen()
    assert waiting._slices._pending, "no schedule is made: the test shows nothing"
    polls: list[int] = []
    poll = waiting._poller.poll
    monkeypatch.setattr(waiting._poller, "poll", lambda milliseconds: polls.append(0) or poll(milliseconds))
    assert waiting.run() == 1
    assert "ranks [0, 1] did not come" in told[0]
    assert 2 <= len(polls) <= 2 + 1.5 / master.TICK_SECONDS
