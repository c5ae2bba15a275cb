"""Programs that try to get out, to use up the machine, or to pass tests that they do not solve.

Each is run behind both kinds of walls that the machine has. A victim outside stays as it was, and no process
or folder is left behind.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from walls import walls_of

from realflow.rewards.sandbox import Limits, run_program, run_tests
from realflow.rewards.sandbox.view import view

LIMITS = Limits(seconds=1.0, memory=256 << 20, disk=8 << 20, files=100, output=1 << 16, processes=16)
ROOMY = Limits(seconds=5.0, memory=256 << 20, disk=8 << 20, files=100, output=1 << 16, processes=16)


HOME_FOLDER = os.path.expanduser("~")


def seen(path: str) -> bool:
    """Whether the interpreter or its libraries lie there: the way to them has a name inside too."""
    return any(f"{shown}/".startswith(f"{path}/") for shown in view().read_only)


@dataclass(frozen=True)
class Victim:
    """What is outside: a file that all may read and write, a process, and two listening sockets."""

    folder: Path
    process: subprocess.Popen[bytes]
    port: int
    abstract: str

    def names(self) -> dict[str, object]:
        return {
            "SECRET": str(self.folder / "secret"),
            "FOLDER": str(self.folder),
            "VICTIM": self.process.pid,
            "PARENT": os.getpid(),
            "PORT": self.port,
            "ABSTRACT": self.abstract,
            "HOME_FOLDER": HOME_FOLDER,
            "HIDDEN": [name for name in os.listdir(HOME_FOLDER) if not seen(f"{HOME_FOLDER}/{name}")],
        }


@pytest.fixture(scope="module", autouse=True)
def boxes():
    """A folder that the sandboxes of these tests have for themselves; it must end empty."""
    kept, made = tempfile.tempdir, Path(tempfile.mkdtemp(prefix="realflow-attacks-"))
    made.chmod(0o755)
    tempfile.tempdir = str(made)
    yield made
    tempfile.tempdir = kept
    made.rmdir()


@pytest.fixture(scope="module")
def victim(boxes):
    folder = Path(tempfile.mkdtemp(prefix="realflow-outside-", dir=boxes.parent))
    folder.chmod(0o777)
    (folder / "secret").write_text("SECRETWORD")
    (folder / "secret").chmod(0o666)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as local:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        abstract = f"realflow-test-{os.getpid()}"
        local.bind(f"\0{abstract}")
        local.listen()
        os.environ["REALFLOW_TEST_SECRET"] = "SECRETWORD"
        yield Victim(folder, process, listener.getsockname()[1], abstract)
        del os.environ["REALFLOW_TEST_SECRET"]
    process.kill()
    process.wait()
    shutil.rmtree(folder)


@pytest.fixture
def untouched(victim, boxes):
    """Checks, after an attack, that nothing outside has changed and nothing of it is left."""
    limits = os.sched_getaffinity(victim.process.pid)
    yield
    assert sorted(os.listdir(victim.folder)) == ["secret"]
    assert (victim.folder / "secret").read_text() == "SECRETWORD"
    assert (victim.folder / "secret").stat().st_mode & 0o777 == 0o666
    assert victim.process.poll() is None
    assert os.sched_getaffinity(victim.process.pid) == limits
    assert not list(boxes.iterdir())
    assert not left(boxes)


def left(boxes: Path) -> list[str]:
    """Processes that attacks have left: below this one, or anywhere in a sandbox's folder."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            line = Path(f"/proc/{name}/cmdline").read_text()
            ours = int(fields[1]) == os.getpid() and "inside.jail" in line
            if ours or os.readlink(f"/proc/{name}/cwd").startswith(str(boxes)):
                found.append(line)
        except OSError:  # it has ended
            continue
    return found


