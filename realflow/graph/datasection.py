"""The data section of a graph file read into a value: one source or several, and what is done with rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from realflow.graph.gymtasks import TASKS
from realflow.graph.schema import (
    FILE_NAME,
    FLAG,
    PLAIN,
    TEXT,
    Kind,
    Section,
    Wrong,
    amount,
    named,
    nearest,
    number,
    one_of,
    whole,
)
from realflow.graph.types import DataSpec, PartSpec
from realflow.graph.yamlfile import BROKEN, Key

REASONING_GYM_COLUMNS = ("question", "answer", "entry")
SOURCE_FIELD = "source"
"""The field that several sources write: which of them a prompt comes from."""

PATTERN = frozenset("*?[")
"""Characters that make a path the pattern of several files."""

_ONE_KEYS = ("source", "task", "path", "options", "size", "fields", "unique", "split", "split_name")
_ALL_KEYS = ("shuffle", "batch", "tokenize", "max_length", "over", "system", "chat")
_FIELD = named("the name of a field (letters, digits and _)")
_PART_NAME = named("a name of letters, digits, _, . and -", FILE_NAME)
_OPENED = ("task", "path", "options", "size", "split_name")

# Keys that only some sources take, and which of them each needs.
_SOURCE_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reasoning_gym": (("task", "options", "size"), ("task",)),
    "jsonl": (("path", "size"), ("path",)),
    "parquet": (("path", "size"), ("path",)),
    "hf": (("path", "size", "split_name"), ("path",)),
}
_FUNCTION_KEYS = (("path", "options", "size"), ())


def read_data(section: Section) -> DataSpec:
    """`data:` as a value."""
    spec = _read_sources(section) if "sources" in section else _read_source(section, {})
    spec = replace(
        spec,
        shuffle=section.take("shuffle", FLAG, True),
        tokenize=section.take("tokenize", TEXT, None),
        max_length=section.take("max_length", whole(2), None),
        batch=section.take("batch", amount("prompts", "samples"), None),
        chat=section.take("chat", FLAG, True),
        system=section.take("system", TEXT, None),
        over=section.take("over", one_of("drop", "truncate", "error"), None),
    )
    section.close((*_ONE_KEYS, *_ALL_KEYS, "sources"), _key_hint)
    _check_text(section, spec)
    return spec


def _key_hint(key: str) -> str | None:
    return "it belongs to one of several 'sources'" if key in ("weight", "name") else None


def _read_source(section: Section, common: Mapping[str, str]) -> DataSpec:
    """The keys of one source; `common` are fields that it has unless it says otherwise."""
    fields = section.section("fields", required=not common, expected="a mapping from fields to columns")
    split = section.section("split")
    spec = DataSpec(
        source=section.need("source", _SOURCE, ""),
        fields={**common, **_read_fields(fields)},
        task=section.take("task", TEXT, None),
        path=section.take("path", TEXT, None),
        options=_plain_mapping(section, "options"),
        size=section.take("size", whole(1), None),
        unique=section.take("unique", TEXT, None),
        test=split.need("test", number("a fraction from 0 up to, not including, 1", least=0, below=1), 0.0)
        if "split" in section
        else 0.0,
        use=split.take("use", one_of("train", "test"), "train"),
        split_name=section.take("split_name", TEXT, None),
    )
    split.close(("test", "use"))
    _check_source(section, spec)
    return spec


def _read_fields(section: Section) -> dict[str, str]:
    return {name: section.take(name, TEXT, name) for name in section.names(_FIELD)}


def _read_kind(value: Any) -> str:
    if not isinstance(value, str) or (value not in _SOURCE_KEYS and ":" not in value):
        raise Wrong(nearest(value, _SOURCE_KEYS) if isinstance(value, str) else "")
    return value


_SOURCE = Kind(f"{', '.join(_SOURCE_KEYS)} or package.module:function", _read_kind)


def _read_sources(section: Section) -> DataSpec:
    """Several sources: what each says of itself, and the fields that all of them have."""
    common = _read_fields(section.section("fields"))
    for key in _ONE_KEYS:
        if key in section and key != "fields":
            section.problem(f"with several 'sources' each has its own {key!r}; write it there", key)
    found: list[PartSpec] = []
    for place, inner in enumerate(_entries(section)):
        part = PartSpec("", inner.take("weight", _WEIGHT, 1.0), _read_source(inner, common))
        name = inner.take("name", _PART_NAME, _part_name(part.data, place))
        if name in [other.name for other in found]:
            inner.problem(f"the name {name!r} is taken by another source; give each a 'name' of its own")
        if SOURCE_FIELD in part.data.fields:
            inner.problem(
                f"{SOURCE_FIELD!r} is the name of the source here; give the field another name", "fields"
            )
        inner.close((*_ONE_KEYS, "weight", "name"), _part_hint)
        found.append(replace(part, name=name))
    _check_same_fields(section, found)
    names = dict.fromkeys([name for part in found for name in part.data.fields])
    return DataSpec("", {**{name: name for name in names}, SOURCE_FIELD: SOURCE_FIELD}, sources=tuple(found))


_WEIGHT = number("a number above 0", above=0)


def _entries(section: Section) -> Iterator[Section]:
    """A section for each entry of the list `sources`."""
    section.take("sources", _LIST, [])
    entries = section.items["sources"]
    if entries is BROKEN or not isinstance(entries, list | tuple):
        return
    if not entries:
        section.problem("is empty; expected a list of sources", "sources")
    for place, entry in enumerate(entries):
        yield section.report.section((*section.path, "sources", place), entry)


def _read_list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise Wrong
    return list(value)


_LIST: Kind[list[Any]] = Kind("a list of sources", _read_list)


def _part_name(spec: DataSpec, place: int) -> str:
    """What a source is called that has no name: its task, its file or its function."""
    told = spec.task or Path(spec.path or "").stem or spec.source.rpartition(":")[2]
    return told if FILE_NAME.fullmatch(told) else f"source-{place + 1}"


def _part_hint(key: str) -> str | None:
    return f"{key!r} is said once for all sources, under 'data'" if key in _ALL_KEYS else None


def _check_same_fields(section: Section, parts: list[PartSpec]) -> None:
    """Calls read the same fields of every prompt."""
    wanted = dict.fromkeys([name for part in parts for name in part.data.fields])
    for place, part in enumerate(parts):
        for name in wanted:
            if name not in part.data.fields:
                section.problem(
                    f"the source {part.name} has no field {name!r}, which another source has; name its "
                    "column under 'fields'",
                    *("sources", place),
                )


def _check_source(section: Section, spec: DataSpec) -> None:
    """Keys that the source does not take, or lacks."""
    if spec.use == "test" and spec.test == 0:
        section.problem("'use: test' needs a held-out fraction; set 'test' above 0", "split")
    if spec.test > 0 and spec.unique is None:
        section.problem(
            "a split needs 'unique': the column whose equal values stay on one side of it", "split"
        )
    if not spec.source:
        return
    taken, needed = _SOURCE_KEYS.get(spec.source, _FUNCTION_KEYS)
    for key in _OPENED:
        if key in section and key not in taken:
            section.problem(f"the source {spec.source} takes no {key!r}; remove it", key)
    for key in needed:
        if key not in section:
            section.problem(f"{key!r} is missing; the source {spec.source} needs it")
    if spec.source == "reasoning_gym":
        columns: dict[tuple[Key, ...], str] = {
            ("fields", name): column for name, column in spec.fields.items()
        }
        for place, column in (columns | ({("unique",): spec.unique} if spec.unique else {})).items():
            if column.partition(".")[0] not in REASONING_GYM_COLUMNS:
                advice = nearest(column, REASONING_GYM_COLUMNS)
                section.problem(f"the source reasoning_gym has no column {column!r}; {advice}", *place)
        _check_task(section, spec)


def _check_task(section: Section, spec: DataSpec) -> None:
    """The task of reasoning-gym, and the names of its options."""
    if spec.task is None:
        return
    if spec.task not in TASKS:
        section.problem(f"unknown reasoning-gym task {spec.task!r}; {nearest(spec.task, TASKS)}", "task")
        return
    known = TASKS[spec.task].split()
    for name in spec.options:
        if name not in known:
            advice = nearest(name, known, many=30)
            section.problem(f"task {spec.task} has no option {name!r}; {advice}", "options", name)


def check_data_path(section: Section, spec: DataSpec, folder: Path) -> None:
    """The files of the sources are there; a relative path starts at the graph's folder."""
    for place, part in enumerate(spec.parts):
        if part.path is None or part.source not in ("jsonl", "parquet", "hf"):
            continue
        keys: tuple[Key, ...] = ("sources", place, "path") if spec.sources else ("path",)
        message = _path_problem(part.source, folder / Path(part.path).expanduser())
        if message:
            section.problem(message, *keys)


