"""The master's process: `realflow.runtime.master.Master` with the run's files and a voice.

    python -m realflow.launch.master RUN_DIR --handshake FD [--plain]

Writes one line of JSON (`Rendezvous`) to FD, then serves until the run has ended. Events are told
on stdout, one JSON object a line (with --plain: as text for a person). Exit code: 0 done, 1 failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realflow.data.balance import CostModel
from realflow.errors import RealFlowError
from realflow.models.card import card
from realflow.models.paths import resolve_model
from realflow.observe.progress import Progress
from realflow.observe.recorder import RunFiles
from realflow.planfile import Plan, read_plan
from realflow.runtime.master import Emit, Master


def json_lines(stream: Any) -> Emit:
    """Emit events as JSON lines; a reader that is gone does not stop the run."""

    def emit(event: Mapping[str, Any]) -> None:
        try:
            stream.write(json.dumps(event) + "\n")
            stream.flush()
        except (BrokenPipeError, ValueError):
            pass

    return emit


def costs(plan: Plan) -> dict[str, CostModel]:
    """Model -> the time of a sequence by its length (tokens, and attention's square of them)."""
    cards = {name: card(resolve_model(spec.path)) for name, spec in plan.graph.models.items()}
    return {
        name: CostModel.for_sizes(params=known.size, layers=known.layers, hidden=known.hidden)
        for name, known in cards.items()
    }


def main(argv: list[str] | None = None) -> int:
    """The process's entry point."""
    parser = argparse.ArgumentParser(prog="realflow.launch.master")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--handshake", type=int, required=True, metavar="FD")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--start-step", type=int, default=0)
    arguments = parser.parse_args(argv)
    plan = read_plan(arguments.run_dir / "plan.yaml")
    if arguments.plain:
        progress = Progress(plan.graph.steps)
        emit: Emit = progress.update
    else:
        emit = json_lines(sys.stdout)
    try:
        files = RunFiles(arguments.run_dir, plan)
        master = Master(plan, files, emit, start_step=arguments.start_step, costs=costs(plan))
        rendezvous = master.listen()
        with os.fdopen(arguments.handshake, "w") as handshake:
            handshake.write(rendezvous.to_json() + "\n")
        return master.run()
    except RealFlowError as error:
        emit({"kind": "error", "text": str(error), "code": 1})
        return 1


if __name__ == "__main__":
    sys.exit(main())
