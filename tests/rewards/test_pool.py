"""Workers with a limit of time: what hangs or dies costs itself alone, and nothing stays behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.errors import RunError
from realflow.rewards.pool import Failure, Pool, Timeout, Value

HERE = Path(__file__).parent
ACT = "pool_functions:act"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(scope="module")
def pool():
    sys.path.insert(0, str(HERE))
    try:
        with Pool(ACT, workers=2, seconds=2.0) as pool:
            yield pool
    finally:
        sys.path.remove(str(HERE))


def alive(pid):
    """Whether a process is there and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids, seconds):
    until = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@settings(deadline=None, max_examples=20)
@given(st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists), max_size=6))
def test_values_come_back_in_order(pool, values):
    assert pool.map([("give", value) for value in values]) == [Value(value) for value in values]


def test_long_items_and_results(pool):
    text = "x\n\u2028é" * 300_000
    assert pool.map([("give", text), ("print", 1), ("give", 2)]) == [Value(text), Value(1), Value(2)]


def test_what_goes_wrong_is_said_and_costs_itself_alone(pool):
    items = [
        ("give", 1),
        ("raise", "no such thing"),
        ("exit", 3),
        ("kill",),
        ("sys.exit", 4),
        ("memory", 100_000),
        ("deep", 0),
        ("give", 2),
        ("give", float("inf")),
        ("give", 3),
    ]
    results = pool.map(items)
    assert [type(result) for result in results] == [
        Value, Failure, Failure, Failure, Failure, Failure, Failure, Value, Failure, Value
    ]  # fmt: skip
    words = ["no such thing", "exit code 3", "signal 9", "exit code 4", "MemoryError", "RecursionError"]
    for word, result in zip(words, results[1:7], strict=True):
        assert isinstance(result, Failure) and word in result.message


def test_a_hanging_item_ends_at_its_limit_and_the_others_go_on():
    with Pool(ACT, workers=2, seconds=0.5) as pool:
        pool.map([("give", 0), ("give", 0)])
        start = time.monotonic()
        results = pool.map(
            [("loop",), ("give", 1), ("native loop",), ("give", 2), ("sleep", 60), ("give", 3)]
        )
        seconds = time.monotonic() - start
        assert results == [Timeout(0.5), Value(1), Timeout(0.5), Value(2), Timeout(0.5), Value(3)]
        assert seconds < 15, "three limits of half a second, and workers that start anew"
        assert len(pool.pids()) <= 2


def test_a_dead_worker_is_replaced(pool):
    (first,) = pool.map([("pid",)])
    pids = pool.pids()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert gone(pids, 5)
    (second,) = pool.map([("pid",)])
    assert first.value in pids and second.value not in pids and second.value in pool.pids()


def test_workers_are_kept_and_start_only_when_needed():
    with Pool(ACT, workers=3) as pool:
        assert pool.map([]) == [] and pool.pids() == []
        once = pool.map([("pid",)])
        assert len(pool.pids()) == 1 and pool.map([("pid",)]) == once


def test_close_ends_workers_and_the_pool():
    pool = Pool(ACT, workers=2, seconds=60)
    pool.map([("pid",), ("pid",)])
    pids = pool.pids()
    pool.close()
    assert gone(pids, 5)
    with pytest.raises(RunError, match="closed"):
        pool.map([("give", 1)])


def test_a_pool_that_is_forgotten_leaves_nothing():
    pool = Pool(ACT)
    pool.map([("give", 1)])
    pids = pool.pids()
    assert pids and all(map(alive, pids))
    del pool
    assert gone(pids, 5)


@pytest.mark.parametrize("function", ["pool_functions:nothing", "no_such_module:f"])
def test_a_function_that_is_not_there(function):
    with Pool(function) as pool, pytest.raises(RunError, match=r"cannot start.*(nothing|no_such_module)"):
        pool.map([()])


def test_setup_is_called_once_and_outside_of_the_limit():
    """It takes longer than an item may, and what it did is there for each item."""
    with Pool("pool_functions:times_set_up", seconds=1.0, setup="pool_functions:set_up") as pool:
        assert pool.map([(), ()]) == [Value(1), Value(1)]
    with Pool(ACT, setup="pool_functions:nothing") as pool, pytest.raises(RunError, match=r"cannot start"):
        pool.map([()])


def test_arguments_of_a_pool():
    with pytest.raises(ValueError):
        Pool(ACT, workers=0)
    with pytest.raises(ValueError):
        Pool(ACT, seconds=0)


def test_threads_take_turns(pool):
    found = {}

    def work(number):
        found[number] = pool.map([("give", number)] * 20)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [Value(number)] * 20 for number in range(4)}


PARENT = """
import sys, threading
sys.path.insert(0, {here!r})
from realflow.rewards.pool import Pool
pool = Pool("pool_functions:act", workers=2, seconds={seconds})
pool.map([("give", 1), ("give", 2)])
print(*pool.pids(), flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "kill"),
    [
        ("", False),
        ("sys.stdin.read()", True),
        ("pool.map([('loop',), ('native loop',)])", True),
        ("raise KeyError('a run that fails')", False),
    ],
)
def test_no_worker_outlives_its_parent(then, kill):
    """Also not when the parent is killed while they work: the kernel's timer ends them."""
    code = textwrap.dedent(PARENT).format(here=str(HERE), seconds=1.0, then=then)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None and parent.stdin is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    if kill:
        time.sleep(0.3)
        assert all(map(alive, pids))
        parent.kill()
    parent.wait(20)
    parent.stdin.close()
    parent.stdout.close()
    assert gone(pids, 8)
