"""A world of one's own: user, processes, network, messages and file system apart from the machine's."""

from __future__ import annotations

import os

from . import kernel
from .job import DEVICES, HOME, Job

_OTHERS = kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS


def leave(user: int | None) -> None:
    """Give this process new namespaces of users, network and messages, and its children one of processes.

    `user` (for root alone) is a second user id that is to exist in there; without it only that of the
    process does. Raises OSError where the machine does not allow it.
    """
    if user is None:
        own, group = os.geteuid(), os.getegid()
        kernel.unshare(kernel.NEWUSER | _OTHERS)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{own} {own} 1")
        write("/proc/self/gid_map", f"{group} {group} 1")
        return
    ready, said = os.pipe()
    mapper = os.fork()
    if mapper == 0:  # two ids can only be mapped from outside
        os._exit(_map_from_outside(ready, said, os.getppid(), user))
    os.close(ready)
    kernel.unshare(kernel.NEWUSER | _OTHERS)
    os.write(said, b"1")
    os.close(said)
    if os.waitpid(mapper, 0)[1] != 0:
        raise OSError(f"user {user} cannot be mapped into a user namespace")


def _map_from_outside(ready: int, said: int, process: int, user: int) -> int:
    os.close(said)
    if os.read(ready, 1) != b"1":
        return 1
    try:
        for kind in ("uid", "gid"):
            write(f"/proc/{process}/{kind}_map", f"0 0 1\n{user} {user} 1\n")
    except OSError:
        return 1
    return 0


def build(job: Job) -> None:
    """Make a root of what the job may see, and move into it. For the first process of the namespace."""
    kernel.unshare(kernel.NEWNS)
    kernel.mount("none", "/", None, kernel.RECURSIVE | kernel.PRIVATE)
    root = job.scratch
    kernel.mount("root", root, "tmpfs", kernel.NOSUID, "size=1m,nr_inodes=4k,mode=755")
    for path in job.read_only:
        _show(path, root, writable=False)
    for path in DEVICES:
        if os.path.exists(path):
            _show(path, root, writable=True)
    for name, target in job.links.items():
        os.symlink(target, root + name)
    home = root + HOME
    os.makedirs(home, exist_ok=True)
    options = f"size={job.disk},nr_inodes={job.entries},mode=1777"
    kernel.mount("scratch", home, "tmpfs", kernel.NOSUID | kernel.NODEV, options)
    write_files(job, home)
    kernel.pivot(root)
    kernel.make_read_only("/", below=False)


def write_files(job: Job, folder: str) -> None:
    """Write the job's files, for all to read."""
    for name, text in job.files.items():
        write(f"{folder}/{name}", text)
        os.chmod(f"{folder}/{name}", 0o644)


def write(path: str, text: str) -> None:
    """Write a file."""
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(text)


def _show(path: str, root: str, *, writable: bool) -> None:
    """Bind a file or folder of the machine at the same place below `root`."""
    target = root + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        write(target, "")
    kernel.mount(path, target, None, kernel.BIND | kernel.RECURSIVE)
    if not writable:
        kernel.make_read_only(target)
