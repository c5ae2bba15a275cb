"""The master's shell: ZeroMQ, clocks and process ids around `Core`. Imports no torch.

What is to be kept or shown goes to an `Observer`; the process that holds all this together is
`realflow.launch.master`.
"""

from __future__ import annotations

import os
import select
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import zmq

from realflow.models.card import Card
from realflow.planfile import Plan
from realflow.planfile.holdings import follow_edges, planned_edges
from realflow.runtime.assign import Cost
from realflow.runtime.bootstrap import is_alone
from realflow.runtime.carried import Carried
from realflow.runtime.connect import Rendezvous, authenticator, local_address
from realflow.runtime.core import Core
from realflow.runtime.events import (
    Abort,
    Event,
    Finished,
    Instruction,
    Prepare,
    Saved,
    StepDone,
    Tick,
    To,
    WorkerLost,
)
from realflow.runtime.messages import (
    Beat,
    Begin,
    DispatchDone,
    Failed,
    Halt,
    Hello,
    MessageError,
    Pong,
    Ready,
    SampleReady,
    decode,
    encode,
)
from realflow.runtime.slices import Slices

SILENCE_SECONDS = 30.0
STARTUP_SECONDS = 600.0
TICK_SECONDS = 0.25
DEATH_SECONDS = 0.25
"""How long a failure waits for the news that its cause is the death of another rank."""
DIED = "has died (its process is gone)"

Emit = Callable[[dict[str, Any]], None]
"""Takes an event for people: {"kind": "running" | "step" | "note" | "error" | "end", ...}."""


class Interrupted(Exception):
    """Somebody wants the run to end (raised by the process's signal handler)."""


class Observer(Protocol):
    """Keeps what a run produces (`realflow.observe.recorder.RunFiles`)."""

    def report(self, step: int, call: str, done: DispatchDone) -> None:
        """A rank's report of a dispatch; `step` is -1 for what happens between steps."""

    def step(self, step: int, start: float, end: float, told: Mapping[str, float]) -> dict[str, float]:
        """A step has ended (seconds since the epoch); returns its metrics, those `told` among them."""

    def checkpoint(self, number: int, files: Mapping[str, str], carried: Carried) -> Path:
        """All parts of the checkpoint after `number` steps are written: give it its final name."""

    def close(self) -> None:
        """The run is complete."""

    def failed(self, text: str) -> None:
        """The run has failed."""


