"""The real model for the tests of this folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Directory of SmolLM2-135M-Instruct; skips, and says why, on a machine that has not fetched it."""
    cache = os.environ.get("REALFLOW_CACHE") or Path.home() / ".cache" / "realflow"
    directory = Path(cache) / "models" / MODEL
    if not (directory / "config.json").exists():
        pytest.skip(f"{MODEL} is not cached: run `make model` (`make test` does)")
    return directory
