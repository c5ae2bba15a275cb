"""Messages between stages: how many are under way, counted without processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.engines import links
from realflow.engines.links import AHEAD, UNSENT, Links
from realflow.engines.pipeline import SCHEDULES, orders
from realflow.models.place import Axis


class Counted:
    """In place of `torch.distributed`: counts, for each neighbour, what is posted and not waited for."""

    def __init__(self) -> None:
        self.posted: dict[tuple[str, int], int] = {}
        self.most: dict[str, int] = {"isend": 0, "irecv": 0}

    def _post(self, kind: str, peer: int) -> SimpleNamespace:
        here = kind, peer
        self.posted[here] = self.posted.get(here, 0) + 1
        self.most[kind] = max(self.most[kind], self.posted[here])
        return SimpleNamespace(wait=lambda: self.posted.update({here: self.posted[here] - 1}))

    def isend(self, tensor: torch.Tensor, group: object, group_dst: int) -> SimpleNamespace:
        return self._post("isend", group_dst)

    def irecv(self, tensor: torch.Tensor, group: object, group_src: int) -> SimpleNamespace:
        return self._post("irecv", group_src)


def counted(schedule: str, stages: int, stage: int, count: int) -> Counted:
    """One stage's part of a schedule."""
    found = Counted()
    axis = Axis(tuple(range(stages)), stage, None)
    place = SimpleNamespace(pp=axis, is_first=stage == 0, is_last=stage == stages - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "dist", found)
        ways = Links(place, schedule, [3] * count, torch.empty(0, 2))  # type: ignore[arg-type]
        for kind, index in orders(schedule, stages, stage, count):
            if kind == "F":
                ways.states(index)
                if not place.is_last:
                    ways.send_states(index, torch.zeros(3, 2))
            if kind == "B":
                if not place.is_last:
                    ways.gradient(index)
                ways.send_gradient(index, torch.zeros(3, 2))
        ways.finish()
    assert not any(found.posted.values())
    return found


@settings(deadline=None, max_examples=60)
@given(st.sampled_from((*SCHEDULES, "forward")), st.integers(2, 9), st.integers(0, 40))
def test_few_messages_are_under_way_whatever_the_schedule(schedule: str, stages: int, count: int) -> None:
    for stage in range(stages):
        most = counted(schedule, stages, stage, count).most
        assert most["irecv"] <= AHEAD and most["isend"] <= UNSENT + 1, (stage, most)


def test_inference_of_many_micro_batches_expects_two_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted("forward", 2, 1, 64).most["irecv"] == AHEAD
    monkeypatch.setattr(links._Pair._expect, "__defaults__", (64,))
    assert counted("forward", 2, 1, 64).most["irecv"] == 64, "the control"