class Master:
    """The shell: sockets, clocks and process ids in; the core's instructions out."""

    def __init__(
        self,
        plan: Plan,
        files: Observer,
        emit: Emit,
        *,
        start_step: int = 0,
        costs: Mapping[str, Cost] | None = None,
        cards: Mapping[str, Card] | None = None,
        carried: Carried | None = None,
        started_by_rank_0: bool = False,
    ) -> None:
        """`cards` has the card of every model that moves; `carried` is what the steps before have left."""
        self.plan = plan
        self._slices = Slices(plan, cards or {})
        self._slices.prepare([*planned_edges(plan.graph, plan.calls), *follow_edges(plan.graph, plan.calls)])
        self._outlives_rank_0 = started_by_rank_0
        self.core = Core(plan, start_step=start_step, costs=costs, carried=carried)
        self.files = files
        self.emit = emit
        self.exit_code: int | None = None
        self._hellos: dict[int, Hello] = {}
        self._seen: dict[int, float] = {}
        self._pidfds: dict[int, int] = {}
        self._pongs = 0
        self._context: zmq.Context[Any] = zmq.Context()
        self._poller = zmq.Poller()
        self._started = time.monotonic()
        self._shown = 0.0

    # ---- sockets --------------------------------------------------------------------------------

    def listen(self) -> Rendezvous:
        """Make the keys, bind the socket, and say how workers reach it."""
        public, secret = zmq.curve_keypair()
        worker_public, worker_secret = zmq.curve_keypair()
        self._auth = authenticator(self._context, worker_public.decode())
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_secretkey = secret
        self._socket.curve_publickey = public
        self._socket.linger = 2000
        self._socket.router_mandatory = False
        self._socket.sndhwm = self._socket.rcvhwm = 0
        address = local_address(is_alone(self.plan.cluster))
        port = self._socket.bind_to_random_port(f"tcp://{address}")
        self._poller.register(self._socket, zmq.POLLIN)
        return Rendezvous(
            f"tcp://{address}:{port}",
            public.decode(),
            worker_public.decode(),
            worker_secret.decode(),
            os.getpid(),
            socket.gethostname(),
        )

    def run(self) -> int:
        """Serve until the run has ended; returns the exit code."""
        try:
            code = self._serve()
        except Interrupted as stopped:
            self._halt(str(stopped))
            running = ", ".join(name for name, *_ in self.core.running()) or "start-up"
            self._fail(f"{stopped} during {running}")
            code = 1
        except Exception:  # noqa: BLE001 - the master's edge: workers and people must hear of it
            self._fail(f"the master failed:\n{traceback.format_exc()}")
            self._halt("the master failed")
            code = 1
        self._close()
        return code

    def _serve(self) -> int:
        parent = os.getppid()
        next_tick = 0.0
        while self.exit_code is None:
            ready = dict(self._poller.poll(int(TICK_SECONDS * 1000)))
            if self._socket in ready or any(fd in ready for fd in self._pidfds.values()):
                self._receive()  # what a dead worker still said comes first: it may say why
            for rank, fd in list(self._pidfds.items()):
                if fd in ready:
                    self._poller.unregister(fd)
                    os.close(self._pidfds.pop(rank))
                    self._event(WorkerLost(rank, DIED))
            if self._begun:
                for rank, slices in self._slices.take().items():
                    for part in slices:
                        self._send(To(rank, part))
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK_SECONDS
                self._tick(now)
                if os.getppid() != parent and self.exit_code is None:
                    self._orphaned()
        return self.exit_code

    def _halt(self, reason: str) -> None:
        for rank in self._hellos:
            self._send(To(rank, Halt(True, reason)))

    def _orphaned(self) -> None:
        """The supervisor is gone, or rank 0 that started the master (then its death is what happened)."""
        if 0 in self._pidfds and self._outlives_rank_0:
            return
        self._halt("the supervisor is gone")
        self._fail("the process that started the master is gone")

    def _receive(self) -> None:
        """Take every message that is there."""
        for _ in range(4096):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode(frames[-1])
            except MessageError as error:
                self.emit({"kind": "note", "text": f"dropped a message: {error}"})
                continue
            if frames[0] != rank_identity(getattr(message, "rank", -1)):
                self.emit(
                    {"kind": "note", "text": f"dropped a message of {frames[0]!r} in another rank's name"}
                )
                continue
            self._message(message)
            if self.exit_code is not None:
                return

    def _message(self, message: Any) -> None:
        match message:
            case Beat(rank=rank):
                self._seen[rank] = time.monotonic()
                self._send(To(rank, Pong(self._pongs)))
            case Hello():
                self._hello(message)
            case DispatchDone():
                self._reported(message)
                self._event(message)
            case Failed(refused=False, rank=rank):
                dead = self._first_death(besides=rank)
                self._event(message if dead is None else WorkerLost(dead, DIED))
            case Ready() | SampleReady() | Failed():
                self._event(message)
            case _:
                self.emit(
                    {"kind": "note", "text": f"dropped a {type(message).__name__}, which workers do not send"}
                )

    def _first_death(self, besides: int) -> int | None:
        """Another rank whose process is gone, or will be in a moment: then it is that which made the
        reporting one fail. (A rank that reports its own failure lives on for seconds.)"""
        poller = select.poll()
        ranks = {fd: rank for rank, fd in self._pidfds.items() if rank != besides}
        for fd in ranks:
            poller.register(fd, select.POLLIN)
        ready = poller.poll(DEATH_SECONDS * 1000) if ranks else []
        return ranks[ready[0][0]] if ready else None

    def _hello(self, hello: Hello) -> None:
        self._hellos[hello.rank] = hello
        self._seen[hello.rank] = time.monotonic()
        if hello.host == socket.gethostname():
            try:
                self._pidfds[hello.rank] = os.pidfd_open(hello.pid)
            except OSError:
                self._event(WorkerLost(hello.rank, "died"))
                return
            self._poller.register(self._pidfds[hello.rank], zmq.POLLIN)
        if self._begun:
            # Not before: slices are kept until all are there, and one that is ready would end every wait.
            self._poller.register(self._slices.fd, zmq.POLLIN)
            addresses = {rank: h.address for rank, h in sorted(self._hellos.items())}
            for rank in addresses:
                self._send(To(rank, Begin(addresses)))

    @property
    def _begun(self) -> bool:
        """Whether all workers are there."""
        return len(self._hellos) == self.plan.world_size

    def _send(self, instruction: To) -> None:
        self._socket.send_multipart([rank_identity(instruction.rank), encode(instruction.message)])

    # ---- time -----------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        self._event(Tick())
        for rank, seen in self._seen.items():
            if now - seen > SILENCE_SECONDS and self.exit_code is None:
                self._event(WorkerLost(rank, f"has been silent for {now - seen:.0f} s"))
        if not self._begun and now - self._started > STARTUP_SECONDS:
            missing = sorted(set(range(self.plan.world_size)) - set(self._hellos))
            self._fail(f"start-up: ranks {missing} did not come within {STARTUP_SECONDS:.0f} s")
        if now - self._shown > 0.5:
            self._shown = now
            for name, step, done, total in self.core.running()[:1]:
                self.emit({"kind": "running", "call": name, "step": step, "done": done, "of": total})

    # ---- events and instructions ----------------------------------------------------------------

    def _reported(self, done: DispatchDone) -> None:
        call, _, number = done.dispatch.partition("@")
        step = int(number.split(".")[0]) if number[:1].isdigit() and not call.startswith("save:") else -1
        self.files.report(step, call, done)

    def _event(self, event: Event) -> None:
        if self.exit_code is not None:
            return
        for instruction in self.core.handle(event, time.monotonic()):
            self._carry_out(instruction)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case To():
                self._send(instruction)
            case Prepare(edge=edge):
                self._slices.prepare([edge])
            case StepDone(step=step, started=started, ended=ended, metrics=told):
                since = time.time() - time.monotonic()
                metrics = self.files.step(step, since + started, since + ended, told)
                seconds = metrics["timing_s/step"]
                self.emit({"kind": "step", "step": step, "seconds": seconds, "metrics": metrics})
            case Saved(step=step, files=files, carried=carried):
                path = self.files.checkpoint(step + 1, files, carried)
                self.emit({"kind": "note", "text": f"checkpoint {path}"})
            case Finished():
                self.files.close()
                self.emit({"kind": "end", "text": "done"})
                self.exit_code = 0
            case Abort(text=text, refused=refused):
                self._fail(text, 2 if refused else 1)

    def _fail(self, text: str, code: int = 1) -> None:
        self.files.failed(text)
        self.emit({"kind": "error", "text": text, "code": code})
        self.exit_code = code

    def _close(self) -> None:
        self._slices.close()
        self._socket.close()
        self._auth.stop()
        self._context.term()
        for fd in self._pidfds.values():
            os.close(fd)


def rank_identity(rank: int) -> bytes:
    """The ZeroMQ routing id of a worker."""
    return b"rank-%d" % rank
