"""The process that builds the wall, starts the program behind it, watches it and ends all of it.

    python -m inside.jail JOB LIFELINE REPORT        (three descriptors)

It writes one line of JSON to REPORT: `{"reason": .., "status": ..}`, or `{"failed": ..}` where the wall could
not be built, and then nothing was run.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys

from . import callfilter, kernel, landlock, namespaces, watch
from .job import DEVICES, FIRST_USER, HOME, USERS, Job

_FILES_OPEN = 128
_STACK = 64 << 20


def main(job_file: int, lifeline: int, report: int) -> None:
    """Run the job that `job_file` holds."""
    for number in (lifeline, report):
        os.set_inheritable(number, False)
    try:
        found = _run(Job.read(job_file), lifeline)
    except OSError as error:
        found = {"failed": error.strerror or str(error)}
        watch.end_all()
    os.write(report, json.dumps(found).encode())


def _run(job: Job, lifeline: int) -> dict[str, object]:
    kernel.machine()
    if job.way == "landlock" and job.user is not None:  # each by itself: the kernel counts a user's processes
        job = job._replace(user=FIRST_USER + os.getpid() % USERS)
    if job.way == "namespaces":
        namespaces.leave(job.user)
    kernel.adopt_orphans()
    failed, fail = os.pipe()  # closed by exec; what is written here is why there was none
    process = os.fork()
    if process == 0:
        os.close(lifeline)
        os.close(failed)
        _child(job, fail)
    os.close(fail)
    _let_go(job)
    with os.fdopen(failed, "rb") as told:
        why = told.read()
    reason = watch.watch(process, job, lifeline) if not why else "failed"
    if reason != "exit":
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    watch.end_all()
    if reason == "stopped":  # whoever started it may be dead
        import shutil  # not needed otherwise, and each start counts

        shutil.rmtree(job.scratch, ignore_errors=True)
    return {"failed": why.decode()} if why else {"reason": reason, "status": status}


def _let_go(job: Job) -> None:
    """Close what the program was given, so that the others see when it closes its own."""
    nothing = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for number in job.keep:
        os.close(number)


def _child(job: Job, fail: int) -> None:
    """The child: becomes the program, or its parent within the namespaces. Never returns."""
    code = 1
    try:
        kernel.end_with_parent()
        if job.way == "namespaces":
            code = _first_process(job, fail)
        else:
            namespaces.write_files(job, job.scratch)
            _become(job, job.scratch)
    except (OSError, ValueError) as error:
        os.write(fail, str(getattr(error, "strerror", None) or error).encode())
    finally:
        os._exit(code)


def _first_process(job: Job, fail: int) -> int:
    """Process 1 of the namespace: what it leaves behind is killed by the kernel when it ends.

    It keeps its privileges in there, so that the program can neither trace nor signal it.
    """
    namespaces.build(job)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kernel.hide_memory()
    program = os.fork()
    if program == 0:
        kernel.end_with_parent()
        _become(job, HOME)
    os.close(fail)
    _let_go(job)
    while True:
        process, status = os.wait()
        if process == program:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _become(job: Job, home: str) -> None:
    """Give up all that the job may not have, and become its program."""
    os.setsid()
    os.chdir(home)
    os.umask(0o077)
    for number in job.keep:
        os.set_inheritable(number, True)
    _limit(job)
    if job.way == "landlock" and job.user is not None:
        os.chown(home, job.user, job.user)
    # Where the file system is the machine's, the interpreter may lie in a folder of root's alone.
    reading = job.way == "landlock" and job.user is not None and kernel.may_read_all()
    kernel.bound_capabilities(reading=reading)
    if job.user is not None:
        kernel.become(job.user, reading=reading)
        kernel.end_with_parent()
    kernel.no_new_privileges()
    if job.way == "landlock":
        landlock.restrict(job.read_only, DEVICES, home)
    if not reading:
        kernel.drop_capabilities()
    kernel.filter_calls(callfilter.program(kernel.machine(), closed=job.way == "namespaces"))
    os.execve(job.argv[0], list(job.argv), dict(job.env))


def _limit(job: Job) -> None:
    """Limits that no process of the tree can raise."""
    seconds = math.ceil(job.seconds) + 1
    # In namespaces the user's processes are counted from zero; otherwise they are those of the machine.
    others = (
        0 if job.way == "namespaces" else watch.threads_of(os.geteuid() if job.user is None else job.user)
    )
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: job.memory,
        resource.RLIMIT_FSIZE: job.disk,
        resource.RLIMIT_NOFILE: _FILES_OPEN,
        resource.RLIMIT_NPROC: job.processes + others,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_STACK: _STACK,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
