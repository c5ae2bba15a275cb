"""The examples of docs/realloc.md run as they stand."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def outputs_of(example: int, tmp_path: Path) -> list[str]:
    """What two ranks print that run an example of the page."""
    page = (ROOT / "docs" / "realloc.md").read_text(encoding="utf-8")
    script = tmp_path / "move.py"
    script.write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[example], encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment = {**os.environ, **world, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs
    return outputs


def test_the_example_of_the_page_runs_on_two_ranks(tmp_path: Path) -> None:
    expected = [float(value) for value in range(12)]
    for rank, output in enumerate(outputs_of(0, tmp_path)):
        assert f"rank {rank} received 12 bytes: {expected}" in output


def test_the_example_of_an_average_runs_on_two_ranks(tmp_path: Path) -> None:
    for rank, output in enumerate(outputs_of(1, tmp_path)):
        assert f"rank {rank}: [0.25, 0.25, 0.25]" in output
        assert "LinkLoad(link='rank 0 sends to other nodes', bytes=30, seconds=6e-10)" in output
