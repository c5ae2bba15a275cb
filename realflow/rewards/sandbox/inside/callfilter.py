"""The system calls that a contained program may not make, as a seccomp filter (classic BPF).

All others are allowed: what a program may reach is decided by the namespaces or by Landlock, and this takes
away what these do not see (sockets that are not TCP, tracing, other users' processes, kernel interfaces with
a history). Numbers are those of x86_64 and of the generic table that aarch64 has.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping

from .kernel import NEW_ANY

# name -> (x86_64, aarch64); None where the processor has no such call
_BOTH: Mapping[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    "socket": (41, 198), "unshare": (272, 97), "setns": (308, 268),
    "io_uring_setup": (425, 425), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "open_tree_attr": (467, 467), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "reboot": (169, 142), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "uselib": (134, None), "seccomp": (317, 277),
    "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143),
    "setresuid": (117, 147), "setresgid": (119, 149), "setfsuid": (122, 151), "setfsgid": (123, 152),
    "setgroups": (116, 159), "capset": (126, 91),
}  # fmt: skip

# Where the file system and the processes of the machine are in view (Landlock), what Landlock lets through.
_OPEN: Mapping[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "inotify_init": (253, None), "inotify_init1": (294, 26),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
}  # fmt: skip

_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_FCNTL = {"x86_64": 72, "aarch64": 25}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_OWNERS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals by way of a file
_IOCTLS = (0x8901, 0x8902, 0x5412, 0x541C)  # FIOSETOWN, SIOCSPGRP, TIOCSTI, TIOCLINUX

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16


def program(machine: str, *, closed: bool) -> bytes:
    """The filter for a processor. `closed`: the file system and the processes in view are the program's own
    (namespaces), so that it may signal them and change modes of files."""
    which = 0 if machine == "x86_64" else 1
    denied = dict(_BOTH) if closed else {**_BOTH, **_OPEN}
    lines = [
        _line(_LOAD, _ARCH),
        _line(_EQUAL, _ARCHITECTURE[machine], 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":  # the same calls by other numbers (x32)
        lines += [_line(_AT_LEAST, 0x40000000, 0, 1), _line(_RETURN, _KILL)]
    for numbers in denied.values():
        if (number := numbers[which]) is not None:
            lines += [_line(_EQUAL, number, 0, 1), _line(_RETURN, _ERRNO | errno.EPERM)]
    lines += [_line(_EQUAL, _CLONE3, 0, 1), _line(_RETURN, _ERRNO | errno.ENOSYS)]  # libc then calls clone
    lines += _on_argument(_CLONE[machine], 0, [_line(_ANY_BIT, NEW_ANY & ~0x80, 0, 1), _denied()])
    lines += _on_argument(_PRLIMIT[machine], 0, [_line(_EQUAL, 0, 1, 0), _denied()])  # 0: this process
    for call, values in ((_FCNTL[machine], _OWNERS), (_IOCTL[machine], _IOCTLS)):
        checks = [line for value in values for line in (_line(_EQUAL, value, 0, 1), _denied())]
        lines += _on_argument(call, 1, checks)
    return b"".join([*lines, _line(_RETURN, _ALLOW)])


def _on_argument(call: int, argument: int, checks: list[bytes]) -> list[bytes]:
    """Lines that look at the low half of an argument of one call, and allow it unless `checks` deny it."""
    body = [_line(_LOAD, _ARGUMENTS + 8 * argument), *checks, _line(_RETURN, _ALLOW)]
    return [_line(_EQUAL, call, 0, len(body)), *body]


def _denied() -> bytes:
    return _line(_RETURN, _ERRNO | errno.EPERM)


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
