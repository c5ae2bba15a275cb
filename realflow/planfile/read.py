"""Reading a plan file: every value's type is checked, then the rules of `check`.

Everything that is wrong in one file is told together, each problem with its line.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from realflow.errors import InputError, Problem
from realflow.graph import Graph, load_graph
from realflow.graph.filekinds import refuse_other
from realflow.graph.schema import (
    FLAG,
    TEXT,
    Kind,
    Report,
    Section,
    Wrong,
    number,
    one_of,
    read_element,
    whole,
)
from realflow.graph.yamlfile import KeyPath, load_yaml, parse_yaml
from realflow.layout import Layout
from realflow.planfile.check import AFTER, ENGINES, SCHEDULES, find_problems
from realflow.planfile.kinds import RUNTIME_OF
from realflow.planfile.ranks import LIMIT, parse_ranks
from realflow.planfile.types import (
    AT,
    CAUSES,
    FORMAT,
    SPARE,
    CallPlan,
    Cluster,
    Node,
    Plan,
    ReallocPlan,
    TimelineEntry,
)

T = TypeVar("T")
MAX_DEVICES = 4096
"""Devices of one node; bounds what a short text can make."""


Check = Callable[[Plan], Iterable[Problem]]
"""A further check, by somebody who knows more; `where` of its problems is a dotted path of the file."""


def read_plan(path: Path | str, *checks: Check) -> Plan:
    """Read and check a plan file. Raises InputError with everything that is wrong in it.

    `checks` look at a plan that keeps all rules; what they find is told with its lines, too.
    """
    problems: list[Problem] = []
    return _plan(Report(load_yaml(Path(path), problems), problems), checks)


def parse_plan(text: str | bytes, *, file: str = "") -> Plan:
    """Read and check the text of a plan file; `file` is what messages call it."""
    problems: list[Problem] = []
    return _plan(Report(parse_yaml(text, file, problems), problems))


def _maybe(kind: Kind[T]) -> Kind[T | None]:
    return Kind(f"{kind.expected}, or null", lambda value: None if value is None else kind.read(value))


def _read_bytes(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise Wrong
    return value


def _read_signed(value: Any) -> int:
    return -_read_bytes(-value) if isinstance(value, int) and value < 0 else _read_bytes(value)


def _read_ranks(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = parse_ranks(value)
    elif isinstance(value, int):
        value = [value]
    if not isinstance(value, list | tuple):
        raise Wrong
    if not value:
        raise Wrong("the list is empty")
    return tuple(read_element(_RANK, value, index) for index in range(len(value)))


def _read_layout(value: Any) -> Layout:
    try:
        return Layout.parse(value)
    except InputError as error:
        raise Wrong(str(error)) from error


def _read_any_text(value: Any) -> str:
    if not isinstance(value, str):
        raise Wrong
    return value


def _read_hash(value: Any) -> str:
    if isinstance(value, int | float):
        raise Wrong("put it in quotes, else YAML reads digits as a number")
    return TEXT.read(value)


def _read_kind(value: Any) -> str:
    if not isinstance(value, str) or value not in RUNTIME_OF:
        gpu = isinstance(value, str) and value.lower().startswith(("gpu", "nvidia"))
        raise Wrong("did you mean 'cuda'?" if gpu else _alike(value))
    return value


def _alike(value: Any) -> str:
    near = difflib.get_close_matches(str(value).lower(), RUNTIME_OF, n=1, cutoff=0.7)
    return f"did you mean {near[0]!r}?" if near else ""


DEVICE_KIND = Kind(f"one of {', '.join(RUNTIME_OF)}", _read_kind)
TOP_KEYS = (
    "format",
    "graph",
    "cluster",
    "calls",
    "reallocs",
    "memory",
    "predicted",
    "deadline",
    "cards",
    "hashes",
    "notes",
    "extra",
)
NUMBER = number("a number of at least 0", least=0)
SPEED = number("bytes a second, more than 0", above=0)
BYTES = Kind("a whole number of bytes", _read_bytes)
SIGNED = Kind("a whole number", _read_signed)
_RANK = whole(0, LIMIT - 1)
RANKS = Kind("ranks, such as [0, 1] or 0-1", _read_ranks)
LAYOUT = Kind("a layout such as d2t1p1", _read_layout)
NOTE = Kind("text", _read_any_text)  # may be empty
HASH = Kind('a hash in quotes, such as "0123456789abcdef"', _read_hash)


def _plan(report: Report, checks: Iterable[Check] = ()) -> Plan:
    top = report.section(
        (), report.document.value, "a plan file: a mapping with format, graph, cluster, calls"
    )
    refuse_other(report.document, "plan")
    if top.sound and top.need("format", whole(1), FORMAT) != FORMAT:
        top.problem(
            f"found format {top.items['format']}; this version reads {FORMAT}: make the plan again with "
            "realflow plan",
            "format",
        )
    _stop_if_broken(report, top)
    graph = _graph(report, top)
    cluster = _cluster(top.section("cluster", required=True))
    unread, calls = _calls(top.section("calls", required=True))
    predicted = top.section("predicted")
    deadline = top.section("deadline")
    values: dict[str, Any] = {
        "cards": _texts(top.section("cards"), HASH),
        "hashes": _texts(top.section("hashes"), HASH),
        "reallocs": tuple(_realloc(item) for item in _sections(top, "reallocs")),
        **dict(zip(("memory", "moments"), _memory(top.section("memory")), strict=True)),
        "timeline": tuple(_entry(item) for item in _sections(predicted, "timeline")),
        "notes": tuple(
            report.read(("notes", index), item, NOTE, "") for index, item in enumerate(_list(top, "notes"))
        ),
        "extra": dict(top.section("extra").items),
        "deadline_factor": deadline.take("factor", NUMBER, Plan.deadline_factor),
        "deadline_floor_seconds": deadline.take("floor_seconds", NUMBER, Plan.deadline_floor_seconds),
        **{
            key: predicted.take(key, _maybe(NUMBER), None)
            for key in ("step_seconds", "lower_bound_seconds", "gap")
        },
    }
    top.close(TOP_KEYS)
    predicted.close(["step_seconds", "lower_bound_seconds", "gap", "timeline"])
    deadline.close(["factor", "floor_seconds"])
    if graph is not None and cluster.nodes:
        plan = Plan(graph=graph, cluster=cluster, calls=calls, **values)
        # what could not be read comes first: moves that seem to lack may be under a key that is misspelt
        _add(report, find_problems(plan, unread=unread, moves=not report.problems))
    report.finish()
    for check in checks:
        _add(report, check(plan))
    report.finish()
    return plan


def _stop_if_broken(report: Report, top: Section) -> None:
    """Nothing more can be said of a file that is no plan, or a plan of another format."""
    if not top.sound or any(problem.where == "format" for problem in report.problems):
        report.finish()


def _add(report: Report, problems: Iterable[Problem]) -> None:
    """Take problems found elsewhere, whose `where` is a dotted path of this document."""
    document = report.document
    dotted = {".".join(map(str, path)): path for path in document.lines}
    for problem in problems:
        where = problem.where
        while where and where not in dotted:
            where = where.rpartition(".")[0]
        line = document.line(dotted.get(where, ()))
        report.problems.append(dataclasses.replace(problem, file=document.file, line=line))


def _graph(report: Report, top: Section) -> Graph | None:
    if not top.section("graph", required=True, expected="the resolved graph").items:
        return None
    try:
        return load_graph(report.document.under("graph"))
    except InputError as error:
        report.problems.extend(error.problems)
        return None


def _list(section: Section, key: str) -> list[Any]:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise Wrong
        return value

    return section.take(key, Kind("a list", read), [])


def _sections(section: Section, key: str) -> list[Section]:
    path: KeyPath = (*section.path, key)
    return [section.report.section((*path, index), item) for index, item in enumerate(_list(section, key))]


def _keys(kind: type) -> list[str]:
    """The keys of a mapping that is written as a dataclass's fields."""
    return [field.name for field in dataclasses.fields(kind)]


