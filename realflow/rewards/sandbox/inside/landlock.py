"""Landlock (Linux 5.13 and later): a process gives up the file system but for a few folders, and TCP.

It asks no privilege. Versions differ in what they can forbid; what a kernel has is asked for first.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from .kernel import syscall

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_TCP = 0b11  # bind and connect
_SCOPES = 0b11  # abstract unix sockets, signals

LEAST = 3
"""The version of Landlock that can forbid to truncate files (Linux 6.2)."""


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "net", "scoped")]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def version() -> int:
    """The kernel's version of Landlock. Raises OSError where it has none, or it is turned off."""
    return syscall("Landlock", _CREATE, 0, 0, 1)


def restrict(read_only: Sequence[str], devices: Sequence[str], scratch: str) -> None:
    """Leave this process `read_only` (files and folders), `devices` to read and write, and `scratch`.

    Raises OSError where the kernel's Landlock is older than `LEAST`.
    """
    has = version()
    if has < LEAST:
        raise OSError(f"Landlock version {has}; expected {LEAST} or later")
    files = (1 << 13) - 1 | _REFER | _TRUNCATE | (_IOCTL_DEV if has >= 5 else 0)
    rules = _Ruleset(files=files, net=_TCP if has >= 4 else 0, scoped=_SCOPES if has >= 6 else 0)
    size = 8 * (1 + (has >= 4) + (has >= 6))
    ruleset = syscall("landlock_create_ruleset", _CREATE, ctypes.byref(rules), size, 0)
    try:
        for path in read_only:
            _allow(ruleset, path, _READ)
        for path in devices:
            _allow(ruleset, path, _READ_FILE | _WRITE_FILE)
        _allow(ruleset, scratch, files & ~(_MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK | _IOCTL_DEV))
        syscall("landlock_restrict_self", _RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rule = _PathBeneath(allowed=rights if os.path.isdir(path) else rights & _OF_FILES, folder=folder)
        syscall(f"landlock_add_rule {path}", _ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(folder)
