"""Messages between master and workers: msgpack arrays `[kind, field, ...]`, never pickle.

A message is a frozen dataclass of plain values (numbers, text, lists, dicts). `decode` accepts
nothing that is not exactly one of them. Messages to a worker that carry an `order` are executed by
its main thread in that order, which is the same on all ranks, so that collectives cannot cross.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import msgpack

# ---- worker -> master -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker is there: where it runs and where its fields can be fetched."""

    rank: int
    host: str
    pid: int
    device: str
    address: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has loaded its models and made its process groups."""

    rank: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SampleReady:
    """Samples of an open stream are finished: ids, and the tokens of each."""

    dispatch: str
    rank: int
    ids: list[int]
    lengths: list[int]


@dataclass(frozen=True, slots=True)
class DispatchDone:
    """A rank has finished a dispatch.

    `stats`: name -> [sum, count, min, max] over this rank's samples, merged over ranks by the
    master. `values`: name -> number that is the same on all ranks. `spans`: [start, end] in seconds
    since the epoch in which the rank computed. `rows`: records for samples.jsonl. `files`: name ->
    sha256 of what a save wrote. `means`: name -> [sum, count] of what a function told over its samples.
    `state`: what a function keeps for the next step. `dropped`: groups that are to leave the step.
    """

    dispatch: str
    rank: int
    stats: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    spans: list[list[float]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    means: dict[str, list[float]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank cannot go on. `detail` is a traceback or empty; `dispatch` is empty at start-up.
    `refused`: it is the user's input that is wrong."""

    rank: int
    dispatch: str
    message: str
    detail: str
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker's communication thread is alive; `doing` is what its main thread does."""

    rank: int
    doing: str


# ---- master -> worker -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """All workers said hello: rank -> address of its field server."""

    addresses: dict[int, str]


@dataclass(frozen=True, slots=True)
class Open:
    """Open the stream of a generate call, whose responses have at most `max_new_tokens`. Feeds follow,
    then a drain."""

    order: int
    dispatch: str
    call: str
    step: int
    version: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Feed:
    """Prompts (group ids) for an open stream."""

    dispatch: str
    groups: list[int]


@dataclass(frozen=True, slots=True)
class Drain:
    """No more feeds: finish what runs, then report the dispatch as done."""

    dispatch: str


@dataclass(frozen=True, slots=True)
class Execute:
    """Execute a call on samples.

    `shards`: for a train call one list of sample ids for each minibatch, else one list. `inputs`:
    [field, owner rank, sample ids] for every field that a call wrote. `lengths`: tokens of each
    sample of the shards, one after the other (empty where only workers can know them). `whole`: the
    shards are entire minibatches, of which each replica takes its part by the same rule. `state`: what
    the function has kept so far.
    """

    order: int
    dispatch: str
    call: str
    step: int
    shards: list[list[int]]
    inputs: list[Any]
    lengths: list[int] = field(default_factory=list)
    whole: bool = False
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slice:
    """A rank's slice of the schedule of an edge, once for a run, before the edge is first used.

    `model` has the weights, `into` gets them (the same model, or one that follows it). `read` and
    `write` are this rank's holdings that take part (`realflow.planfile.holdings.Holding.numbers`).
    `part` is what `realflow.realloc.schedule.to_wire` made; the whole edge has `parameters`, and its
    busiest link needs `floor_seconds` at full speed (0: not known). Weights travel in the dtype `wire`.
    With a `decay` above 0 the destination becomes `decay` times itself plus the rest of the source.
    """

    edge: str
    model: str
    into: str
    read: list[list[int]]
    write: list[list[int]]
    part: dict[str, Any]
    parameters: int
    floor_seconds: float
    wire: str
    decay: float


@dataclass(frozen=True, slots=True)
class Reallocate:
    """Move weights of `version` along an edge whose slice has come, or is on its way."""

    order: int
    dispatch: str
    edge: str
    version: int


@dataclass(frozen=True, slots=True)
class Save:
    """Write this rank's part of a checkpoint of `model` under `directory` (not yet its final name)."""

    order: int
    dispatch: str
    model: str
    step: int
    directory: str


@dataclass(frozen=True, slots=True)
class Free:
    """Fields of the samples `[start, stop)` that nobody will read again."""

    fields: list[str]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The master is alive."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Halt:
    """The run is over. `failed` asks the worker to leave at once."""

    failed: bool
    reason: str


Message = (
    Hello
    | Ready
    | SampleReady
    | DispatchDone
    | Failed
    | Beat
    | Begin
    | Open
    | Feed
    | Drain
    | Execute
    | Slice
    | Reallocate
    | Save
    | Free
    | Pong
    | Halt
)

_KINDS: dict[str, type] = {kind.__name__: kind for kind in Message.__args__}
_NAMES = {kind: [f.name for f in fields(kind)] for kind in _KINDS.values()}
_ORIGIN: dict[str, Any] = {
    "int": int,
    "str": str,
    "bool": bool,
    "float": (int, float),
    "list": list,
    "dict": dict,
}
_TYPES = {kind: [_ORIGIN[str(f.type).split("[", 1)[0]] for f in fields(kind)] for kind in _KINDS.values()}

T = TypeVar("T")


class MessageError(ValueError):
    """Bytes that are no message of ours."""


def encode(message: Message) -> bytes:
    """A message as msgpack bytes."""
    kind = type(message)
    packed: bytes = msgpack.packb([kind.__name__, *(getattr(message, name) for name in _NAMES[kind])])
    return packed


def decode(data: bytes) -> Message:
    """The message in `data`. Raises MessageError for anything but a whole, well-typed message."""
    try:
        parts = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise MessageError(f"not msgpack: {error}") from None
    if not isinstance(parts, list) or not parts or not isinstance(parts[0], str):
        raise MessageError("not a message: expected [kind, ...]")
    kind = _KINDS.get(parts[0])
    if kind is None:
        raise MessageError(f"unknown kind of message {parts[0]!r}")
    types = _TYPES[kind]
    if len(parts) != len(types) + 1:
        raise MessageError(f"{parts[0]} has {len(parts) - 1} fields, expected {len(types)}")
    for name, value, expected in zip(_NAMES[kind], parts[1:], types, strict=True):
        if not isinstance(value, expected):
            raise MessageError(f"{parts[0]}.{name} is {type(value).__name__}")
    message: Message = kind(*parts[1:])
    return message