def _path_problem(source: str, path: Path) -> str | None:
    """What is wrong with the path of a source, or None."""
    advice = "a relative path starts at the folder of the graph file"
    if source == "hf":
        if not path.exists():
            return f"{path}: no such folder; {advice}"
        return None if path.is_dir() else f"{path}: this is a file; expected the folder of a saved dataset"
    if PATTERN & set(path.name) and not path.exists():
        found = any(path.parent.glob(path.name)) if path.parent.is_dir() else False
        return None if found else f"{path}: no file is named so; {advice}"
    if not path.exists():
        return f"{path}: no such file; {advice}"
    return None if path.is_file() else f"{path}: this is a folder; expected a {source} file"


def _check_text(section: Section, spec: DataSpec) -> None:
    """What hangs on whether the data is tokenized."""
    if not spec.chat and spec.system is not None:
        section.problem("a system message needs a chat template; remove 'chat: false' or it", "system")
    if spec.tokenize is None:
        if "chat" in section:
            section.problem(
                "'chat' is for data that is tokenized; set 'tokenize' to a model or remove it", "chat"
            )
        return
    named_fields = "fields" in section or bool(spec.sources)
    sides = {"chosen", "rejected"} & spec.fields.keys()
    if sides and "completion" in spec.fields:
        section.problem(
            f"'tokenize' takes either the field 'completion' or 'chosen' and 'rejected', found "
            f"'completion' and {' and '.join(map(repr, sorted(sides)))}; remove one or give it another name",
            "tokenize",
        )
        sides = set()
    for name in ("prompt", "chosen", "rejected") if sides else ("prompt", "completion"):
        if name not in spec.fields and named_fields:
            section.problem(
                f"'tokenize' needs the field {name!r}; name its column under 'fields'", "tokenize"
            )
    if spec.over is not None and spec.max_length is None:
        section.problem("says what becomes of what is longer than 'max_length'; set that too", "over")


def _plain_mapping(section: Section, key: str) -> dict[str, Any]:
    """A mapping of plain values under a key."""
    inner = section.section(key)
    return {name: inner.take(name, PLAIN, None) for name in inner.names(TEXT)}
