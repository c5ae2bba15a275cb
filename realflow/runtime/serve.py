"""What a worker does after it has been let in: make groups, load models, then execute in order."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
import zmq

from realflow.errors import InputError, RealFlowError
from realflow.planfile import Plan
from realflow.planfile.types import TRACK_MEMORY
from realflow.runtime.added import completed
from realflow.runtime.bootstrap import Identity, Mpi, is_alone
from realflow.runtime.connect import local_address
from realflow.runtime.directory import remove_partial
from realflow.runtime.fields import Inputs, make_data, make_examination
from realflow.runtime.functiontasks import FunctionTasks
from realflow.runtime.groups import make_groups
from realflow.runtime.hosts import Hosts
from realflow.runtime.link import STARTUP, MasterLink
from realflow.runtime.messages import Execute, Failed, Free, Halt, Hello, Open, Ready, Reallocate, Save
from realflow.runtime.modeltasks import ModelTasks
from realflow.runtime.store import FieldStore
from realflow.runtime.streams import Streams
from realflow.runtime.tracking import Watch
from realflow.runtime.transport import FieldClient, FieldServer


class Worker:
    """One worker's parts, wired together."""

    def __init__(
        self, plan: Plan, run_dir: Path, identity: Identity, mpi: Mpi, checkpoint: Path | None
    ) -> None:
        self.plan = completed(plan)
        self._checkpoint = checkpoint
        self.run_dir, self.identity, self.rank = run_dir, identity, identity.rank
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._store = FieldStore()
        keys = identity.rendezvous
        self._address = local_address(is_alone(plan.cluster))
        self._server = FieldServer(
            self._store, self._context, keys.worker_public, keys.worker_secret, host=self._address
        )
        self._addresses: dict[int, str] = {}
        self._client = FieldClient(self._context, keys.worker_public, keys.worker_secret, self._addresses)
        self.link = MasterLink(self.rank, keys, self._context)
        if mpi.rank == 0:
            self.link.on_orphaned = partial(remove_partial, run_dir)
        self._mpi = mpi
        self._watch: Watch | None = None
        if plan.extra.get(TRACK_MEMORY):
            self._watch = Watch(self.rank, torch.device(identity.device))
            self.link.on_done = self._watch.reported

    def watching(self) -> AbstractContextManager[None]:
        """What must be entered around all else if the plan asks for the peaks of memory."""
        return self._watch.entered() if self._watch else nullcontext()

    def _during(self, message: Open | Execute | Reallocate | Save) -> AbstractContextManager[None]:
        if self._watch is None:
            return nullcontext()
        others = {Reallocate: "realloc", Save: "checkpoint"}
        what = others[type(message)] if isinstance(message, Reallocate | Save) else message.call
        return self._watch.during(what, message.dispatch)

    def start(self) -> None:
        """Meet the others, make the groups, load the models."""
        started = time.monotonic()
        self.link.start()
        place = self.identity.place
        hello = Hello(self.rank, place.host, os.getpid(), self.identity.device, self._server.address)
        self.link.send(hello)
        self._addresses.update(self.link.begun.get())
        device = torch.device(self.identity.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(_threads(self.identity.local_size))
        self._join(device)
        groups = make_groups(self.plan)
        self.hosts = Hosts(self.plan, self.rank, device, groups, self._checkpoint)
        if self.plan.graph.folder:  # the user's functions import what lies beside the graph, also late;
            sys.path.append(self.plan.graph.folder)  # last, so that it hides nothing
        data = make_data(self.plan, self.hosts)
        examination = make_examination(self.plan, self.hosts)
        self._inputs = Inputs(self.rank, self.plan.graph, self._store, self._client, data, examination)
        self.models = ModelTasks(
            self.plan, self.hosts, device, self._store, self._inputs, data, self.link, self.run_dir
        )
        self.streams = Streams(self.plan, self.rank, self.hosts, self._store, data, self.link, examination)
        self.functions = FunctionTasks(
            self.plan, self.rank, self._store, self._inputs, data, self.link, examination
        )
        self.link.is_function = lambda call: self.plan.graph.call(call).op == "function"
        self.link.on_execute = self._inputs.prefetch
        self.link.on_free = self._free
        self.link.overdue = self.functions.overdue
        self._function_thread = threading.Thread(target=self._serve_functions, name="functions", daemon=True)
        self._function_thread.start()
        self.link.send(Ready(self.rank, time.monotonic() - started))

    def _join(self, device: torch.device) -> None:
        """Join torch.distributed under the plan's ranks; the store's address travels over MPI."""
        size, first = self.identity.world_size, self._mpi.rank == 0
        store = None
        if first:
            store = dist.TCPStore(self._address, 0, size, is_master=True, wait_for_workers=False)
        address = self._mpi.broadcast(f"{self._address} {store.port}" if store else None)
        if store is None:
            host, port = address.split()
            store = dist.TCPStore(host, int(port), size, is_master=False)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=size)

    def _free(self, message: Free) -> None:
        for name in message.fields:
            self._store.free(name, range(message.start, message.stop))

    def run(self) -> None:
        """Execute ordered messages until the run is over."""
        last = 0
        self.link.doing = "waiting for work"
        while True:
            message = self.link.ordered.get()
            if isinstance(message, Halt):
                break
            assert message.order > last, f"order {message.order} came after {last}"
            last = message.order
            self.link.doing = message.dispatch
            with self._during(message):
                self._execute(message)
            self.link.doing = "waiting for work"
        self.link.close()
        self._function_thread.join()
        self._inputs.close()
        self._server.close()
        self._client.close()
        dist.destroy_process_group()

    def _execute(self, message: Open | Execute | Reallocate | Save) -> None:
        match message:
            case Open():
                with self.hosts.using(self.plan.graph.call(message.call)):
                    self.streams.run(message)
            case Execute():
                self.models.execute(message)
            case Reallocate():
                self.models.reallocate(message)
            case Save():
                self.models.save(message)

    def _serve_functions(self) -> None:
        while True:
            message = self.link.functions.get()
            if isinstance(message, Halt):
                return
            try:
                self.functions.execute(message)
            except BaseException as error:  # noqa: BLE001 - a thread's edge: reported, and the job ends
                self.link.fail(failure(self.rank, message.dispatch, error))


def failure(rank: int, dispatch: str, error: BaseException) -> Failed:
    """An exception as a message: our own errors by their text, others with their traceback."""
    if isinstance(error, RealFlowError):
        return Failed(rank, dispatch, str(error), "")
    return Failed(
        rank, dispatch, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
    )


def serve(plan: Plan, run_dir: Path, identity: Identity, mpi: Mpi, checkpoint: Path | None = None) -> None:
    """Be a worker until the run is over. What goes wrong is told to the master before it is raised."""
    transformers.utils.logging.disable_progress_bar()
    worker = Worker(plan, run_dir, identity, mpi, checkpoint)
    try:
        with worker.watching():
            worker.start()
            worker.run()
    except BaseException as error:
        refused = isinstance(error, InputError) and worker.link.doing == STARTUP
        worker.link.fail(replace(failure(identity.rank, worker.link.doing, error), refused=refused))
        raise


def _threads(local_size: int) -> int:
    """Threads for each rank: its share of the cores, at least one."""
    configured = os.environ.get("OMP_NUM_THREADS")
    return int(configured) if configured else max(1, len(os.sched_getaffinity(0)) // local_size)
