"""What the jail is told: one program to run, and within which walls. It comes as JSON through a file.

The harness starts with every program, so its modules import little: a NamedTuple here, no dataclass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

Way = Literal["namespaces", "landlock"]
WAYS: tuple[Way, ...] = ("namespaces", "landlock")

NOBODY = 65534
FIRST_USER, USERS = 61184, 4096  # ids that are kept for users who come and go
HOME = "/box"
"""The scratch folder, as a program in namespaces sees it."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class Job(NamedTuple):
    """`argv` is run with `env` in the folder `scratch` (in namespaces that becomes `/box`), which holds
    `files` (name -> text). In view are `read_only` folders and files, and `links` (name -> target). `keep`
    are descriptors that it is given beside 0, 1 and 2. `user` is the user's id that it runs as (None: that
    of who started it). Limits: `seconds` of the wall clock; bytes of `memory`, of `disk`; `entries` files;
    `processes` and threads.
    """

    way: Way
    argv: tuple[str, ...]
    env: Mapping[str, str]
    scratch: str
    read_only: tuple[str, ...]
    links: Mapping[str, str]
    files: Mapping[str, str]
    keep: tuple[int, ...]
    seconds: float
    memory: int
    disk: int
    entries: int
    processes: int
    user: int | None

    def to_json(self) -> str:
        """As one line of JSON."""
        return json.dumps(self._asdict())

    @classmethod
    def read(cls, file: int) -> Job:
        """The job that a descriptor holds."""
        with os.fdopen(file, "rb") as opened:
            found = json.load(opened)
        for name in ("argv", "read_only", "keep"):
            found[name] = tuple(found[name])
        return cls(**found)
