"""The master's process: `realflow.runtime.master.Master` with the run's files and a voice.

    python -m realflow.launch.master RUN_DIR --handshake FD [--events FD]

Writes one line of JSON (`Rendezvous`) to the first FD, then serves until the run has ended. Events
are told on the second, one JSON object a line (without it: on stdout, as text for a person). Exit
code: 0 done, 1 failed, 2 the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realflow.errors import InputError
from realflow.models.card import card
from realflow.models.costs import cost_model
from realflow.models.layouts import check_layouts
from realflow.models.paths import resolve_model
from realflow.observe.progress import Progress
from realflow.observe.recorder import RunFiles
from realflow.planfile import Plan, read_plan
from realflow.realloc.edges import check_follows
from realflow.runtime.bootstrap import REFUSED
from realflow.runtime.directory import checkpoint_path, read_carried
from realflow.runtime.master import Emit, Interrupted, Master


def json_lines(stream: Any) -> Emit:
    """Emit events as JSON lines; a reader that is gone does not stop the run."""

    def emit(event: Mapping[str, Any]) -> None:
        try:
            stream.write(json.dumps(event) + "\n")
            stream.flush()
        except (BrokenPipeError, ValueError):
            pass

    return emit


def main(argv: list[str] | None = None) -> int:
    """The process's entry point."""
    parser = argparse.ArgumentParser(prog="realflow.launch.master")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--handshake", type=int, required=True, metavar="FD")
    parser.add_argument("--events", type=int, metavar="FD")
    parser.add_argument("--start-step", type=int, default=0)
    arguments = parser.parse_args(argv)
    handshake = os.fdopen(arguments.handshake, "w", encoding="utf-8")
    try:
        plan = read_plan(arguments.run_dir / "plan.yaml")
        cards = {name: card(resolve_model(spec.path)) for name, spec in plan.graph.models.items()}
        check_layouts(plan)
        check_follows(plan.graph, cards)
        start = arguments.start_step
        before = checkpoint_path(arguments.run_dir, start) if start else None
        master = Master(
            plan,
            RunFiles(arguments.run_dir, plan),
            _voice(arguments.events, plan, arguments.run_dir),
            start_step=start,
            costs={name: cost_model(found) for name, found in cards.items()},
            cards=cards,
            carried=read_carried(plan.graph, before) if before else None,
            started_by_rank_0=arguments.events is None,
        )
        rendezvous = master.listen()
    except InputError as error:
        handshake.write(f"{REFUSED}{json.dumps(str(error))}\n")
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    with handshake:
        handshake.write(rendezvous.to_json() + "\n")
    return master.run()


def _interrupt(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Interrupted("interrupted")


def _voice(descriptor: int | None, plan: Plan, run_dir: Path) -> Emit:
    """Where events go: to the supervisor's pipe, or to a person."""
    if descriptor is None:
        progress = Progress(plan.graph.steps)

        def tell(event: dict[str, Any]) -> None:
            ended = event["kind"] == "end"
            progress.update({**event, "text": f"done: {run_dir}"} if ended else event)

        return tell
    return json_lines(os.fdopen(descriptor, "w", encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
