"""CURVE keys of a run and the sockets that use them.

Each run makes two key pairs: the master's and one that its workers share. Workers get them over
MPI; a peer that does not hold the workers' key is refused in the handshake.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from realflow.errors import InputError


@dataclass(frozen=True)
class Rendezvous:
    """What a worker needs to find the master and to be let in."""

    address: str
    master_public: str
    worker_public: str
    worker_secret: str
    pid: int
    """The master's process id, on the host of `address`."""
    host: str

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Rendezvous:
        """Read `to_json`. Raises ValueError for anything else."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("rendezvous: expected a JSON object")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"rendezvous: {error}") from None


class _OnlyKey:
    """Accepts one public key; see zmq.auth's credentials provider."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the peer's key is the run's."""
        return key == self._public


def authenticator(context: zmq.Context[Any], worker_public: str) -> ThreadAuthenticator:
    """Start the thread that lets only holders of the workers' key in (all servers of `context`)."""
    auth = ThreadAuthenticator(context)
    auth.start()
    auth.configure_curve_callback("*", credentials_provider=_OnlyKey(worker_public.encode()))
    return auth


def local_address(alone: bool) -> str:
    """The address at which this process listens: loopback where all processes run on this machine
    (`alone`), else that of its host name, or REALFLOW_ADDRESS where that is set.

    Raises InputError where the host name stands for loopback, which other machines cannot reach.
    """
    if alone:
        return "127.0.0.1"
    name = socket.gethostname()
    address = os.environ.get("REALFLOW_ADDRESS") or _resolve(name)
    if address.startswith("127."):
        raise InputError(
            f"this machine's name {name} stands for {address}, which other machines cannot reach; set "
            "REALFLOW_ADDRESS to the address that they can reach it at"
        )
    return address


def _resolve(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise InputError(
            f"this machine's name {name} has no address ({error}); set REALFLOW_ADDRESS"
        ) from None
