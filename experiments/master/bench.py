"""How many worker round trips (a dispatch out, its report back) a second the master carries.

    python experiments/master/bench.py [--workers 64] [--steps 400]

The master is the real one (CURVE, msgpack, the core), in a process of its own; the workers are
sockets in this process that answer every dispatch at once; the graph has one function call that
does nothing, with one sample for each worker in each step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zmq

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import record

from realflow.graph.types import Call, DataSpec, FieldUse, FunctionDecl, Graph
from realflow.layout import Layout
from realflow.planfile import CallPlan, Cluster, Node, Plan
from realflow.runtime.connect import Rendezvous
from realflow.runtime.master import Master, rank_identity
from realflow.runtime.messages import DispatchDone, Execute, Halt, Hello, Ready, decode, encode


def noop_plan(workers: int, steps: int) -> Plan:
    """One function call that reads nothing, a sample a worker a step."""
    use = FieldUse("done", "done", "sample", "float")
    decl = FunctionDecl("noop", "function", writes=(use,))
    call = Call("noop", "function", decl, writes={"done": "done"})
    graph = Graph(
        "noop",
        {},
        DataSpec("jsonl", {}),
        (call,),
        steps,
        workers,
        1,
        extents={"done": "sample"},
        dtypes={"done": "float"},
    )
    where = CallPlan(tuple(range(workers)), Layout(dp=workers), "python")
    return Plan(graph, Cluster((Node("local", workers),)), {"noop": where})


class Counting:
    """An observer that keeps nothing but the time of the first and last step."""

    def __init__(self) -> None:
        self.first, self.last, self.steps = 0.0, 0.0, 0

    def report(self, step: int, call: str, done: DispatchDone) -> None:
        """Nothing is kept."""

    def step(self, step: int, start: float, end: float) -> dict[str, float]:
        """Count; the first step is the warm-up."""
        self.steps += 1
        self.last = time.perf_counter()
        if self.steps == 1:
            self.first = self.last
        return {"timing_s/step": end - start}

    def checkpoint(self, number: int, files: Mapping[str, str]) -> Path:
        """A plan without training saves nothing."""
        raise AssertionError

    def close(self) -> None:
        """Nothing is open."""

    def failed(self, text: str) -> None:
        """Say why."""
        print(text, file=sys.stderr)


def serve_master(workers: int, steps: int, pipe: Any) -> None:
    """The master's process."""
    observer = Counting()
    master = Master(noop_plan(workers, steps), observer, lambda event: None)
    pipe.send_bytes(master.listen().to_json().encode())
    master.run()
    trips = workers * (observer.steps - 1)
    pipe.send_bytes(json.dumps({"trips": trips, "seconds": observer.last - observer.first}).encode())


def connect(context: zmq.Context[Any], rendezvous: Rendezvous, rank: int) -> zmq.Socket[bytes]:
    """A worker's socket."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.routing_id = rank_identity(rank)
    socket.curve_serverkey = rendezvous.master_public.encode()
    socket.curve_publickey = rendezvous.worker_public.encode()
    socket.curve_secretkey = rendezvous.worker_secret.encode()
    socket.linger = 0
    socket.connect(rendezvous.address)
    socket.send(encode(Hello(rank, "elsewhere", 0, "cpu", "")))
    socket.send(encode(Ready(rank, 0.0)))
    return socket


def measure(workers: int, steps: int) -> dict[str, float]:
    """One run: round trips, seconds, and trips a second."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_master, args=(workers, steps, there))
    process.start()
    rendezvous = Rendezvous.from_json(here.recv_bytes().decode())
    context: zmq.Context[Any] = zmq.Context()
    poller = zmq.Poller()
    ranks = {}
    for rank in range(workers):
        socket = connect(context, rendezvous, rank)
        ranks[socket] = rank
        poller.register(socket, zmq.POLLIN)
    running = True
    while running:
        for socket, _ in poller.poll(1000):
            message = decode(socket.recv())
            if isinstance(message, Execute):
                socket.send(encode(DispatchDone(message.dispatch, ranks[socket])))
            elif isinstance(message, Halt):
                running = False
    result: dict[str, float] = json.loads(here.recv_bytes())
    process.join()
    context.destroy(linger=0)
    return {**result, "trips_per_second": result["trips"] / result["seconds"]}


def main() -> None:
    """Measure five times, print and store the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    runs = [measure(arguments.workers, arguments.steps) for _ in range(arguments.repeats)]
    rates = sorted(run["trips_per_second"] for run in runs)
    for run in runs:
        rate = run["trips_per_second"]
        print(f"{run['trips']:8.0f} round trips in {run['seconds']:6.2f} s: {rate:8.0f} a second")
    median = rates[len(rates) // 2]
    print(f"median {median:.0f} a second with {arguments.workers} workers, {os.cpu_count()} cores")
    table = {"workers": arguments.workers, "runs": runs, "median_trips_per_second": median}
    record(Path(__file__).parent / "results" / "master.json", table)


if __name__ == "__main__":
    main()