def _texts(section: Section, kind: Kind[str]) -> dict[str, str]:
    return {name: section.need(name, kind, "") for name in section.names(TEXT)}


def _cluster(section: Section) -> Cluster:
    nodes = [_node(item) for item in _sections(section, "nodes")]
    if section.sound and not section.items.get("nodes"):
        section.problem("has no nodes; expected such as {name: local, devices: 2, kind: cpu}")
    section.close(["nodes"])
    return Cluster(tuple(nodes))


def _node(section: Section) -> Node:
    node = Node(
        name=section.need("name", TEXT, ""),
        devices=section.need("devices", whole(1, MAX_DEVICES), 1),
        kind=section.take("kind", DEVICE_KIND, "cpu"),
        memory_bytes=section.take("memory_bytes", _maybe(BYTES), None),
        inside=section.take("inside", _maybe(SPEED), None),
        between=section.take("between", _maybe(SPEED), None),
    )
    section.close(_keys(Node))
    return node


def _calls(section: Section) -> tuple[frozenset[str], dict[str, CallPlan]]:
    """Names of the calls that could not be read, and those that could."""
    problems = section.report.problems
    unread, calls = set(), {}
    for name in section.names(TEXT):
        before = len(problems)
        call = _call(section.section(name))
        if len(problems) > before:
            unread.add(name)
        else:
            calls[name] = call
    return frozenset(unread), calls


