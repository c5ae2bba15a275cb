"""The sandbox itself: what a machine can do, what programs may do, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from walls import problem, walls_of

from realflow.errors import InputError
from realflow.graph import load_graph
from realflow.models.fitting import check_fitting
from realflow.rewards.sandbox import Limits, Sandbox, SandboxError, Walls, ability, run_program, run_tests
from realflow.rewards.sandbox.inside import callfilter
from realflow.rewards.sandbox.process import Contained

WAYS = pytest.mark.parametrize("way", ["namespaces", "landlock"])
GRAPH = """
name: programs
models:
  actor: {path: somewhere, optimizer: {name: adamw, lr: 1e-5}}
data: {source: jsonl, path: a.jsonl, fields: {prompt: prompt, tests: tests}}
calls:
  rollout: {model: actor, op: generate, batch: 2 prompts, samples: 2, max_new_tokens: 4}
  reward: {op: function, use: rewards.code}
  credit: {op: function, use: advantages.grpo}
  train: {model: actor, op: train, use: losses.ppo_clip}
steps: 1
"""


@WAYS
def test_what_a_program_may_do(way):
    text = (
        "import sys, tempfile, threading, os, math, asyncio\n"
        "open('own', 'w').write('x' * 1000)\nos.rename('own', 'mine')\n"
        "assert open('mine').read() == 'x' * 1000\n"
        "with tempfile.TemporaryFile() as file: file.write(b'1')\n"
        "thread = threading.Thread(target=lambda: None); thread.start(); thread.join()\n"
        "asyncio.run(asyncio.sleep(0))\n"
        "if os.fork() == 0: os._exit(0)\nos.wait()\n"
        "print(sum(map(int, sys.stdin)), sorted(os.environ), __name__)"
    )
    ended = run_program(text, "1\n2\n", walls=walls_of(way))
    assert (ended.reason, ended.status) == ("exit", 0), ended
    assert ended.output.startswith(b"3 [") and ended.output.endswith(b"__main__\n")


@WAYS
def test_installed_packages_can_be_imported(way):
    ended = run_program("import numpy; print(numpy.arange(3).sum())", walls=walls_of(way))
    assert ended.output == b"3\n", ended


@WAYS
def test_how_a_program_ended(way):
    walls = walls_of(way)
    assert run_program("import sys; sys.exit(3)", walls=walls).status == 3
    assert run_program("1/0", walls=walls).errors.strip().endswith(b"division by zero")
    assert run_program("import os; os.abort()", walls=walls).status not in (0, 1)
    late = run_program("print(1, flush=True)\nwhile True: pass", limits=Limits(seconds=0.5), walls=walls)
    assert (late.reason, late.output) == ("seconds", b"1\n")


@WAYS
def test_folders_are_cleared_away(way, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o777)
    run_program(
        "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.umask(0o777)\nos.mkdir('closed')",
        walls=walls_of(way),
    )
    assert list(tmp_path.iterdir()) == []


def test_no_descriptor_is_left_open():
    walls = Sandbox.required()
    run_program("1", walls=walls)
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run_program("1/0", walls=walls)
        run_tests("f = 1", ["assert f == 1"], walls=walls)
    assert sorted(os.listdir("/proc/self/fd")) == before


@WAYS
def test_programs_end_with_the_process_that_started_them(way, tmp_path):
    """Killed outright, in the middle of a run: nothing of the program goes on."""
    walls = walls_of(way)
    start = (
        "from realflow.rewards.sandbox import *\n"
        f"run_program('import time; time.sleep(600)', limits=Limits(seconds=300), walls={walls!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", start], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        assert until(lambda: len(below(process.pid)) >= 2)
        jails = below(process.pid)
        time.sleep(0.3)
        jails = sorted({*jails, *below(process.pid)})
    finally:
        process.kill()
        process.wait()
    assert until(lambda: not any(alive(pid) for pid in jails)), jails
    assert until(lambda: not list(tmp_path.iterdir()))


def until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.02)
    return False


def below(process: int) -> list[int]:
    found = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            found += map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())
    except OSError:
        return []
    return [each for child in found for each in (child, *below(child))]


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_a_machine_says_what_it_can_do():
    found = Sandbox.check()
    assert found is Sandbox.check()
    assert (found.walls is None) == ("cannot contain" in found.words)
    if found.walls is not None:
        assert Sandbox.required() == found.walls


def test_walls_with_a_hole_are_not_relied_on(monkeypatch):
    """The control of the trial: a filter that forbids nothing, and a program that finds it out."""
    walls = walls_of("namespaces")
    monkeypatch.setattr(ability, "_PROBE", 'print(\'{"a file outside": true, "sockets": false}\')')
    assert ability.trial(walls) == "it leaves open: sockets"
    monkeypatch.setattr(ability, "_PROBE", "1/0")
    assert "division by zero" in ability.trial(walls)


@pytest.fixture
def without_walls(monkeypatch):
    """A machine that can do nothing of it."""
    monkeypatch.setattr(ability, "trial", lambda walls: "not permitted")
    ability.check.cache_clear()
    yield
    ability.check.cache_clear()


def test_a_machine_without_walls_runs_nothing(without_walls, tmp_path, monkeypatch):
    from realflow.rewards.code import code

    monkeypatch.setattr(Contained, "__init__", None)  # whatever would start is an error
    for run in (
        lambda: run_program("print(1)"),
        lambda: code(["```python\nf = 1\n```"], ["assert f"]),
        lambda: Sandbox.required(),
    ):
        with pytest.raises(InputError, match="cannot contain a program: namespaces: not permitted"):
            run()


def test_graphs_that_run_programs_are_refused_there(without_walls, tmp_path):
    """By `realflow check`, `plan` and `run`, which all ask `check_fitting`."""
    (tmp_path / "graph.yaml").write_text(GRAPH)
    (tmp_path / "a.jsonl").write_text("")
    graph = load_graph(tmp_path / "graph.yaml")
    with pytest.raises(InputError, match=r"calls.reward.use: rewards that run code need a sandbox"):
        check_fitting(graph)
    others = replace(graph, calls=tuple(call for call in graph.calls if call.name != "reward"))
    check_fitting(others)


FULL = pytest.mark.full  # these need a model


@pytest.mark.parametrize(
    "command", ["check", pytest.param("plan", marks=FULL), pytest.param("run", marks=FULL)]
)
def test_commands_refuse(command, without_walls, tmp_path, monkeypatch, capsys):
    from realflow.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph.yaml").write_text(GRAPH)
    if command != "check":
        from tiny import tiny_model

        tiny_model(tmp_path / "somewhere")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "tests": "assert f"}\n' * 4)
    assert main([command, "graph.yaml"]) == 2
    assert "calls.reward.use: rewards that run code need a sandbox" in capsys.readouterr().err


def test_check_says_how_programs_are_contained(tmp_path, capsys):
    from realflow.cli import main

    Sandbox.required()
    (tmp_path / "graph.yaml").write_text(GRAPH)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "tests": "assert f"}\n')
    assert main(["check", str(tmp_path / "graph.yaml")]) == 0
    assert "note: programs are contained by" in capsys.readouterr().out


def test_walls_that_cannot_be_built_are_an_error():
    with pytest.raises(SandboxError, match="could not be"):
        run_program("print(1)", limits=replace(Limits(), files=-1), walls=Walls("namespaces", 12345678901))


AS_ANOTHER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from realflow.rewards.sandbox import ability
print(json.dumps({walls.way: ability.trial(walls) for walls in ability.ways()}))
"""


