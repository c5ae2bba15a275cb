"""Fields between two stores over real sockets, and what must be refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgpack
import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.errors import RunError
from realflow.runtime import frames
from realflow.runtime.frames import MalformedFrame, Request, decode_header, decode_request, decode_values
from realflow.runtime.store import DTYPES, FieldStore
from realflow.runtime.transport import FieldClient, FieldServer

quick = settings(max_examples=100, deadline=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def keys() -> tuple[str, str]:
    """A fresh CURVE pair, public and secret."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


@contextmanager
def pair(store: FieldStore) -> Iterator[tuple[FieldServer, FieldClient, tuple[str, str]]]:
    """A server as rank 3 and a client, each in a context of its own, as in two processes."""
    shared = keys()
    with zmq.Context() as one, zmq.Context() as other, FieldServer(store, one, *shared) as server:
        client = FieldClient(other, *shared, {3: server.address})
        try:
            yield server, client, shared
        finally:
            client.close()


def tensor_of(dtype: torch.dtype, length: int, trailing: tuple[int, ...] = ()) -> torch.Tensor:
    data = torch.randint(0, 256, (length, *trailing, dtype.itemsize), dtype=torch.uint8)
    return (data > 127).any(-1) if dtype == torch.bool else data.view(dtype).squeeze(-1)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality that also holds for NaN."""
    raw = [
        value.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        for value in (one, other)
    ]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


# ---- store ------------------------------------------------------------------------------------


def test_the_store_counts_what_it_holds() -> None:
    store = FieldStore()
    packed = torch.arange(1000)
    store.put("tokens", dict(enumerate(packed.split(100))))
    assert store.bytes == 8000
    assert store.get("tokens", [3, 1])[0].tolist() == list(range(300, 400))
    assert store.get("tokens", [3])[0].untyped_storage().nbytes() == 800  # the batch is not kept alive
    store.put("tokens", {3: torch.arange(5)})
    store.put("text", {1: "four", 2: {"a": [1, None]}})
    assert store.bytes == 8000 - 800 + 40 + 4 + 9
    assert store.missing("tokens", [11, 3, 10]) == [11, 10]
    assert store.missing("unknown", [1]) == [1]
    assert store.held() == {"tokens": 10, "text": 2}
    for _ in range(2):
        store.free("tokens", range(20))
    assert store.bytes == 13
    store.free("text", [1, 2])
    assert store.bytes == 0 and store.held() == {}


def test_the_store_names_what_is_absent() -> None:
    store = FieldStore()
    store.put("rewards", {1: 0.5, 2: None})
    assert store.get("rewards", [2, 1]) == [None, 0.5]
    with pytest.raises(RunError, match=r"'rewards' is not here for 2 of 3 samples: 7, 8"):
        store.get("rewards", [1, 7, 8])


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(1.0),
        torch.zeros(3, dtype=torch.complex64),
        {1: 2},
        (1, 2),
        2**64,
        object(),
        [set()],
        b"x",
    ],
)
def test_the_store_refuses_what_cannot_travel(value: Any) -> None:
    store = FieldStore()
    with pytest.raises(RunError, match="field 'x' of sample 4"):
        store.put("x", {1: 1, 4: value})
    assert store.held() == {} and store.bytes == 0


def test_the_store_is_safe_between_threads() -> None:
    store = FieldStore()

    def work(base: int) -> None:
        for i in range(300):
            store.put("f", {base + i: torch.zeros(4)})
            store.get("f", [base + i])
            if i % 2:
                store.free("f", [base + i])

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.held() == {"f": 600} and store.bytes == 600 * 16


# ---- frames -----------------------------------------------------------------------------------


@quick
@given(
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 9), min_size=1),
    st.sampled_from([(), (3,), (0,)]),
)
def test_tensors_survive_the_frames(
    dtype: torch.dtype, lengths: list[int], trailing: tuple[int, ...]
) -> None:
    values = [tensor_of(dtype, length, trailing) for length in lengths]
    header, body = frames.encode_reply(5, values)
    found = decode_values(decode_header(bytes(header)), memoryview(body), len(values))
    assert all(same_bits(a, b) for a, b in zip(values, found, strict=True))


@quick
@given(st.lists(json_values))
def test_json_values_survive_the_frames(values: list[Any]) -> None:
    FieldStore().put("x", dict(enumerate(values)))
    header, body = frames.encode_reply(5, values)
    assert decode_values(decode_header(bytes(header)), memoryview(body), len(values)) == values


@quick
@given(st.binary(max_size=64) | json_values.map(msgpack.packb))
def test_garbage_is_refused_and_nothing_else_is_raised(data: bytes) -> None:
    for read in (decode_request, decode_header):
        with suppress(MalformedFrame):
            assert read(data) is not None


def test_replies_that_contradict_themselves_are_refused() -> None:
    header, body = frames.encode_reply(1, [torch.arange(4), torch.arange(2)])
    whole = decode_header(header)
    for wrong, data, count in (
        (whole, memoryview(body)[:-1], 2),
        (whole, memoryview(body), 3),
        (decode_header(msgpack.packb([1, "tensors", "int64", [4, 3], []])), memoryview(body), 2),
        (decode_header(msgpack.packb([1, "values", "", [], []])), memoryview(b"\xc1"), 1),
    ):
        with pytest.raises(MalformedFrame):
            decode_values(wrong, data, count)
    for bad in (
        ["1", "values", "", [], []],
        [1, "tensors", "float8", [1], []],
        [1, "tensors", "int64", [-1], []],
    ):
        with pytest.raises(MalformedFrame):
            decode_header(msgpack.packb(bad))
    for bad_request in (
        [1, "f", []],
        [1, "f", [-1]],
        [1, "f" * 300, [1]],
        [1, "f", ["1"]],
        [-1, "f", [1]],
        [1, "f"],
    ):
        with pytest.raises(MalformedFrame):
            decode_request(msgpack.packb(bad_request))
    with pytest.raises(MalformedFrame, match="more than"):
        decode_request(b"\x00" * (frames.MAX_HEADER_BYTES + 1))


# ---- sockets ----------------------------------------------------------------------------------


def test_a_thousand_samples_arrive_bit_equal(capsys: pytest.CaptureFixture[str]) -> None:
    store, here = FieldStore(), FieldStore()
    torch.manual_seed(1)
    lengths = torch.randint(0, 2000, (1000,)).tolist()
    for name, dtype in DTYPES.items():
        store.put(name, {i: tensor_of(dtype, length) for i, length in enumerate(lengths)})
    store.put("text", {i: f"sample {i} \N{SNOWMAN}" for i in range(1000)})
    wanted = list(range(999, -1, -1))
    with pair(store) as (server, client, _):
        client.fetch(3, "text", [0])  # the handshake
        started = time.perf_counter()
        for name in DTYPES:
            here.put(name, client.fetch(3, name, wanted))
        seconds = time.perf_counter() - started
        for name in DTYPES:
            pairs = zip(store.get(name, wanted), here.get(name, wanted), strict=True)
            assert all(same_bits(a, b) for a, b in pairs)
        assert here.bytes == store.bytes - sum(len(store.get("text", [i])[0]) for i in range(1000))
        assert client.fetch(3, "text", [7]) == {7: "sample 7 \N{SNOWMAN}"}
        both = client.fetch_many([(3, "text", [1, 2]), (3, "int64", []), (3, "bool", [5])])
        assert [sorted(values) for values in both] == [[1, 2], [], [5]]
        assert server.malformed == 0
    with capsys.disabled():
        print(
            f"\nfields: {here.bytes / 1e6:.0f} MB in {seconds:.2f} s, {here.bytes / 1e9 / seconds:.2f} GB/s"
        )


def test_long_requests_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realflow.runtime.transport.MAX_IDS", 16)
    store = FieldStore()
    store.put("x", {i: i * i for i in range(100)})
    with pair(store) as (_, client, _keys):
        assert client.fetch(3, "x", range(100)) == {i: i * i for i in range(100)}


def test_it_answers_while_the_main_thread_computes() -> None:
    store = FieldStore()
    store.put("x", {1: torch.arange(1000)})
    waits: list[float] = []
    with pair(store) as (_, client, _keys):
        client.fetch(3, "x", [1])

        def ask() -> None:
            for _ in range(20):
                started = time.perf_counter()
                client.fetch(3, "x", [1])
                waits.append(time.perf_counter() - started)

        thread = threading.Thread(target=ask)
        matrix = torch.randn(1500, 1500)
        thread.start()
        rounds = 0
        while thread.is_alive():
            matrix @ matrix  # about 0.1 s without the interpreter's lock
            rounds += 1
        thread.join()
    assert len(waits) == 20
    assert rounds < 20 * 5  # not one product for each of the turns of a fetch


def test_what_the_owner_lacks_is_named() -> None:
    store = FieldStore()
    store.put("x", {1: 1, 2: torch.zeros(2)})
    with pair(store) as (_, client, _keys):
        with pytest.raises(
            RunError, match=r"rank 3 cannot send field 'y': .* not here for 1 of 1 samples: 4"
        ):
            client.fetch(3, "y", [4])
        with pytest.raises(RunError, match="rank 3 cannot send field 'x': its values differ"):
            client.fetch(3, "x", [1, 2])
        assert client.fetch(3, "x", [1]) == {1: 1}
        with pytest.raises(RunError, match="rank 9 has no address"):
            client.fetch(9, "x", [1])


@pytest.mark.parametrize("wrong", ["client", "server", "plain"])
def test_another_key_gets_nothing(wrong: str) -> None:
    store = FieldStore()
    store.put("x", {1: 1})
    with pair(store) as (server, client, shared), zmq.Context() as context:
        foreign = keys()
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        if wrong != "plain":
            mine, theirs = (foreign, shared) if wrong == "client" else (shared, foreign)
            socket.curve_publickey, socket.curve_secretkey = (key.encode() for key in mine)
            socket.curve_serverkey = theirs[0].encode()
        socket.connect(server.address)
        socket.send(frames.encode_request(Request(1, "x", (1,))))
        assert client.fetch(3, "x", [1]) == {1: 1}
        assert not socket.poll(500)
        socket.close()
        assert server.malformed == 0


def test_an_owner_that_is_silent_is_named() -> None:
    with pair(FieldStore()) as (server, _, shared), zmq.Context() as context:
        server.close()
        client = FieldClient(context, *shared, {3: server.address})
        started = time.perf_counter()
        with pytest.raises(RunError, match=r"no answer within 0\.3 s from rank 3 for field 'x'"):
            client.fetch(3, "x", [1], timeout=0.3)
        assert time.perf_counter() - started < 2
        client.close()


def test_garbage_is_counted_and_the_server_lives_on() -> None:
    store = FieldStore()
    store.put("x", {1: "there"})
    garbage: list[list[bytes]] = [
        [b""],
        [b"\xc1"],
        [b"\x93\x01"],
        [msgpack.packb({"a": 1})],
        [msgpack.packb([1, "x", [[[[]]]]])],
        [b"\x91" * 5000],
        [msgpack.packb([1, "x", [1]]), b"more"],
        [b"\xdd\xff\xff\xff\xff"],
    ]
    with pair(store) as (server, client, shared), zmq.Context() as context:
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.curve_publickey, socket.curve_secretkey = (key.encode() for key in shared)
        socket.curve_serverkey = shared[0].encode()
        socket.connect(server.address)
        for parts in garbage:
            socket.send_multipart(parts)
        socket.send(frames.encode_request(Request(77, "x", (1,))))
        assert socket.poll(5000)
        assert decode_header(socket.recv_multipart()[0]).number == 77
        assert server.malformed == len(garbage)
        socket.send(b"\x00" * (frames.MAX_HEADER_BYTES + 1))  # ZeroMQ itself hangs up on this one
        assert client.fetch(3, "x", [1]) == {1: "there"}
        socket.close()


def test_a_nonsense_answer_is_an_error_of_the_run() -> None:
    shared = keys()
    with zmq.Context() as one, zmq.Context() as other, one.socket(zmq.ROUTER) as server:
        server.linger = 0
        server.curve_server = True
        server.curve_publickey, server.curve_secretkey = (key.encode() for key in shared)
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client = FieldClient(other, *shared, {3: f"tcp://127.0.0.1:{port}"})

        def answer() -> None:
            for reply in ([b"\xc1", b""], [b"x"], [msgpack.packb([99, "values", "", [], []]), b"\x90"]):
                who, _request = server.recv_multipart()
                server.send_multipart([who, *reply])

        thread = threading.Thread(target=answer)
        thread.start()
        for _ in range(3):
            with pytest.raises(RunError, match="rank 3 sent an answer that makes no sense"):
                client.fetch(3, "x", [1], timeout=5)
        thread.join()
        client.close()
