"""Wiring a graph: who writes what is read, extents, cycles, alignment, sampling, periods.

Models and batch sizes are checked in `sizes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from realflow.graph.builtins import PAIR_FIELDS, TRAIN_READS
from realflow.graph.calls import Draft
from realflow.graph.retokenize import of_one_answer
from realflow.graph.schema import Report, nearest
from realflow.graph.types import EXTENTS, SIDES, Call, DataSpec, Dtype, Extent, FieldUse
from realflow.graph.yamlfile import KeyPath

DATA = "data"
_NUMERIC = ("int", "float", "bool")
_ACCEPTS: Mapping[Dtype, tuple[Dtype, ...]] = {
    "int": ("int",),
    "float": ("float", "int", "bool"),
    "bool": ("bool",),
    "text": ("text",),
    "any": ("int", "float", "bool", "text", "any"),
}


@dataclass(frozen=True)
class Column:
    """A field of the graph: who writes it (a call, or `data`), and of what extent and dtype."""

    name: str
    writer: str
    extent: Extent
    dtype: Dtype
    path: KeyPath


@dataclass(frozen=True)
class Wiring:
    """Calls in topological order with their reads complete, and every field."""

    calls: tuple[Call, ...]
    columns: Mapping[str, Column]


def wire(drafts: Sequence[Draft], data: DataSpec, report: Report, *, known: bool = True) -> Wiring:
    """Connect calls by field names, and check everything that hangs on it.

    `known`: the fields of the data could be read. Where they, or what a call writes, could not, nothing
    is said of fields that seem to be missing.
    """
    before = len(report.problems)
    columns = _columns(drafts, data, report)
    unique = len(report.problems) == before
    complete = known and all(draft.sound for draft in drafts)
    drafts = [_complete(_of_one_answer(draft, drafts, columns), data, columns) for draft in drafts]
    for draft in drafts:
        _check_reads(draft, columns, complete, report)
    dtypes = _data_dtypes(drafts, columns, report)
    columns = {
        name: replace(column, dtype=dtypes.get(name, column.dtype)) for name, column in columns.items()
    }
    calls = {draft.call.name: draft.call for draft in drafts}
    order = _topological(calls, columns, report)
    if order is not None:
        origins = _check_alignment(order, calls, columns, report) if unique and complete else {}
        calls = {name: _with_temperature(call, calls, origins) for name, call in calls.items()}
    _check_periods(calls, columns, report)
    _check_sampling(calls, report)
    _check_prompts(calls, columns, data, complete, report)
    return Wiring(tuple(calls[name] for name in order or calls), columns)


def _columns(drafts: Sequence[Draft], data: DataSpec, report: Report) -> dict[str, Column]:
    """Every field with its one writer; a second writer is a problem."""
    texts = SIDES if data.pairs else ()  # what they become takes their place
    columns = {
        name: Column(name, DATA, "prompt", "any", (DATA, "fields", name))
        for name in data.fields
        if name not in texts
    }
    for use in _tokenized(data):
        if use.name in columns:
            report.add((DATA, "fields", use.name), f"'tokenize' writes {use.name!r} already; remove it here")
        columns[use.name] = Column(use.name, DATA, use.extent, use.dtype, (DATA, "tokenize"))
    for draft in drafts:
        call = draft.call
        clashes: dict[str, list[FieldUse]] = {}
        for use in call.decl.writes if draft.sound else ():
            name = call.writes[use.name]
            if name in columns:
                clashes.setdefault(columns[name].writer, []).append(use)
            else:
                columns[name] = Column(name, call.name, use.extent, use.dtype, _place(call, use))
        for writer, uses in clashes.items():
            _report_clash(call, writer, uses, columns, report)
    return columns


def _tokenized(data: DataSpec) -> tuple[FieldUse, ...]:
    """What tokenized data writes of each sample; of pairs also which group it belongs to, and which of
    the two it is."""
    if data.tokenize is None:
        return ()
    return (*TRAIN_READS, *PAIR_FIELDS) if data.pairs else TRAIN_READS


def _place(call: Call, use: FieldUse) -> KeyPath:
    """Where a graph says what a call writes: its rename, or else the call."""
    renamed = call.writes[use.name] != use.field
    return ("calls", call.name, "writes", use.name) if renamed else ("calls", call.name)


def _report_clash(
    call: Call, writer: str, uses: Sequence[FieldUse], columns: Mapping[str, Column], report: Report
) -> None:
    """Fields of a call that `writer` writes too."""
    names = [call.writes[use.name] for use in uses]
    line = report.document.line(columns[names[0]].path)
    who = "data" if writer == DATA else f"call {writer}"
    place = f" (line {line})" if line is not None else ""
    report.add(
        _place(call, uses[0]),
        f"writes the field{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}, which {who}{place} "
        f"writes too; rename, such as 'writes: {{{uses[0].name}: {call.name}_{uses[0].name}}}'",
    )


def _of_one_answer(draft: Draft, drafts: Sequence[Draft], columns: Mapping[str, Column]) -> Draft:
    """The draft; where it reads text as tokens of its own, with prompt and end of that text."""
    call = draft.call
    if call.retokenize is None or not draft.sound:
        return draft
    column = columns.get(call.reads["completion"])
    calls = {other.call.name: other.call for other in drafts if other.sound}
    writer = column.writer if column is not None else ""
    return replace(draft, call=of_one_answer(call, draft.renamed, calls, writer))


def _complete(draft: Draft, data: DataSpec, columns: Mapping[str, Column]) -> Draft:
    """The draft with the data's columns where its function takes them all, and without optional
    reads that nothing writes."""
    call = draft.call
    decl, reads = call.decl, dict(call.reads)
    if decl.takes_columns:
        taken = {use.name for use in decl.reads}
        extra = tuple(FieldUse(name, name, "sample", "any") for name in data.fields if name not in taken)
        decl = replace(decl, reads=decl.reads + extra)
        reads |= {use.name: use.name for use in extra}
    for use in decl.reads:
        if use.optional and use.name not in draft.renamed and reads.get(use.name) not in columns:
            reads.pop(use.name, None)
    return replace(draft, call=replace(call, decl=decl, reads=reads))


def _check_reads(draft: Draft, columns: Mapping[str, Column], complete: bool, report: Report) -> None:
    """Missing fields, extents and dtypes; options that require a field that is not there."""
    call = draft.call
    for use in draft.uses if draft.sound else ():
        if use.name not in call.reads:
            continue
        name = call.reads[use.name]
        path = ("calls", call.name, *(("reads", use.name) if use.name in draft.renamed else ()))
        column = columns.get(name)
        word = f"{name!r}" if name == use.name else f"{name!r} (as {use.name!r})"
        if column is None:
            if complete:  # otherwise the call that could not be read may be its writer
                report.add(
                    path,
                    f"reads the field {word}, which nothing writes; {missing_hint(name, call, columns)}",
                )
        elif message := mismatch(use, column):
            who = "data" if column.writer == DATA else f"call {column.writer}"
            report.add(path, f"reads the field {word} {message} (written by {who})")
    for option, name in call.decl.requires.items():
        if call.options.get(option) and name not in call.reads and complete:
            report.add(
                ("calls", call.name, "options", option),
                f"found {call.options[option]}, but nothing writes {name!r}, which it needs; "
                "add a call that does or set it to 0",
            )


def missing_hint(name: str, call: Call, columns: Mapping[str, Column]) -> str:
    """Where a field could come from: never from the call itself."""
    if name in ("tokens", "loss_mask"):
        return "a generate call writes it, or data with 'tokenize: <model>'"
    advice = nearest(name, [column.name for column in columns.values() if column.writer != call.name])
    return f"{advice} ('reads' renames; 'data.fields' adds a column)"


def mismatch(use: FieldUse, column: Column) -> str | None:
    """What keeps a read from taking a field, or None."""
    coarser = EXTENTS.index(column.extent) <= EXTENTS.index(use.extent)
    if not coarser:
        return f"with a value for each {use.extent}, found one for each {column.extent}"
    if use.extent == "token" and column.extent != "token" and column.dtype not in _NUMERIC:
        found = f"{column.dtype} for each {column.extent}"
        return f"for each token, found {found}, which cannot be repeated over tokens"
    from_data = column.dtype == "any" and column.writer == DATA  # its values are checked when they are read
    if not from_data and column.dtype not in _ACCEPTS[use.dtype]:
        return f"as {use.dtype}, found {column.dtype}"
    return None


def _data_dtypes(drafts: Sequence[Draft], columns: Mapping[str, Column], report: Report) -> dict[str, Dtype]:
    """Columns of the data take the dtype that their readers agree on."""
    found: dict[str, Dtype] = {}
    for draft in drafts:
        for use in draft.uses if draft.sound else ():
            column = columns.get(draft.call.reads.get(use.name, ""))
            if column is None or column.writer != DATA or column.dtype != "any" or use.dtype == "any":
                continue
            before = found.setdefault(column.name, use.dtype)
            if before == use.dtype:
                continue
            if {before, use.dtype} <= {"int", "float"}:
                found[column.name] = "int"
                continue
            report.add(
                ("calls", draft.call.name),
                f"reads the column {column.name!r} as {use.dtype}, another call as {before}; they must agree",
            )
    return found


def _topological(
    calls: Mapping[str, Call], columns: Mapping[str, Column], report: Report
) -> list[str] | None:
    """Names in topological order, ties in the order of the file; None where calls form a cycle."""
    import networkx as nx  # costs 0.15 s to import, which reading a file should not

    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    graph.add_nodes_from(calls)
    for call in calls.values():
        for name in call.reads.values():
            if name in columns and columns[name].writer in calls:
                graph.add_edge(columns[name].writer, call.name, field=name)
    place = {name: index for index, name in enumerate(calls)}
    loops = [part for part in nx.strongly_connected_components(graph) if len(part) > 1]
    loops += [{name} for name in calls if graph.has_edge(name, name)]
    for part in sorted(loops, key=lambda names: min(place[name] for name in names)):
        first = min(part, key=place.__getitem__)
        edges = nx.find_cycle(graph.subgraph(part), source=first)
        chain = "".join(f"{a} -[{graph.edges[a, b, key]['field']}]-> " for a, b, key in edges) + edges[-1][1]
        report.add(("calls", edges[0][0]), f"calls wait for one another in a circle: {chain}; rename a field")
    if loops:
        return None
    return list(nx.lexicographical_topological_sort(graph, key=place.__getitem__))


def _check_alignment(
    order: Sequence[str], calls: Mapping[str, Call], columns: Mapping[str, Column], report: Report
) -> dict[str, str]:
    """Token fields of one call must all belong to the same tokens.

    Returns, for every token field, who made the tokens that it is aligned with.
    """
    origins = {
        name: DATA for name, column in columns.items() if column.writer == DATA and column.extent == "token"
    }
    for call in (calls[name] for name in order):
        found = {name: origins[name] for name in call.reads.values() if name in origins}
        if len(set(found.values())) > 1:
            pairs = ", ".join(f"{name!r} ({origin})" for name, origin in found.items())
            report.add(
                ("calls", call.name), f"reads token fields of different tokens: {pairs}; they must be of one"
            )
        origin = call.name if call.op == "generate" else next(iter(found.values()), None)
        for name in call.writes.values():
            if name not in columns or columns[name].writer != call.name or columns[name].extent != "token":
                continue
            if origin is None:
                report.add(
                    ("calls", call.name),
                    f"writes {name!r} for each token, but reads no field for each token; "
                    "expected it to read one, such as 'tokens'",
                )
            else:
                origins[name] = origin
    return origins


def _with_temperature(call: Call, calls: Mapping[str, Call], origins: Mapping[str, str]) -> Call:
    """A call that computes logprobs does so at the temperature at which its tokens were drawn."""
    if call.op not in ("infer", "train"):
        return call
    origin = calls.get(origins.get(call.reads.get("tokens", ""), DATA))
    if origin is None or origin.sampling is None or origin.sampling.temperature == 0:
        return call
    return replace(call, temperature=origin.sampling.temperature)


def _check_sampling(calls: Mapping[str, Call], report: Report) -> None:
    """A trainer recomputes logprobs over the whole vocabulary: it must have been sampled from."""
    for rollout in calls.values():
        sampling = rollout.sampling
        if sampling is None:
            continue
        off = {
            "temperature": sampling.temperature == 0,
            "top_k": sampling.top_k > 0,
            "top_p": sampling.top_p < 1,
        }
        name = rollout.writes.get("logprobs")
        readers = [call.name for call in calls.values() if call.op == "train" and name in call.reads.values()]
        for key in (key for key, on in off.items() if on and readers):
            value = getattr(sampling, key)
            report.add(
                ("calls", rollout.name, key),
                f"found {value:g}, but call {readers[0]} trains on the field {name!r}: logprobs that "
                "it recomputes over the whole vocabulary cannot match; use a temperature above 0, "
                "top_k 0 and top_p 1",
            )


def _check_prompts(
    calls: Mapping[str, Call], columns: Mapping[str, Column], data: DataSpec, complete: bool, report: Report
) -> None:
    """Prompts come from the data; their limit is of use where something is tokenized."""
    rollouts = [call for call in calls.values() if call.op == "generate"]
    for call in rollouts:
        for name in call.reads.values():
            if name in columns and columns[name].writer != DATA:
                report.add(
                    ("calls", call.name),
                    f"reads the prompt {name!r}, which call {columns[name].writer} writes; "
                    f"prompts are read from the data: name a field of data.fields ({', '.join(data.fields)})",
                )
    judges = [call for call in calls.values() if call.retokenize is not None]
    for call in (*rollouts, *judges):
        chat, place = (
            (call.chat, ("chat",))
            if call.retokenize is None
            else (call.retokenize.chat, ("retokenize", "chat"))
        )
        if data.system is not None and not chat:
            report.add(
                ("calls", call.name, *place),
                "found false, but data.system is a message before each prompt, which needs the chat template",
            )
    if data.tokenize is not None or rollouts or not complete:
        return
    for key, does in _OF_TEXT.items():
        if getattr(data, key) is not None and not (key == "system" and judges):
            report.add(
                (DATA, key),
                f"{does}, but no call generates and the data is not tokenized; "
                "set 'tokenize' to a model or remove it",
            )


_OF_TEXT = {
    "max_length": "limits tokens of the data",
    "over": "says what becomes of what is too long",
    "system": "puts a message before each prompt",
}


def _check_periods(calls: Mapping[str, Call], columns: Mapping[str, Column], report: Report) -> None:
    """What a call reads must be there in every step in which it runs."""
    for call in calls.values():
        for name in dict.fromkeys(call.reads.values()):
            writer = calls.get(columns[name].writer) if name in columns else None
            if writer is not None and writer.every and (call.every or 1) % writer.every:
                rhythm = f"every {call.every} steps" if call.every else "in every step"
                report.add(
                    ("calls", call.name),
                    f"runs {rhythm} and reads {name!r}, which call {writer.name} writes only "
                    f"every {writer.every} steps; give it 'every: {writer.every} steps', or a multiple",
                )