def test_an_ordinary_user_can_contain_programs_too():
    """Where this process is root's: the same trial by a user who has no rights at all."""
    python = "/usr/bin/python3"
    if os.geteuid() != 0 or not os.access(python, os.X_OK):
        pytest.skip("only root can become another user, with an interpreter that this user may read")
    here = str(Path(__file__).parents[2])
    done = subprocess.run(
        [python, "-B", "-c", AS_ANOTHER, here], user=65534, group=65534, extra_groups=[], cwd="/",
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"that user cannot run the package: {done.stderr.decode().strip().splitlines()[-1]}")
    found = json.loads(done.stdout)
    assert set(found) == {"namespaces", "landlock"}
    mine = {way: problem(way)[1] for way in found}
    assert [way for way in found if not found[way]] or any(mine.values()), found


WITHOUT_NAMESPACES = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
(ready, said), (mapped, tell), user = os.pipe(), os.pipe(), int(sys.argv[1])
child = os.fork()
if child == 0:  # a user namespace that allows no further ones: a machine that forbids them, in small
    assert libc.unshare(0x10000000) == 0
    os.write(said, b"1")
    os.read(mapped, 1)
    open("/proc/sys/user/max_user_namespaces", "w").write("0")
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)
    os.execv(sys.argv[2], [sys.argv[2], "-B", "-c", sys.argv[3], sys.argv[4]])