# Each prints ESCAPED where it got what it wanted, SECRETWORD where it read it; or must be ended by a limit.
TRY = """
import ctypes, os, resource, signal, socket, subprocess, sys, threading, time
def attempt(work):
    try:
        found = work()
    except (OSError, ImportError, ValueError, IndexError, subprocess.SubprocessError) as error:
        print("refused", type(error).__name__)
    else:
        print("ESCAPED", found)
"""
REFUSED = {
    "the home folder": (
        "attempt(lambda: [name for name in os.listdir(HOME_FOLDER) if name in HIDDEN][0])\n"
        "attempt(lambda: [open(os.path.join(HOME_FOLDER, name)) for name in HIDDEN if name[0] == '.'][0])"
    ),
    "passwords": "attempt(lambda: open('/etc/shadow').read())",
    "another process's environment": (
        "attempt(lambda: b'SECRETWORD' in open(f'/proc/{PARENT}/environ', 'rb').read() and 'read')"
    ),
    "writing outside": (
        "attempt(lambda: open(SECRET, 'w'))\n"
        "attempt(lambda: open(FOLDER + '/new', 'w'))\nattempt(lambda: os.mkdir(FOLDER + '/new'))\n"
        "attempt(lambda: os.remove(SECRET))\nattempt(lambda: os.truncate(SECRET, 0))\n"
        "attempt(lambda: os.chmod(SECRET, 0))\nattempt(lambda: os.utime(SECRET, (0, 0)))\n"
        "attempt(lambda: open(os.__file__, 'a'))"
    ),
    "a symbolic link": "os.symlink(SECRET, 'link')\nattempt(lambda: open('link').read())\n"
    "attempt(lambda: open('link', 'w'))",
    "a hard link": "attempt(lambda: os.link(SECRET, 'link'))",
    "the folders above": "attempt(lambda: open('../' * 20 + SECRET).read())\n"
    "attempt(lambda: os.rename('program.py', FOLDER + '/new'))",
    "a tcp socket": "attempt(lambda: socket.create_connection(('127.0.0.1', PORT), 1))",
    "a listening socket": "attempt(lambda: socket.create_server(('127.0.0.1', 0)))",
    "a udp socket": (
        "attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53)))"
    ),
    "a unix socket": "attempt(lambda: socket.socket(socket.AF_UNIX).connect('/run/docker.sock'))",
    "an abstract socket": "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT))",
    "a name on the network": "attempt(lambda: socket.gethostbyname('example.org'))",
    "signals": (
        "for pid in (PARENT, VICTIM):\n"
        "    attempt(lambda: os.kill(pid, 0))\n    attempt(lambda: os.kill(pid, signal.SIGKILL))"
    ),
    "signals to the jail": (
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print('ESCAPED' if libc.kill(os.getppid(), 9) == 0 and os.getppid() > 1 else 'refused')"
    ),
    "tracing": (
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for pid in (PARENT, VICTIM, os.getppid(), 1):\n"
        "    print('ESCAPED' if libc.ptrace(16, pid, None, None) == 0 else 'refused')"
    ),
    "memory of others": (
        "attempt(lambda: open(f'/proc/{PARENT}/mem', 'rb'))\nattempt(lambda: open('/proc/1/mem', 'rb'))"
    ),
    "memory of its own by a file": "attempt(lambda: open('/proc/self/mem', 'r+b'))",
    "another user": "if os.getuid() != 0: attempt(lambda: os.setuid(0))\nattempt(lambda: os.setgroups([0]))\n"
    "attempt(lambda: os.seteuid(os.getuid() + 1))",
    "a mount": (
        "libc = ctypes.CDLL(None, use_errno=True)\nos.mkdir('m')\n"
        "print('ESCAPED' if libc.mount(b'x', b'm', b'tmpfs', 0, None) == 0 else 'refused')\n"
        "print('ESCAPED' if libc.umount2(b'/box', 2) == 0 else 'refused')"
    ),
    "a root of its own": "attempt(lambda: os.chroot('.'))",
    "namespaces of its own": (
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print('ESCAPED' if libc.unshare(0x10000000) == 0 else 'refused')\n"
        "number = 56 if os.uname().machine == 'x86_64' else 220\n"
        "print('ESCAPED' if libc.syscall(number, 0x10000000 | 17, 0, 0, 0, 0) > 0 else 'refused')"
    ),
    "a restart of the machine": (
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print('ESCAPED' if libc.reboot(0x89ABCDEF) == 0 else 'refused')"
    ),
    "higher limits": (
        "for name in ('AS', 'NPROC', 'FSIZE', 'CPU', 'NOFILE'):\n"
        "    kind = getattr(resource, 'RLIMIT_' + name)\n"
        "    attempt(lambda: resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))\n"
        "attempt(lambda: resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (0, 0)))"
    ),
    "a program of the machine": (
        "attempt(lambda: subprocess.run(['/bin/sh', '-c', 'cat ' + SECRET], check=True))"
    ),
    "devices": "attempt(lambda: os.mknod('disk', 0o60600, os.makedev(8, 0)))\n"
    "attempt(lambda: open('/dev/kmsg'))\nattempt(lambda: open('/dev/vda', 'rb'))\n"
    "attempt(lambda: open('/dev/tty', 'w'))",
    "descriptors of the jail": (
        "print('refused unless it is said otherwise')\n"
        "for number in range(3, 200):\n"
        '    try: os.write(number, b\'{"reason": "exit", "status": 0}\')\n'
        "    except OSError: pass\n    else: print('ESCAPED', number)"
    ),
    "the environment": "print('ESCAPED' if 'REALFLOW_TEST_SECRET' in os.environ else 'refused')",
}


