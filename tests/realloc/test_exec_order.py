"""What a rank does when, with a transport that only notes it: overlap, slots, relays, kept tables."""

from __future__ import annotations

import importlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import pytest
import torch
from realloc_ranks import storage, wires
from schedule_cases import NODES, weights

from realflow.errors import InputError, RunError
from realflow.layout import Layout, full_box
from realflow.realloc import Reallocation, Tensors, TensorSpec, replicated, transfers
from realflow.realloc.buckets import Buckets
from realflow.realloc.storage import Computed, Storage, local_shards

execute = importlib.import_module("realflow.realloc.exchange")
SHAPES = {f"w{i}": (16, 16) for i in range(12)}  # 1024 bytes each in float32
Posts = dict[int, list[tuple[int, bool]]]


@dataclass
class Transport:
    """Notes every start and end of a message, and every call of the kernel.

    `near` are the ranks that share memory with the one that runs.
    """

    events: list[str] = field(default_factory=list)
    near: dict[int, torch.Tensor] = field(default_factory=dict)

    def start(self, what: str) -> Callable[..., Transport.Work]:
        def post(tensor: torch.Tensor, peer: int, group: object = None, tag: int = 0) -> Transport.Work:
            event = f"{what} {peer}" + " answer" * (tag == execute.UNPACKED)
            if what == "receive" and self.near:
                tensor.zero_()  # from the first byte on
            self.events.append(event)
            return Transport.Work(self, event)

        return post

    @dataclass
    class Work:
        transport: Transport
        what: str

        def wait(self) -> None:
            self.transport.events.append(f"done {self.what}")


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Transport:
    made = Transport()
    monkeypatch.setattr(execute.dist, "isend", made.start("send"))
    monkeypatch.setattr(execute.dist, "irecv", made.start("receive"))
    monkeypatch.setattr(execute, "agree", lambda bound, messages: None)
    monkeypatch.setattr(execute, "neighbours", lambda bound, messages: made.near)
    # Nobody is there who would say the right numbers: `lost_ranks.py` has two that do.
    monkeypatch.setattr(execute._Exchange, "_agreed", lambda *told: None)
    kernel = execute.move

    def move(*arguments: object) -> None:
        made.events.append("kernel")
        kernel(*arguments)

    monkeypatch.setattr(execute, "move", move)
    return made


def tensors(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape).t() for name, shape in shapes.items()}  # not one run of memory


def sender(bucket: int = 4096) -> Reallocation:
    """Rank 0 has everything, rank 1 wants it: six messages of two parameters."""
    src, dst = replicated(SHAPES, 4, [0]), replicated(SHAPES, 4, [1])
    bound = local_shards(src, 0, tensors())
    return Reallocation(transfers(src, dst).part(0), 0, None, bound, {}, Buckets(bucket))


def test_the_next_message_is_packed_while_one_travels(transport: Transport) -> None:
    sender().run()
    flying = packed = most = 0
    for event in transport.events:
        packed += event == "kernel"
        flying += event.startswith("send")
        flying -= event.startswith("done")
        most = max(most, flying)
    assert transport.events[:4] == ["kernel", "send 1", "kernel", "send 1"]
    assert most == 2, "one bucket has two slots"
    assert packed == sum(event == "send 1" for event in transport.events) == 6


