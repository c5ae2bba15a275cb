"""A worker's line to the master: one thread that sends, receives, sorts and beats.

Ordered messages go to the main thread's queue, functions to the function thread's, feeds to their
stream; `Free` is applied at once. The thread also ends the process: when the master says so, when
the master is gone, or when a function has run past its time.
"""

from __future__ import annotations

import os
import queue
import socket as sockets
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import zmq

from realflow.runtime.connect import Rendezvous
from realflow.runtime.messages import (
    Beat,
    Begin,
    DispatchDone,
    Drain,
    Execute,
    Failed,
    Feed,
    Free,
    Halt,
    Message,
    Open,
    Pong,
    Reallocate,
    Save,
    Slice,
    decode,
    encode,
)

BEAT_SECONDS = 1.0
MASTER_SILENCE_SECONDS = 30.0
PARTING_SECONDS = 3.0
STARTUP = "start-up"

Ordered = Open | Execute | Reallocate | Save | Halt


class MasterLink:
    """The line of one worker. Threads of the process call `send`; the link's thread does the rest."""

    def __init__(self, rank: int, rendezvous: Rendezvous, context: zmq.Context[Any]) -> None:
        self.rank = rank
        self.doing = STARTUP
        self.ordered: queue.SimpleQueue[Ordered] = queue.SimpleQueue()
        self.functions: queue.SimpleQueue[Execute | Halt] = queue.SimpleQueue()
        self.begun: queue.SimpleQueue[dict[int, str]] = queue.SimpleQueue()
        self.is_function: Callable[[str], bool] = lambda call: False
        self.on_free: Callable[[Free], None] = lambda message: None
        self.on_execute: Callable[[Execute], None] = lambda message: None
        self.on_done: Callable[[DispatchDone], DispatchDone] = lambda message: message
        self.on_orphaned: Callable[[], None] = lambda: None
        self.overdue: Callable[[], Failed | None] = lambda: None
        self._streams: dict[str, queue.SimpleQueue[Feed | Drain]] = {}
        self._slices: dict[str, Future[Slice]] = {}
        self._lock = threading.Lock()
        self._rendezvous = rendezvous
        self._master_is_local = rendezvous.host == sockets.gethostname()
        self._socket = context.socket(zmq.DEALER)
        self._socket.routing_id = b"rank-%d" % rank
        self._socket.curve_serverkey = rendezvous.master_public.encode()
        self._socket.curve_publickey = rendezvous.worker_public.encode()
        self._socket.curve_secretkey = rendezvous.worker_secret.encode()
        self._socket.linger = int(PARTING_SECONDS * 1000)
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.connect(rendezvous.address)
        self._outbox = context.socket(zmq.PULL)
        port = f"inproc://outbox-{id(self)}"
        self._outbox.bind(port)
        self._inbox = context.socket(zmq.PUSH)
        self._inbox.connect(port)
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        """Begin to send, receive and beat."""
        self._thread.start()

    def send(self, message: Message) -> None:
        """Send to the master (any thread)."""
        if isinstance(message, DispatchDone):
            message = self.on_done(message)
        with self._lock:
            self._inbox.send(encode(message))

    def stream(self, dispatch: str) -> queue.SimpleQueue[Feed | Drain]:
        """The queue of an open stream's feeds and drain."""
        with self._lock:
            return self._streams.setdefault(dispatch, queue.SimpleQueue())

    def close_stream(self, dispatch: str) -> None:
        """Forget a stream that has ended."""
        with self._lock:
            self._streams.pop(dispatch, None)

    def take_slice(self, edge: str) -> Slice:
        """Wait for this rank's slice of an edge's schedule, which the master sends once, and let go of it."""
        slice_ = self._slice(edge).result()
        with self._lock:
            del self._slices[edge]
        return slice_

    def _slice(self, edge: str) -> Future[Slice]:
        with self._lock:
            return self._slices.setdefault(edge, Future())

    def fail(self, failed: Failed) -> None:
        """Report a failure, then wait for the master to end the job; leave by force if it does not."""
        self.send(failed)
        time.sleep(PARTING_SECONDS)
        leave(1)

    def close(self) -> None:
        """After Halt: let the thread end and close the sockets."""
        self._thread.join()

    # ---- the link's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:  # noqa: BLE001 - the thread's edge: without it this rank would be mute and hang
            print(f"realflow: rank {self.rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            leave(1)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._outbox, zmq.POLLIN)
        master = self._watch_master(poller)
        next_beat = heard = time.monotonic()
        while True:
            ready = dict(poller.poll(200))
            now = time.monotonic()
            while self._outbox in ready:
                try:
                    self._socket.send(self._outbox.recv(zmq.NOBLOCK))
                except zmq.Again:
                    break
            if self._socket in ready:
                heard = now
                if self._receive():
                    break
            if now >= next_beat:
                next_beat = now + BEAT_SECONDS
                self._socket.send(encode(Beat(self.rank, self.doing)))
                failed = self.overdue()
                if failed is not None:
                    self._part(failed)
            if master in ready or now - heard > MASTER_SILENCE_SECONDS:
                self._orphaned()
        self._socket.close()
        self._outbox.close()

    def _watch_master(self, poller: zmq.Poller) -> int | None:
        """A descriptor that becomes readable when the master's process ends (same host only)."""
        if not self._master_is_local:
            return None
        try:
            descriptor = os.pidfd_open(self._rendezvous.pid)
        except OSError:
            self._orphaned()
            raise
        poller.register(descriptor, zmq.POLLIN)
        return descriptor

    def _receive(self) -> bool:
        """Take every message that is there; True when the run is over."""
        while True:
            try:
                message = decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return False
            match message:
                case Pong():
                    pass
                case Feed() | Drain():
                    self.stream(message.dispatch).put(message)
                case Slice(edge=edge):
                    self._slice(edge).set_result(message)
                case Free():
                    self.on_free(message)
                case Begin(addresses=addresses):
                    self.begun.put(addresses)
                case Execute():
                    self.on_execute(message)
                    (self.functions if self.is_function(message.call) else self.ordered).put(message)
                case Halt(failed=failed):
                    if failed:
                        self._socket.close()
                        leave(1)
                    self.ordered.put(message)
                    self.functions.put(message)
                    return True
                case Open() | Reallocate() | Save():
                    self.ordered.put(message)
                case _:
                    raise AssertionError(f"the master sent a {type(message).__name__}")

    def _part(self, failed: Failed) -> None:
        """Send last words from the link's own thread and wait for the end."""
        self._socket.send(encode(failed))
        deadline = time.monotonic() + PARTING_SECONDS
        while time.monotonic() < deadline:
            if self._socket.poll(100) and isinstance(decode(self._socket.recv()), Halt):
                break
        self._socket.close()
        leave(1)

    def _orphaned(self) -> None:
        print(
            f"realflow: rank {self.rank}: the master is gone while this rank did {self.doing}; leaving",
            file=sys.stderr,
            flush=True,
        )
        self.on_orphaned()
        leave(1)


def leave(code: int) -> None:
    """End this process now, whatever its other threads do; under mpirun a code above 0 ends the job."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
