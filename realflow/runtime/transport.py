"""Fields from worker to worker over ZeroMQ with CURVE, beside whatever the workers compute.

Each worker runs a `FieldServer`, a thread that answers from its `FieldStore`; whoever needs values
asks their owner with a `FieldClient`. Both ends hold the run's worker key, and nobody else is let in.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import zmq

from realflow.errors import RunError
from realflow.runtime.connect import authenticator
from realflow.runtime.frames import (
    MAX_HEADER_BYTES,
    MAX_IDS,
    Header,
    MalformedFrame,
    Request,
    decode_header,
    decode_request,
    decode_values,
    encode_error,
    encode_reply,
    encode_request,
)
from realflow.runtime.store import FieldStore

FETCH_SECONDS = 120.0

Fetch = tuple[int, str, Sequence[int]]
"""Owner's rank, field, sample ids."""


class FieldServer:
    """Answers requests for the values of `store` in a thread of its own, until closed.

    `public` and `secret` are the key pair that the run's workers share; the server uses it and
    accepts no other. It installs the one authenticator that a ZeroMQ context can have. It listens
    on a free port of `host`; `address` is what clients connect to.
    """

    def __init__(
        self, store: FieldStore, context: zmq.Context[Any], public: str, secret: str, host: str = "127.0.0.1"
    ) -> None:
        self.malformed = 0
        """Requests that were dropped because they made no sense."""
        self._store = store
        self._auth = authenticator(context, public)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey = public.encode()
        self._socket.curve_secretkey = secret.encode()
        self._socket.linger = 0
        self._socket.sndhwm = 0  # a full queue would drop replies silently; requests bound it
        self._socket.maxmsgsize = MAX_HEADER_BYTES
        self._stop = context.socket(zmq.PAIR)
        self._stopped = context.socket(zmq.PAIR)
        port = f"inproc://fields-{id(self)}"
        self._stop.bind(port)
        self._stopped.connect(port)
        try:
            self._socket.bind(f"tcp://{host}:*")
        except zmq.ZMQError as error:
            self._close_all()
            raise RunError(f"cannot listen for requests for fields on {host}: {error}") from error
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._serve, name="fields", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and its sockets. May be called twice."""
        if self._thread.is_alive():
            self._stop.send(b"")
            self._thread.join()
        self._close_all()

    def __enter__(self) -> FieldServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _close_all(self) -> None:
        for socket in (self._socket, self._stop, self._stopped):
            socket.close(linger=0)
        self._auth.stop()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stopped, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._stopped in ready:
                return
            client, *frames = self._socket.recv_multipart()
            try:
                if len(frames) != 1:
                    raise MalformedFrame(f"{len(frames)} frames")
                request = decode_request(frames[0])
            except MalformedFrame:
                self.malformed += 1
                continue
            header, body = self._answer(request)
            # ZeroMQ keeps the buffer until it is sent, and copies nothing.
            self._socket.send_multipart([client, header, body], copy=False)

    def _answer(self, request: Request) -> tuple[bytes, memoryview | bytes]:
        try:
            return encode_reply(request.number, self._store.get(request.field, request.ids))
        except (RuntimeError, ValueError, OverflowError, MemoryError) as error:  # RunError is among them
            return encode_error(request.number, str(error))


class FieldClient:
    """Fetches values from other workers.

    `addresses` maps a rank to its server's address and may be filled after the client is made.
    Threads take turns: one `fetch` at a time.
    """

    def __init__(
        self, context: zmq.Context[Any], public: str, secret: str, addresses: Mapping[int, str]
    ) -> None:
        self._context = context
        self._public, self._secret = public.encode(), secret.encode()
        self._addresses = addresses
        self._lock = threading.Lock()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._number = 0

    def fetch(
        self, owner: int, field: str, ids: Sequence[int], timeout: float = FETCH_SECONDS
    ) -> dict[int, Any]:
        """The values of `field` that rank `owner` holds for `ids`: id -> value.

        Raises RunError, naming rank and field, where the owner lacks one of them, answers nonsense,
        or does not answer within `timeout` seconds.
        """
        return self.fetch_many([(owner, field, ids)], timeout)[0]

    def fetch_many(self, fetches: Sequence[Fetch], timeout: float = FETCH_SECONDS) -> list[dict[int, Any]]:
        """Several fetches at once, from one owner or many; all owners work at the same time."""
        with self._lock:
            try:
                return self._fetch_many(fetches, time.monotonic() + timeout, timeout)
            except BaseException:
                self._drop()  # replies may still come in that the next fetch must not see
                raise

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        for socket in self._sockets.values():
            socket.close(linger=0)
        self._sockets.clear()

    def _fetch_many(self, fetches: Sequence[Fetch], deadline: float, timeout: float) -> list[dict[int, Any]]:
        found: list[dict[int, Any]] = [{} for _ in fetches]
        open_requests: dict[int, tuple[int, Request]] = {}  # number -> (place in `fetches`, request)
        poller = zmq.Poller()
        for place, (owner, field, ids) in enumerate(fetches):
            socket = self._socket(owner)
            poller.register(socket, zmq.POLLIN)
            for start in range(0, len(ids), MAX_IDS):
                self._number += 1
                request = Request(self._number, field, tuple(ids[start : start + MAX_IDS]))
                socket.send(encode_request(request))
                open_requests[request.number] = (place, request)
        owners = {self._sockets[owner]: owner for owner, _, _ in fetches}
        while open_requests:
            ready = poller.poll(math.ceil(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                waited = sorted({(fetches[place][0], r.field) for place, r in open_requests.values()})
                missing = "; ".join(f"rank {rank} for field {field!r}" for rank, field in waited)
                raise RunError(f"no answer within {timeout:g} s from {missing}")
            for socket, _ in ready:
                owner = owners[socket]
                frames = socket.recv_multipart(copy=False)
                place, request, values = _received(owner, frames, open_requests)
                del open_requests[request.number]
                found[place].update(zip(request.ids, values, strict=True))
        return found

    def _socket(self, owner: int) -> zmq.Socket[bytes]:
        if owner not in self._sockets:
            if owner not in self._addresses:
                raise RunError(
                    f"rank {owner} has no address for its fields; known: {sorted(self._addresses)}"
                )
            socket = self._context.socket(zmq.DEALER)
            socket.curve_serverkey = self._public
            socket.curve_publickey = self._public
            socket.curve_secretkey = self._secret
            socket.linger = 0
            socket.rcvhwm = socket.sndhwm = 0
            socket.connect(self._addresses[owner])
            self._sockets[owner] = socket
        return self._sockets[owner]


def _received(
    owner: int, frames: Sequence[zmq.Frame], open_requests: Mapping[int, tuple[int, Request]]
) -> tuple[int, Request, list[Any]]:
    """The place, request and values of one reply. Raises RunError."""
    try:
        if len(frames) != 2:
            raise MalformedFrame(f"{len(frames)} frames")
        header: Header = decode_header(frames[0].bytes)
        if header.number not in open_requests:
            raise MalformedFrame(f"a reply to request {header.number}, which is not open")
        place, request = open_requests[header.number]
        if header.kind == "error":
            text = frames[1].bytes[:2000].decode(errors="replace")
            raise RunError(f"rank {owner} cannot send field {request.field!r}: {text}")
        return place, request, decode_values(header, frames[1].buffer, len(request.ids))
    except MalformedFrame as error:
        fields = sorted({request.field for _, request in open_requests.values()})
        raise RunError(f"rank {owner} sent an answer that makes no sense for {fields}: {error}") from None
