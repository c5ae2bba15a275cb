"""Tables of scores: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from realflow.evaluation.intervals import Estimate
from realflow.evaluation.summary import REWARD, Difference, Line, Summary

UNKNOWN = "–"
Rows = tuple[list[str], list[list[str]]]
"""The heads of columns, and the cells of rows."""


def rows(found: Summary) -> Rows:
    """A table of scores: `0.412 [0.331, 0.498]` is a mean over problems and its 95 % interval."""
    names = [name for name in found.names if name != REWARD or not found.whole]
    heads = ["source", "problems", *names, "missing", "cut off", "tokens"]
    return heads, [
        [
            line.name,
            str(line.problems),
            *(_score(line.scores[name], line) for name in names),
            _share(line.missing, line.samples),
            _share(line.cut, line.samples),
            f"{line.mean_tokens:.1f}",
        ]
        for line in found.lines
    ]


def difference_rows(found: Difference, *, whole: bool = False) -> Rows:
    """A table of differences; `*` marks an interval that lies on one side of 0."""
    names = [name for name in found.names if name != REWARD or not whole]
    return ["source", "problems", *names], [
        [
            line.name,
            str(line.problems),
            *(_signed(line.scores[name], line) for name in names),
        ]
        for line in found.lines
    ]


def markdown(table: Rows) -> str:
    """The table in Markdown, numbers to the right."""
    heads, body = table
    rule = ["---", *["---:"] * (len(heads) - 1)]
    lines = [[_plain(cell) for cell in row] for row in (heads, *body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (lines[0], rule, *lines[1:])) + "\n"


def rich_table(table: Rows) -> Table:
    """The table for a terminal."""
    heads, body = table
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(heads):
        drawn.add_column(head, justify="right" if index else "left", no_wrap=True)
    for row in body:
        drawn.add_row(*map(Text, row))
    return drawn


def page(tables: Sequence[tuple[str, Rows]], notes: Sequence[str]) -> str:
    """Tables with their titles, and notes, in Markdown."""
    parts = [f"{title}\n\n{markdown(table)}" for title, table in tables]
    listed = "".join(f"- {note}\n" for note in notes)
    return "\n".join([*parts, *([listed] if listed else [])])


def _plain(cell: str) -> str:
    """A cell that cannot end the column or the row."""
    return cell.replace("|", "\\|").replace("\n", " ")


def _score(found: Estimate, line: Line) -> str:
    if found.value is None:
        return UNKNOWN
    return f"{found.value:.3f}{_interval(found, '.3f')}{_of(found, line)}"


def _signed(found: Estimate, line: Line) -> str:
    if found.value is None:
        return UNKNOWN
    mark = "*" if found.excludes_zero else ""
    return f"{found.value:+.3f}{_interval(found, '+.3f')}{mark}{_of(found, line)}"


def _interval(found: Estimate, form: str) -> str:
    if found.low is None or found.high is None:
        return ""
    return f" [{found.low:{form}}, {found.high:{form}}]"


def _of(found: Estimate, line: Line) -> str:
    """How many problems a score is of, where not all know it."""
    return "" if found.problems == line.problems else f" (of {found.problems})"


def _share(count: int, of: int) -> str:
    """`0`, or a count with its share."""
    return "0" if not count or not of else f"{count} ({count / of:.1%})"


def notes(found: Summary, *, limit: int) -> list[str]:
    """What a reader should know of the numbers; answers are cut off at `limit` tokens."""
    line, told = found.all, []
    if line.missing:
        told.append(
            f"{line.missing} of {line.samples} answers have no reward (missing): no score counts them, "
            "neither as right nor as wrong"
        )
    if line.cut > 0.05 * line.samples:
        share = line.cut / line.samples
        told.append(f"{share:.0%} of the answers were cut off at {limit} tokens (--max-new-tokens)")
    return told


def difference_notes(found: Difference, changed: int) -> list[str]:
    """What a reader should know of a comparison; `changed` problems have another text in the other one."""
    told = []
    if any(found.only):
        told.append(
            f"{found.only[0]} problems are in this evaluation alone and {found.only[1]} in the other: the "
            "differences are over those in both"
        )
    if changed:
        told.append(f"{changed} problems have another prompt or answer there, under the same id")
    return told
