"""What every data source gives: rows by their index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

Row = Mapping[str, Any]


class Rows(Protocol):
    """Rows by index, always the same one, from any thread. `place(i)` says where row i comes from."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...
    def place(self, index: int) -> str:
        """Such as `data.jsonl:17`, for messages."""