def test_without_a_second_slot_nothing_would_overlap(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    slots = Buckets.slots
    monkeypatch.setattr(Buckets, "slots", lambda self, side, size: slots(self, side, size)[:1])
    sender().run()
    assert transport.events[:4] == ["kernel", "send 1", "done send 1", "kernel"]


def test_tables_are_built_once(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    task = sender()
    bound = importlib.import_module("realflow.realloc.bound")
    monkeypatch.setattr(bound, "rows", lambda *_: pytest.fail("a table was built again"))
    task.run()
    task.run()
    assert sum(event == "send 1" for event in transport.events) == 12


def test_one_run_of_memory_travels_without_a_slot(transport: Transport) -> None:
    src, dst = replicated(SHAPES, 4, [0]), replicated(SHAPES, 4, [1])
    plain = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for rank, specs in ((0, src), (1, dst)):
        buckets = Buckets(4096, alone_bytes=1024)
        bound = local_shards(specs, rank, plain)
        Reallocation(transfers(src, dst).part(rank), rank, None, bound, bound, buckets).run()
        assert "kernel" not in transport.events
        assert buckets.held_bytes == 0
    assert sum(event == "send 1" for event in transport.events) == 12


def test_a_relay_is_packed_after_all_that_was_received(transport: Transport) -> None:
    """Two nodes of two ranks: what comes in to ranks 2 and 3 once is passed on between them."""
    nodes = {rank: f"n{rank // 2}" for rank in range(4)}
    src, dst = replicated(SHAPES, 4, [0, 1]), replicated(SHAPES, 4, [2, 3])
    part = transfers(src, dst, nodes).part(2)
    assert {t.hop for t in part.transfers} == {0, 1}
    task = Reallocation(part, 2, None, {}, local_shards(dst, 2, tensors()), Buckets(4096))
    task.run()
    events = transport.events
    received = [i for i, event in enumerate(events) if event in ("done receive 0", "done receive 1")]
    relayed = [i for i, event in enumerate(events) if event == "send 3"]
    assert received and relayed
    assert events[relayed[0] - 1] == "kernel", "a relay is packed when it is sent"
    assert received[-1] < relayed[0] - 1
    assert events[received[-1] + 1] == "kernel", "and what it passes on has been unpacked"


def posted(transport: Transport, src: Tensors, dst: Tensors, nodes: dict[int, str] | None) -> Posts:
    """What each of eight ranks posts, in its order: (the other rank, whether it sends)."""
    schedule = transfers(src, dst, nodes, min_split_bytes=64)
    found: Posts = {}
    for rank in range(8):
        transport.events.clear()
        read, write = storage(src, rank, True, "plain"), storage(dst, rank, False, "plain")
        buckets = Buckets(1024, alone_bytes=256)
        Reallocation(schedule.part(rank), rank, None, read, write, buckets, wires(src, dst)).run()
        events = [event.split() for event in transport.events]
        found[rank] = [(int(e[1]), e[0] == "send") for e in events if e[0] in ("send", "receive")]
    return found


def stuck(posts: Posts) -> int:
    """Messages that never end where each begins only after all that either end posted before it."""
    left = {rank: deque(messages) for rank, messages in posts.items()}
    moved = True
    while moved:
        moved = False
        for rank, queue in left.items():
            while queue and queue[0][1] and left[queue[0][0]] and left[queue[0][0]][0] == (rank, False):
                left[queue.popleft()[0]].popleft()
                moved = True
    return sum(map(len, left.values()))


@pytest.mark.parametrize("nodes", [None, NODES])
@pytest.mark.parametrize(("one", "other"), [("t8", "d8"), ("p8", "d2t2p2"), ("t4p2", "d8")])
def test_both_ends_of_a_pair_post_in_one_order(
    transport: Transport, one: str, other: str, nodes: dict[int, str] | None
) -> None:
    """A transport with one stream for a pair, or for a rank, as NCCL has, does not wait for ever."""
    posts = posted(transport, weights(Layout.parse(one)), weights(Layout.parse(other)), nodes)
    for rank, peer in combinations(posts, 2):
        here = [sends for other, sends in posts[rank] if other == peer]
        assert here == [not sends for other, sends in posts[peer] if other == rank]
    both_ways = [r for r, p in combinations(posts, 2) if {(p, True), (p, False)} <= set(posts[r])]
    assert both_ways, "some pair sends in both directions"
    assert stuck(posts) == 0
    # The control: all sends, then all receives.
    assert stuck({rank: sorted(messages, key=lambda m: not m[1]) for rank, messages in posts.items()}) > 0


def test_shared_memory_is_packed_while_the_half_before_is_unpacked(transport: Transport) -> None:
    """What lies in one run takes the same way, and no half is packed before it was answered for."""
    transport.near = {1: torch.zeros(8192, dtype=torch.uint8)}
    sender().run()
    packed = ["kernel", "send 1", "receive 1 answer"]
    done = ["done send 1", "done receive 1 answer"]
    assert transport.events == [*packed, *packed, *4 * [*done, *packed], *done, *done]
    src, dst = replicated(SHAPES, 4, [0]), replicated(SHAPES, 4, [1])
    plain = local_shards(src, 0, {name: torch.zeros(shape) for name, shape in SHAPES.items()})
    transport.events.clear()
    Reallocation(transfers(src, dst).part(0), 0, None, plain, {}, Buckets(4096, alone_bytes=1024)).run()
    assert transport.events.count("kernel") == transport.events.count("send 1") == 12


def test_shared_memory_is_received_without_a_bucket(transport: Transport) -> None:
    """Answered for when it has been unpacked; the answers are waited for at the end."""
    transport.near = {0: torch.arange(8192).view(torch.uint8)}
    dst = replicated(SHAPES, 4, [1])
    part = transfers(replicated(SHAPES, 4, [0]), dst).part(1)
    buckets, held = Buckets(4096), tensors()
    Reallocation(part, 1, None, {}, local_shards(dst, 1, held), buckets).run()
    assert buckets.held_bytes == 0
    assert transport.events[:6] == ["receive 0"] * 6
    assert transport.events[6:-6] == 6 * ["done receive 0", "kernel", "send 0 answer"]
    assert transport.events[-6:] == ["done send 0 answer"] * 6
    assert torch.equal(held["w0"].contiguous().view(-1).view(torch.int64), torch.arange(128))


Events = dict[int, list[list[str]]]


def waiting(events: Events) -> int:
    """Events that never come about where a message must have been sent before its receiver has it."""
    left = {rank: deque(found) for rank, found in events.items()}
    sent: Counter[tuple[int, str, str]] = Counter()
    had: Counter[tuple[int, str, str]] = Counter()
    moved = True
    while moved:
        moved = False
        for rank, queue in left.items():
            while queue:
                event = queue[0]
                if event[0] == "send":
                    sent[rank, event[1], "".join(event[2:])] += 1
                elif event[:2] == ["done", "receive"]:
                    key = int(event[2]), str(rank), "".join(event[3:])
                    if had[key] == sent[key]:
                        break
                    had[key] += 1
                queue.popleft()
                moved = True
    return sum(map(len, left.values()))


@pytest.mark.parametrize("nodes", [None, NODES])
@pytest.mark.parametrize(("one", "other"), [("t8", "d8"), ("p8", "d2t2p2"), ("t4p2", "d8")])
def test_ranks_that_share_memory_do_not_wait_in_a_circle(
    transport: Transport, one: str, other: str, nodes: dict[int, str] | None
) -> None:
    """What a rank does in which order does not depend on time, so that one order of all shows it."""
    src, dst = weights(Layout.parse(one)), weights(Layout.parse(other))
    schedule = transfers(src, dst, nodes, min_split_bytes=64)
    found: Events = {}
    for rank in range(8):
        transport.events.clear()
        transport.near = {peer: torch.zeros(8192, dtype=torch.uint8) for peer in range(8) if peer != rank}
        read, write = storage(src, rank, True, "plain"), storage(dst, rank, False, "plain")
        buckets = Buckets(1024, alone_bytes=256)
        Reallocation(schedule.part(rank), rank, None, read, write, buckets, wires(src, dst)).run()
        found[rank] = [event.split() for event in transport.events]
    assert waiting(found) == 0
    # The control: ranks that answer for nothing before they have sent all that is theirs.
    late = {
        rank: sorted(events, key=lambda event: event[0] == "send" and event[-1] == "answer")
        for rank, events in found.items()
    }
    assert waiting(late) > 0


def test_local_copies_run_while_messages_travel(transport: Transport) -> None:
    src = {name: TensorSpec(s, 4, ((0, full_box(s)),)) for name, s in SHAPES.items()}
    dst = replicated(SHAPES, 4, [0, 1])
    read, write = local_shards(src, 0, tensors()), local_shards(dst, 0, tensors())
    Reallocation(transfers(src, dst).part(0), 0, None, read, write, Buckets(4096)).run()
    events = transport.events
    assert events[:6] == ["kernel", "send 1", "kernel", "send 1", "kernel", "done send 1"]
    assert events.count("kernel") == 6 + 6


def test_a_lost_peer_is_named(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(work: Transport.Work) -> None:
        raise RuntimeError("Connection closed by peer")

    task = sender()
    with monkeypatch.context() as patch:
        patch.setattr(Transport.Work, "wait", wait)
        with pytest.raises(RunError, match="from rank 0 to rank 1 failed: Connection closed"):
            task.run()
    for again in (task.run, task.verify):
        with pytest.raises(RunError, match="run 1 of this reallocation failed on rank 0"):
            again()
    sender().run()  # another one is whole


BOX = ((0, 4), (0, 4))


@pytest.mark.parametrize(
    ("offset", "strides", "dtype"),
    [
        (-1, (4, 1), torch.float32),
        (0, (4,), torch.float32),
        (0, (-4, 1), torch.float32),
        (1, (4, 1), torch.float32),  # past the end
        (0, (5, 1), torch.float32),
        (0, (4, 1), torch.float64),
    ],
)
def test_storage_outside_of_its_memory_is_refused(
    offset: int, strides: tuple[int, ...], dtype: torch.dtype
) -> None:
    Storage(BOX, torch.zeros(16), 0, (4, 1), torch.float32)
    with pytest.raises(InputError, match="storage of box"):
        Storage(BOX, torch.zeros(16), offset, strides, dtype)


def test_bytes_that_no_number_may_begin_at_are_refused() -> None:
    room = torch.zeros(65, dtype=torch.uint8)
    with pytest.raises(InputError, match="cannot hold"):
        Storage(BOX, room[1:], 0, (4, 1), torch.float32)
    assert Storage(BOX, room, 0, (4, 1), torch.float32).view().shape == (4, 4)


def test_a_computed_source_must_give_what_it_says() -> None:
    wrong = Computed(BOX, torch.float32, lambda part: torch.zeros(2, 2))
    with pytest.raises(InputError, match="computed source"):
        wrong.tensor(BOX)
    src, dst = replicated({"w": (4, 4)}, 4, [0]), replicated({"w": (4, 4)}, 4, [1])
    part = transfers(src, dst).part(1)
    with pytest.raises(InputError, match="cannot be written"):
        Reallocation(part, 1, None, {}, {"w": [wrong]})


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_a_decay_outside_of_0_to_1_is_refused(decay: float) -> None:
    src, dst = replicated({"w": (4, 4)}, 4, [0]), replicated({"w": (4, 4)}, 4, [1])
    with pytest.raises(InputError, match="decay"):
        Reallocation(transfers(src, dst).part(2), 2, None, {}, {}, decay=decay)
