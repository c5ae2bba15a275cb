"""Watching a tree of processes: how long it runs, what it holds, and that all of it ends."""

from __future__ import annotations

import os
import select
import signal
import time

from .job import Job

_EVERY = 0.05
_OWN = 1  # the first process of the namespace, where there is one
_PAGE = os.sysconf("SC_PAGE_SIZE")


def watch(process: int, job: Job, lifeline: int) -> str:
    """Wait for a process to end, or for a reason to end it: `exit`, `seconds`, `memory`, `disk`, `processes`,
    or `stopped` (whoever holds the other end of the pipe `lifeline` closed it, or is dead)."""
    deadline = time.monotonic() + job.seconds
    ended = os.pidfd_open(process)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(lifeline, select.POLLIN | select.POLLHUP)
    while True:
        left = deadline - time.monotonic()
        ready = dict(poll.poll(max(0.0, min(left, _EVERY)) * 1000))
        if ended in ready:
            return "exit"
        if lifeline in ready:
            return "stopped"
        if left <= 0:
            return "seconds"
        threads, held = holdings()
        if held > job.memory:
            return "memory"
        if threads > job.processes + _OWN:
            return "processes"
        if job.way == "landlock" and not _within(job.scratch, job.disk, job.entries):
            return "disk"  # in namespaces the file system itself is of that size


def descendants() -> list[int]:
    """The processes that stem from this one and still are (zombies among them).

    Raises OSError on a kernel that does not list children (CONFIG_PROC_CHILDREN).
    """
    found, left = [], _children(os.getpid(), must=True)
    while left:
        process = left.pop()
        found.append(process)
        left += _children(process)
    return found


def holdings() -> tuple[int, int]:
    """Threads of all descendants together, and bytes of memory that they hold."""
    threads = total = 0
    for process in descendants():
        try:
            with open(f"/proc/{process}/statm", "rb") as file:
                total += int(file.read().split()[1]) * _PAGE
            threads += len(os.listdir(f"/proc/{process}/task"))
        except (OSError, IndexError):  # it has ended
            continue
    return threads, total


def threads_of(user: int) -> int:
    """Threads of a user on the whole machine, which the kernel counts against its limit of processes."""
    found = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{process}").st_uid == user:
                found += len(os.listdir(f"/proc/{process}/task"))
        except OSError:  # it has ended
            continue
    return found


def end_all() -> None:
    """Kill every descendant, and wait until none is left. This process must adopt orphans."""
    while True:
        for process in descendants():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _children(process: int, *, must: bool = False) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        if must:
            raise
    return found


def _within(folder: str, size: int, entries: int) -> bool:
    """Whether a folder holds no more than `size` bytes in `entries` files. It looks at no more than these."""
    left = [folder]
    while left:
        try:
            with os.scandir(left.pop()) as found:
                for entry in found:
                    entries -= 1
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    size -= entry.stat(follow_symlinks=False).st_blocks * 512
                    if size < 0 or entries < 0:
                        return False
        except OSError:  # it was removed while this looked
            continue
    return True
