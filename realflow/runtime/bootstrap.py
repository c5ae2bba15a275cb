"""From an MPI rank to a worker: find the master, agree on ranks and devices, make the groups.

MPI does only this: it carries the rendezvous and the torch store's address, in buffer calls (the
lower-case methods of mpi4py pickle). Under a bare mpirun rank 0 starts the master, before MPI is
initialised and in a session of its own, so that it outlives a killed job long enough to say why.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from realflow.errors import InputError, RunError
from realflow.planfile import Cluster
from realflow.planfile.kinds import runtime_kind
from realflow.runtime.connect import Rendezvous

RENDEZVOUS = "REALFLOW_RENDEZVOUS"
"""Environment variable with the path of the rendezvous file that the supervisor wrote for rank 0."""


@dataclass(frozen=True)
class Place:
    """Where an MPI rank runs."""

    host: str
    local_index: int


@dataclass(frozen=True)
class Identity:
    """A worker's place in the plan. `rank` is the plan's, which need not be MPI's."""

    rank: int
    world_size: int
    place: Place
    local_size: int
    device: str
    rendezvous: Rendezvous


REFUSED = "refused "
"""What the handshake begins with where the master refuses its input; a JSON text follows."""


def is_alone(cluster: Cluster) -> bool:
    """Whether the plan is for whatever single machine it starts on."""
    return len(cluster.nodes) == 1 and cluster.nodes[0].name == "local"


def bind(cluster: Cluster, places: Sequence[Place]) -> list[int]:
    """The plan's rank of each MPI rank, one to one.

    A plan's node `local` stands for the one host that all ranks run on; other nodes are host names
    (short or full). Raises InputError where hosts, counts or indices do not fit.
    """
    devices = cluster.devices
    if len(places) != len(devices):
        raise InputError(
            f"the plan is for {len(devices)} devices, but mpirun started {len(places)} ranks; "
            f"start it with -n {len(devices)} and the mpirun that mpi4py was made for"
        )
    hosts = {place.host for place in places}
    alone = is_alone(cluster)
    if alone and len(hosts) > 1:
        raise InputError(f"the plan is for one machine, but the ranks run on {sorted(hosts)}")
    ranks: list[int] = []
    for place in places:
        names = [cluster.nodes[0].name] if alone else [place.host, place.host.split(".")[0]]
        found = [
            devices.index(f"{name}:{place.local_index}")
            for name in names
            if f"{name}:{place.local_index}" in devices
        ]
        if not found:
            raise InputError(
                f"a rank runs as number {place.local_index} on {place.host}, where the plan has no device; "
                f"it has {', '.join(devices[:8])}{' ...' if len(devices) > 8 else ''}"
            )
        ranks.append(found[0])
    if len(set(ranks)) != len(ranks):
        raise InputError(f"two ranks claim one device: {ranks}")
    return ranks


@dataclass(frozen=True)
class MasterProcess:
    """A master that listens. `events` is what it tells, one JSON object a line (None: it tells a
    person, on its stdout)."""

    process: subprocess.Popen[bytes]
    rendezvous: Rendezvous
    events: IO[str] | None


def start_master(run_dir: Path, *, events: bool, start_step: int = 0, **popen: Any) -> MasterProcess:
    """Start the master's process and read where it listens.

    Events have a pipe of their own: what a user's module prints must not get between them. Raises
    InputError where the master refuses its input, RunError if it ends before it listens.
    """
    read, write = os.pipe()
    inherited, told = [write], None
    command = [sys.executable, "-m", "realflow.launch.master", str(run_dir), "--handshake", str(write)]
    command += ["--start-step", str(start_step)]
    if events:
        readable, writable = os.pipe()
        inherited.append(writable)
        command += ["--events", str(writable)]
        told = os.fdopen(readable, encoding="utf-8")
    process = subprocess.Popen(command, pass_fds=inherited, start_new_session=True, **popen)
    for descriptor in inherited:
        os.close(descriptor)
    with os.fdopen(read, encoding="utf-8") as stream:
        line = stream.readline()
    if line.startswith(REFUSED):
        process.wait()
        raise InputError(json.loads(line.removeprefix(REFUSED)))
    if not line:
        raise RunError(f"the master {how_it_ended(process.wait())} during start-up, before it listened")
    return MasterProcess(process, Rendezvous.from_json(line), told)


def how_it_ended(code: int) -> str:
    """A process's return code in words: `was killed by signal 9 (SIGKILL)`, `ended with code 3`."""
    if code < 0:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"ended with code {code}"


class Mpi:
    """The few collective calls of the start, on buffers."""

    def __init__(self) -> None:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        self._mpi = MPI
        MPI.Init_thread(MPI.THREAD_FUNNELED)
        self._world = MPI.COMM_WORLD
        self.rank = self._world.Get_rank()
        self.size = self._world.Get_size()
        node = self._world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_index, self.local_size = node.Get_rank(), node.Get_size()
        node.Free()

    def broadcast(self, text: str | None) -> str:
        """Rank 0's text, on every rank."""
        data = bytearray((text or "").encode())
        size = bytearray(len(data).to_bytes(8, "little"))
        self._world.Bcast([size, self._mpi.BYTE], root=0)
        if self.rank:
            data = bytearray(int.from_bytes(size, "little"))
        self._world.Bcast([data, self._mpi.BYTE], root=0)
        return data.decode()

    def all_gather(self, text: str) -> list[str]:
        """Every rank's text (at most 1 KiB), by MPI rank."""
        mine = bytearray(text.encode().ljust(1024))
        if len(mine) > 1024:
            raise RunError(f"a host reports a description of {len(mine)} bytes; at most 1,024 were expected")
        everyone = bytearray(1024 * self.size)
        self._world.Allgather([mine, self._mpi.BYTE], [everyone, self._mpi.BYTE])
        return [everyone[i : i + 1024].decode().rstrip() for i in range(0, len(everyone), 1024)]

    def abort(self) -> None:
        """End the whole job."""
        self._world.Abort(1)

    def finalize(self) -> None:
        """Leave MPI in order."""
        self._mpi.Finalize()


def under_mpi() -> bool:
    """Whether this process was started by mpirun or srun."""
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"))


def is_first() -> bool:
    """Whether this process is MPI's rank 0, told before MPI is initialised."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"):
        if name in os.environ:
            return os.environ[name] == "0"
    return False


@dataclass(frozen=True)
class Start:
    """What MPI's rank 0 brings: where the master is, or why there is none. `stop` ends the master
    again, where this process started it."""

    rendezvous: Rendezvous | None = None
    refusal: str = ""
    stop: Callable[[], None] = lambda: None


def meet(cluster: Cluster, mpi: Mpi, start: Start) -> Identity:
    """Hand out the rendezvous and agree which plan rank each MPI rank is.

    Raises InputError, on all ranks alike, where rank 0 refuses or plan and ranks do not fit.
    """
    refusal = mpi.broadcast(start.refusal)
    if refusal:
        raise InputError(refusal)
    shared = Rendezvous.from_json(mpi.broadcast(start.rendezvous.to_json() if start.rendezvous else None))
    place = Place(socket.gethostname(), mpi.local_index)
    told = mpi.all_gather(json.dumps(asdict(place)))
    rank = bind(cluster, [Place(**json.loads(text)) for text in told])[mpi.rank]
    kind = next(node.kind for node in cluster.nodes if cluster.devices[rank].startswith(f"{node.name}:"))
    device = "cpu" if runtime_kind(kind) == "cpu" else f"cuda:{place.local_index}"
    return Identity(rank, mpi.size, place, mpi.local_size, device, shared)
