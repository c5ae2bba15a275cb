"""What pipeline stages send each other: hidden states down, their gradients up."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from realflow.engines.pipeline import Action, Kind, messages
from realflow.models.place import Axis, Place

UNSENT = 2
"""Messages to one neighbour that may be under way: each keeps its tensor alive."""

AHEAD = 2
"""Messages from one neighbour that may be expected, for each of which there is memory."""


class _Pair:
    """The messages with one neighbour, posted in the order that both sides agree on.

    Receives are posted at most `AHEAD` of what is taken, and all of them that come before a send are
    posted before it: in the agreed order nothing waits for a later message, so that nobody hangs. (No
    schedule has more than `AHEAD` of them there either.)
    """

    def __init__(
        self,
        axis: Axis,
        peer: int,
        agreed: Sequence[Action],
        sends: Kind,
        rows: Sequence[int],
        like: torch.Tensor,
    ) -> None:
        self._axis, self._peer, self._sends, self._rows, self._like = axis, peer, sends, rows, like
        self._agreed = deque(agreed)
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._expected: dict[Action, tuple[dist.Work, torch.Tensor]] = {}

    def send(self, action: Action, tensor: torch.Tensor) -> None:
        self._expect(len(self._rows))
        assert self._agreed and self._agreed[0] == action, (self._agreed, action)
        self._agreed.popleft()
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, group=self._axis.group, group_dst=self._peer)
        assert work is not None
        self._sent.append((work, tensor))
        while len(self._sent) > UNSENT:
            self._sent.popleft()[0].wait()
        self._expect()

    def receive(self, action: Action) -> torch.Tensor:
        self._expect()
        work, tensor = self._expected.pop(action)
        work.wait()
        self._expect()
        return tensor

    def finish(self) -> None:
        while self._sent:
            self._sent.popleft()[0].wait()
        assert not self._agreed and not self._expected, (self._agreed, self._expected)

    def _expect(self, most: int = AHEAD) -> None:
        """Post what comes before the next message that this side sends, until `most` are expected."""
        while self._agreed and self._agreed[0].kind != self._sends and len(self._expected) < most:
            action = self._agreed.popleft()
            shape = (self._rows[action.micro_batch], *self._like.shape[1:])
            tensor = self._like.new_empty(shape)
            work = dist.irecv(tensor, group=self._axis.group, group_src=self._peer)
            assert work is not None
            self._expected[action] = (work, tensor)


class Links:
    """Both neighbours of this stage, for one run of `schedule`.

    `rows` says how many rows of hidden states each micro-batch has between stages; `like` [0, H] has
    their width, dtype and device.
    """

    def __init__(self, place: Place, schedule: str, rows: Sequence[int], like: torch.Tensor) -> None:
        axis = place.pp
        self._above = self._below = None
        if not place.is_first:
            agreed = messages(schedule, axis.size, axis.index - 1, len(rows))
            self._above = _Pair(axis, axis.index - 1, agreed, "B", rows, like)
        if not place.is_last:
            agreed = messages(schedule, axis.size, axis.index, len(rows))
            self._below = _Pair(axis, axis.index + 1, agreed, "F", rows, like)

    def states(self, micro_batch: int) -> torch.Tensor | None:
        """The hidden states that the stage before sends; None on the first stage."""
        return None if self._above is None else self._above.receive(Action("F", micro_batch))

    def send_states(self, micro_batch: int, states: torch.Tensor) -> None:
        """To the stage after."""
        assert self._below is not None
        self._below.send(Action("F", micro_batch), states)

    def gradient(self, micro_batch: int) -> torch.Tensor:
        """The gradient of what `send_states` sent, from the stage after."""
        assert self._below is not None
        return self._below.receive(Action("B", micro_batch))

    def send_gradient(self, micro_batch: int, gradient: torch.Tensor) -> None:
        """To the stage before; nothing on the first stage."""
        if self._above is not None:
            self._above.send(Action("B", micro_batch), gradient)

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for pair in (self._above, self._below):
            if pair is not None:
                pair.finish()