os.read(ready, 1)
for kind in ("uid", "gid"):
    open(f"/proc/{child}/{kind}_map", "w").write(sys.argv[5])
os.write(tell, b"1")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
SAY = """
import sys
sys.path.insert(0, sys.argv[1])
from realflow.errors import InputError
from realflow.rewards.sandbox import Sandbox, run_program
print(Sandbox.check().words)
try:
    print(run_program("print(6 * 7)").output)
except InputError as error:
    print("refused", error)
"""


@pytest.mark.parametrize(
    ("user", "ids", "words", "ran"),
    [
        (1000, "0 0 65536", "programs are contained by Landlock", "b'42\\n'"),
        (0, "0 0 1", "this machine cannot contain a program", "refused rewards that run code need a sandbox"),
    ],
)
def test_a_machine_without_user_namespaces(user, ids, words, ran):
    """In earnest: Landlock alone for an ordinary user; nothing for one who cannot become another."""
    python = "/usr/bin/python3"
    if (
        os.geteuid() != 0
        or not os.access(python, os.X_OK)
        or problem("landlock")[1]
        or problem("namespaces")[1]
    ):
        pytest.skip("only root can make such a machine, where namespaces and Landlock work")
    command = [python, "-c", WITHOUT_NAMESPACES, str(user), python, SAY, str(Path(__file__).parents[2]), ids]
    done = subprocess.run(command, capture_output=True, timeout=60, cwd="/", text=True, check=False)
    if "ModuleNotFoundError" in done.stderr or "PermissionError" in done.stderr:
        pytest.skip(f"that user cannot run the package: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith(words) and second.startswith(ran), done.stdout


def instructions(text):
    return [struct.unpack("=HBBI", text[at : at + 8]) for at in range(0, len(text), 8)]


def verdict(text, arch, number, *arguments):
    """What the kernel would say of a call: the filter, interpreted."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *([0] * (6 - len(arguments))))
    at, register, lines = 0, 0, instructions(text)
    while True:
        code, true, false, value = lines[at]
        at += 1
        if code == 0x20:
            register = struct.unpack_from("=I", data, value)[0]
        elif code == 0x06:
            return value
        else:
            held = {0x15: register == value, 0x35: register >= value, 0x45: bool(register & value)}[code]
            at += true if held else false


ALLOW, PERM, NOSYS, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000


def test_the_filter_of_calls():
    for machine, arch, socket, kill, clone, prlimit in (
        ("x86_64", 0xC000003E, 41, 62, 56, 302),
        ("aarch64", 0xC00000B7, 198, 129, 220, 261),
    ):
        for closed in (True, False):
            text = callfilter.program(machine, closed=closed)
            assert verdict(text, arch, socket) == PERM
            assert verdict(text, arch, kill, 1) == (ALLOW if closed else PERM)
            assert verdict(text, arch, clone, 17) == ALLOW
            assert verdict(text, arch, clone, 0x10000000 | 17) == PERM
            assert verdict(text, arch, 435) == NOSYS
            assert verdict(text, arch, prlimit, 0) == ALLOW
            assert verdict(text, arch, prlimit, 77) == PERM
            assert verdict(text, 0x40000003, 1) == KILL
            assert verdict(text, arch, 63 if machine == "aarch64" else 0) == ALLOW  # read
    assert verdict(callfilter.program("x86_64", closed=True), 0xC000003E, 0x40000000 + 41) == KILL


def test_a_stopped_program_is_ended_at_once():
    start = time.monotonic()
    with Contained(Sandbox.required(), Limits(seconds=60), ["p.py"], {"p.py": "while True: pass"}) as process:
        process.stop()
        assert process.wait().status == -signal.SIGKILL
    assert time.monotonic() - start < 30
