"""Shared set-up of the test suite: helpers such as `tiny` are importable from every test folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Test processes share few cores: a second OpenMP thread costs more than it gains.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parent))


def pytest_runtest_setup() -> None:
    """The width of somebody's terminal is no part of what commands print, unless a test says it."""
    os.environ.pop("COLUMNS", None)
