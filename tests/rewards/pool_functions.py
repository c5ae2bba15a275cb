"""Functions that workers of a pool run in tests: they hang, die, print and raise."""

from __future__ import annotations

import os
import signal
import sys
import time


def act(what, value=None):
    """Do what a test asks of a worker."""
    if what == "print":
        print("noise on stdout")
        os.write(1, b"more noise\n")
    elif what == "sleep":
        time.sleep(value)
    elif what == "loop":
        while True:
            pass
    elif what == "native loop":  # holds the interpreter's lock for minutes
        return len(str(7 ** (10**9)))
    elif what == "raise":
        raise ValueError(value)
    elif what == "exit":
        os._exit(value)
    elif what == "sys.exit":
        sys.exit(value)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "memory":
        return len(bytearray(value << 20))
    elif what == "pid":
        return os.getpid()
    elif what == "deep":
        return act("deep", value) + 1
    return value


_TIMES = []


def set_up():
    """Takes longer than the limit for an item."""
    time.sleep(1.2)
    _TIMES.append(1)


def times_set_up():
    """How often this worker was set up."""
    return len(_TIMES)