WAYS = ("namespaces", "landlock")


@pytest.fixture(scope="module", params=WAYS)
def said(request, victim):
    """What each attack printed: all of them are tried by one program."""
    walls = walls_of(request.param)
    parts = [f"print('##', {name!r}, flush=True)\n{text}\n" for name, text in REFUSED.items()]
    ended = run_program(set_up(victim) + "".join(parts) + "print('## end')", limits=ROOMY, walls=walls)
    output = ended.output.decode()
    assert ended.reason == "exit" and ended.status == 0 and output.endswith("## end\n"), ended
    return {part.partition("\n")[0].strip(): part for part in output.split("## ")[1:]}


def set_up(victim):
    return "".join(f"{name} = {value!r}\n" for name, value in victim.names().items()) + TRY


@pytest.mark.parametrize("attack", REFUSED)
def test_what_is_outside_is_out_of_reach(attack, said, victim, untouched):
    found = said[attack]
    assert "refused" in found, found
    assert "ESCAPED" not in found and "SECRETWORD" not in found, found


def test_the_attacks_work_without_walls(victim):
    """The control: outside, the same programs get what they want."""
    harmless = ["a symbolic link", "a tcp socket", "an abstract socket", "another process's environment",
                "the environment", "a program of the machine"]  # fmt: skip
    parts = []
    for name in harmless:
        text = "print(open(SECRET).read(), 'ESCAPED')" if name == "a symbolic link" else REFUSED[name]
        parts.append(f"print('##', {name!r}, flush=True)\n{text}\n")
    command = [sys.executable, "-c", set_up(victim) + "".join(parts)]
    output = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()
    found = output.split("## ")[1:]
    assert len(found) == len(harmless) and all("ESCAPED" in part for part in found), output


ENDED = {
    "an endless loop": ("while True: pass", {"seconds"}),
    "sleeping for ever": ("import time\ntime.sleep(1e6)", {"seconds"}),
    "deaf to signals": (
        "import signal, time\nfor n in range(1, 32):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: time.sleep(1)",
        {"seconds"},
    ),
    "a fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"seconds", "processes"},
    ),
    "daemons": (
        "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0:\n            time.sleep(1e6)\n        os._exit(0)\n",
        {"exit"},
    ),
    "a bomb of threads": (
        "import threading, time\ndef wait(): time.sleep(1e6)\nwhile True:\n"
        "    try: threading.Thread(target=wait, daemon=True).start()\n    except RuntimeError: pass",
        {"seconds", "processes"},
    ),
    "10 GB of memory": ("held = bytearray(10 << 30)\nprint('ESCAPED')", {"exit"}),
    "memory by many processes": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n"
        "        held = bytearray(os.urandom(1 << 20) * 100)\n        time.sleep(1e6)\ntime.sleep(1e6)",
        {"memory", "seconds"},
    ),
    "filling the disk": (
        "n = 0\nwhile True:\n    n += 1\n    with open(f'f{n}', 'wb') as f: f.write(b'x' * (4 << 20))",
        {"exit", "disk"},
    ),
    "many small files": (
        "import os\nn = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'w').close()",
        {"exit", "disk"},
    ),
    "endless output": ("while True: print('x' * 10000)", {"output"}),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 10000)", {"output"}),
    "a crash": ("import ctypes\nctypes.string_at(0)", {"exit"}),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n    def __repr__(self): return repr(self)\nrepr(A())\nprint('ESCAPED')",
        {"exit", "seconds", "memory"},
    ),
    "closed descriptors": ("import os\nos.closerange(0, 1000)\nprint('ESCAPED')", {"exit"}),
}