def _call(section: Section) -> CallPlan:
    call = CallPlan(
        ranks=section.need("ranks", RANKS, (0,)),
        layout=section.need("layout", LAYOUT, Layout()),
        engine=section.need("engine", one_of(*ENGINES), "native"),
        micro_batch_tokens=section.take("micro_batch_tokens", whole(1), CallPlan.micro_batch_tokens),
        slots=section.take("slots", whole(1), CallPlan.slots),
        after=section.take("after", one_of(*AFTER), CallPlan.after),
        schedule=section.take("schedule", one_of(*SCHEDULES), CallPlan.schedule),
        recompute=section.take("recompute", FLAG, CallPlan.recompute),
        sequence_parallel=section.take("sequence_parallel", FLAG, CallPlan.sequence_parallel),
        predicted_seconds=section.take("predicted_seconds", _maybe(NUMBER), None),
    )
    section.close(_keys(CallPlan))
    return call


def _realloc(section: Section) -> ReallocPlan:
    realloc = ReallocPlan(
        model=section.need("model", TEXT, ""),
        source=section.need("source", TEXT, ""),
        destination="" if "follower" in section.items else section.need("destination", TEXT, ""),
        bytes=section.need("bytes", BYTES, 0),
        lower_bound_bytes=section.need("lower_bound_bytes", BYTES, 0),
        predicted_seconds=section.take("predicted_seconds", _maybe(NUMBER), None),
        follower=section.take("follower", TEXT, ""),
    )
    section.close(_keys(ReallocPlan))
    return realloc


def _entry(section: Section) -> TimelineEntry:
    entry = TimelineEntry(
        what=section.need("what", TEXT, ""),
        ranks=section.need("ranks", RANKS, (0,)),
        start=section.need("start", NUMBER, 0.0),
        end=section.need("end", NUMBER, 0.0),
    )
    section.close(_keys(TimelineEntry))
    return entry


def _memory(section: Section) -> tuple[Mapping[int, Mapping[str, int]], Mapping[int, str]]:
    """Bytes and moments. Rows are for one rank (`0`) or several (`0-7`); what is to spare follows from the
    rest and is there for people."""
    memory: dict[int, dict[str, int]] = {}
    moments: dict[int, str] = {}
    for key in section.items:
        ranks = section.report.read((*section.path, key), key, RANKS, ())
        row = section.report.section((*section.path, key), section.items[key])
        causes = {cause: row.need(cause, BYTES, 0) for cause in row.items if cause in CAUSES}
        moment = row.take(AT, _maybe(TEXT), None)
        row.take(SPARE, _maybe(SIGNED), None)
        row.close((AT, *CAUSES, SPARE))
        if memory.keys().isdisjoint(ranks):
            memory.update({rank: dict(causes) for rank in ranks})
            moments.update({rank: moment for rank in ranks if moment})
        else:
            section.problem("a rank in it has a row already", key)
    return memory, moments
