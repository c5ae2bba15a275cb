"""Every symbol, link and path that the documents name exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SYMBOL = re.compile(r"`((?:realflow|planner)(?:\.\w+)+)(?:\([^`]*\))?`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
PATH = re.compile(r"`((?:realflow|planner|graphs|csrc|experiments|docs|tests|scripts)/[\w./-]*)`")


def resolve(dotted: str) -> object:
    """The module, class, function or attribute of that dotted name.

    Raises `LookupError` that says which part is missing.
    """
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        try:
            found: object = importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name is None or not f"{name}.".startswith(f"{missing.name}."):
                raise  # one of its own imports is missing
            continue
        for part in parts[count:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part) and part not in fields:
                raise LookupError(f"{dotted}: {name} has no {part}")
            found = getattr(found, part, None)
        return found
    raise LookupError(dotted)


def test_a_wrong_symbol_is_found_out() -> None:
    """The control."""
    assert resolve("realflow.errors.InputError")
    assert resolve("realflow.layout.Layout")
    for wrong in ("realflow.errors.Nothing", "realflow.nothing.at.all"):
        with pytest.raises(LookupError):
            resolve(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_symbols_exist(page: Path) -> None:
    wrong = []
    for dotted in sorted(set(SYMBOL.findall(page.read_text("utf-8")))):
        if (ROOT / dotted).exists():  # a file name such as realflow.yaml
            continue
        try:
            resolve(dotted)
        except LookupError as error:
            wrong.append(str(error))
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    missing += [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert missing == []
