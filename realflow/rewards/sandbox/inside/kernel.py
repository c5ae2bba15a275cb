"""Linux calls that Python 3.11 has no name for. Each raises OSError with what it was about."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
NEW_ANY = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | 0x80  # 0x80: time

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18

_DETACH = 2
_PDEATHSIG, _DUMPABLE, _KEEPCAPS, _SECCOMP, _CAPBSET_DROP = 1, 4, 8, 22, 24
_SUBREAPER, _NO_NEW_PRIVS, _AMBIENT = 36, 38, 47
_READ_SEARCH = 2  # CAP_DAC_READ_SEARCH
_MOUNT_SETATTR = 442
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_CAPABILITY_VERSION = 0x20080522
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def syscall(what: str, number: int, *arguments: Any) -> int:
    """A system call by its number; ints and ctypes values are its arguments."""
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = _libc().syscall(ctypes.c_long(number), *given)
    if result < 0:
        raise _error(what)
    return result


def machine() -> str:
    """The processor's name. Raises OSError for one whose system calls are not known here."""
    name = os.uname().machine
    if name not in _PIVOT_ROOT:
        raise OSError(f"its processor, {name}, is not one of {', '.join(_PIVOT_ROOT)}")
    return name


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` for new ones."""
    if _libc().unshare(flags) != 0:
        raise _error("unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    done = _libc().mount(
        source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags),
        options.encode() or None,
    )  # fmt: skip
    if done != 0:
        raise _error(f"mount {target}")


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def make_read_only(target: str, *, below: bool = True) -> None:
    """Make a mount, and all `below` it, read-only, without devices and without set-user-id programs."""
    attributes = _MountAttributes(set=RDONLY | NOSUID | NODEV)
    path = ctypes.c_char_p(target.encode())
    given = ctypes.byref(attributes)
    what = f"mount_setattr {target}"
    size = ctypes.sizeof(attributes)
    syscall(what, _MOUNT_SETATTR, _AT_FDCWD, path, _AT_RECURSIVE if below else 0, given, size)


def pivot(root: str) -> None:
    """Make the mount `root` the root of this process's mount namespace, and let go of the old one."""
    os.chdir(root)
    here = ctypes.c_char_p(b".")
    syscall("pivot_root", _PIVOT_ROOT[machine()], here, here)
    if _libc().umount2(b".", _DETACH) != 0:
        raise _error("umount of the old root")
    os.chdir("/")


def end_with_parent() -> None:
    """Be killed when the process that started this one ends (after a change of user it must be said anew)."""
    _prctl("PR_SET_PDEATHSIG", _PDEATHSIG, 9)  # SIGKILL


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends."""
    _prctl("PR_SET_CHILD_SUBREAPER", _SUBREAPER, 1)


def hide_memory() -> None:
    """Let no process of the same user trace this one or read its memory."""
    _prctl("PR_SET_DUMPABLE", _DUMPABLE, 0)


def no_new_privileges() -> None:
    """No program that this one starts gains anything by being set-user-id."""
    _prctl("PR_SET_NO_NEW_PRIVS", _NO_NEW_PRIVS, 1)


def bound_capabilities(*, reading: bool = False) -> None:
    """Empty the bounding set: no program started from here can have a capability, whatever its user (but for
    the one that `become` keeps with `reading`)."""
    for capability in range(64):
        if reading and capability == _READ_SEARCH:
            continue
        if _libc().prctl(_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            return  # the last one was before it; or this process has none to give up


def become(user: int, *, reading: bool = False) -> None:
    """Become another user, for good. `reading` keeps the right to read what that user could not (and it goes
    on to the program that is started): for one who has given up all files but a few by other means."""
    if reading:
        _prctl("PR_SET_KEEPCAPS", _KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if reading:
        _set_capabilities(1 << _READ_SEARCH)
        if _libc().prctl(_AMBIENT, 2, _READ_SEARCH, 0, 0) != 0:  # 2: raise
            raise _error("PR_CAP_AMBIENT_RAISE")


def may_read_all() -> bool:
    """Whether this process may read files whoever owns them (and so can pass that on)."""
    with open("/proc/self/status", encoding="ascii") as file:
        (held,) = (line.split()[1] for line in file if line.startswith("CapPrm:"))
    return bool(int(held, 16) >> _READ_SEARCH & 1)


def drop_capabilities() -> None:
    """Give up all capabilities."""
    _libc().prctl(_AMBIENT, 4, 0, 0, 0)  # 4: clear all
    _set_capabilities(0)


def _set_capabilities(low: int) -> None:
    """Have the capabilities of the bits `low` (those below 32), effective, permitted and inheritable."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)(low, low, low, 0, 0, 0)
    syscall("capset", _CAPSET[machine()], ctypes.byref(header), ctypes.byref(sets))


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filters", ctypes.c_void_p)]


def filter_calls(program: bytes) -> None:
    """Install a seccomp filter: `program` is an array of struct sock_filter."""
    held = ctypes.create_string_buffer(program, len(program))
    given = _Program(length=len(program) // 8, filters=ctypes.cast(held, ctypes.c_void_p))
    if _libc().prctl(_SECCOMP, 2, ctypes.byref(given), 0, 0) != 0:
        raise _error("PR_SET_SECCOMP")


def _prctl(what: str, option: int, value: int) -> None:
    if _libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise _error(what)


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