@pytest.fixture(scope="module", params=WAYS)
def ends(request, boxes):
    """How each program ended, and after how long. They run two at a time."""
    walls = walls_of(request.param)

    def timed(text):
        start = time.monotonic()
        return run_program(text, limits=LIMITS, walls=walls), time.monotonic() - start

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(ENDED, pool.map(timed, (text for text, _ in ENDED.values())), strict=True))
    return found


@pytest.mark.parametrize("attack", ENDED)
def test_what_takes_too_much_is_ended(attack, ends):
    (ended, seconds), reasons = ends[attack], ENDED[attack][1]
    assert ended.reason in reasons, ended
    assert ended.reason != "exit" or ended.status != 0 or attack == "daemons", ended
    assert b"ESCAPED" not in ended.output and len(ended.output) <= LIMITS.output
    assert seconds < 30


def test_nothing_is_left_of_them(ends, boxes):
    assert not left(boxes) and not list(boxes.iterdir())


FAKES = {
    "leaving with success": "import os\nos._exit(0)",
    "leaving in the function": "import os, sys\ndef f(x): os._exit(0)",
    "sys.exit in the function": "import sys\ndef f(x): sys.exit(0)",
    "printing the verdict": (
        "print('{\"passed\": true}')\ndef f(x):\n    print('{\"passed\": true}'); return 0"
    ),
    "an object that equals all": (
        "class A:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
        "    def __sub__(self, o): return 0\n    __hash__ = None\n    def __abs__(self): return 0\n"
        "    def __lt__(self, o): return True\n    def __le__(self, o): return True\ndef f(x): return A()"
    ),
    "a number that equals all": "class A(int):\n    def __eq__(self, o): return True\ndef f(x): return A(3)",
    "changed builtins": (
        "import builtins\nfor n in ('AssertionError', 'isinstance', 'len', 'all', 'abs'):\n"
        "    setattr(builtins, n, lambda *a: True)\ndef f(x): return 0"
    ),
    "own names for Python's": "def abs(x): return 0\ndef all(x): return True\ndef f(x): return 0",
    "asserts turned off": (
        "import sys\nsys.flags = type('F', (), {'optimize': 2})()\n__debug__x = False\ndef f(x): return 0"
    ),
    "the caller's frame": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n"
        "            if isinstance(value, (tuple, list)) and 41 in value: return 41\n"
        "        frame = frame.f_back\n    return 0"
    ),
    "the tester's files": (
        "import os\ndef f(x):\n    for top in ('/box', '.', '..', '/tmp'):\n        try:\n"
        "            for name in os.listdir(top):\n                if 'tests' in name: return 41\n"
        "        except OSError: pass\n    return 0"
    ),
    "all objects": (
        "import gc\ndef f(x):\n"
        "    return 41 if any(type(o) is str and 'f(40)' in o for o in gc.get_objects()) else 0"
    ),
    "forged answers": (
        'import os\nline = b\'{"passed": true, "note": ""}\\n\' * 3\n'
        "for n in range(3, 64):\n    try: os.write(n, line)\n"
        "    except OSError: pass\ndef f(x): return 0"
    ),
    "a torn channel": "import os\nos.closerange(3, 64)\ndef f(x): return 0",
    "a flooded channel": (
        "import os\nline = b'[' * 60000 + b'\\n'\n"
        "for n in range(3, 64):\n    try: os.write(n, line)\n    except OSError: pass\n"
        "def f(x): return 0"
    ),
    "a mock": "from unittest.mock import MagicMock as f, ANY",
}
TESTS = {
    "asserts": ["assert f(40) == 41", "assert abs(f(40) - 41) < 0.5", "assert all([f(40) == 41])"],
    "calls": {"fn_name": "f", "inputs": [[40]], "outputs": [41]},
}


@pytest.mark.parametrize("form", ["asserts", pytest.param("calls", marks=pytest.mark.full)])
@pytest.mark.parametrize("fake", FAKES)
def test_no_program_passes_without_solving(fake, form, untouched):
    """Behind the best walls: what is tested here is not theirs but the tester's."""
    verdict = run_tests(FAKES[fake], TESTS[form], ROOMY)
    assert verdict.passed == 0, verdict


def test_an_honest_program_passes():
    """The control."""
    for tests in TESTS.values():
        assert run_tests("def f(x): return x + 1", tests, ROOMY).all_passed


def test_there_are_enough_attacks():
    assert len(REFUSED) + len(ENDED) + len(FAKES) >= 30
