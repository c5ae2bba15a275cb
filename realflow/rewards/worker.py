"""A worker of a pool: `python -m realflow.rewards.worker FUNCTION SECONDS MEGABYTES SETUP`.

It reads JSON lines, each the arguments of one call, and writes one line for each: `{"value": ..}` or
`{"error": ".."}`. What the function itself prints goes to stderr. It ends when its input does. While
it works, a timer of the kernel runs that ends it even if no one is left to do so, and even within C code.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

GRACE_SECONDS = 2.0
"""How much later than the pool's own limit the kernel's timer ends a worker."""


def serve(function: Callable[..., Any], lines: Any, answers: Any, seconds: float) -> None:
    """Answer each line until there are no more. An error of the function is its answer."""
    for line in lines:
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)
        try:
            answer = json.dumps({"value": function(*json.loads(line))}, allow_nan=False)
        except Exception as error:  # noqa: BLE001 (the edge of a process: it becomes the item's answer)
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]})
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(answer + "\n")
        answers.flush()


def _named(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def main() -> None:
    """Take the pipes for lines of JSON, import the function, say that it is ready, and serve."""
    name, seconds, megabytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pool ends it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        function = _named(name)
        if sys.argv[4]:
            _named(sys.argv[4])()
    except Exception as error:  # noqa: BLE001 (the edge of a process: told to the pool, which raises it)
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        answers.flush()
        return
    if sys.platform == "linux":  # elsewhere the limit cannot be set
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    answers.write(json.dumps({"value": "ready"}) + "\n")
    answers.flush()
    serve(function, sys.stdin, answers, seconds)


if __name__ == "__main__":
    main()
