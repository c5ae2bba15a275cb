"""Layouts as callers give them, made uniform: whole numbers in tuples. Pure: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, TypeVar, cast

from realflow.errors import InputError, Problem
from realflow.layout import Box
from realflow.realloc.specs import Holders, Tensors, TensorSpec

One = TypeVar("One")

_RANK = "expected a whole number of at least 0"
_HOLDERS = "expected (rank, box) for every box held, a box being one (start, stop) for each dim"


def uniform(*layouts: tuple[str, Tensors]) -> list[dict[str, TensorSpec]]:
    """Each `(side, layout)` with shapes, boxes and holders as tuples of int; any sequences are accepted.

    Holders that are one object for several parameters stay one. Raises InputError with every
    problem of all of them: something else than a TensorSpec, a size or a rank that is no whole number
    or out of range, a box that is not made of pairs.
    """
    problems: list[Problem] = []
    reader = _Reader(problems)
    found = [reader.layout(side, specs) for side, specs in layouts]
    if problems:
        raise InputError(problems)
    return found


class _Reader:
    """Makes values uniform, each object once, and notes what is wrong."""

    def __init__(self, problems: list[Problem]) -> None:
        self._problems = problems
        self._seen: dict[int, tuple[object, Holders]] = {}  # keeps the object, so that its id stays its own
        self._holders: dict[object, Holders] = {}  # by value, which costs little where they are tuples
        self._boxes: dict[object, Box] = {}

    def layout(self, side: str, specs: Tensors) -> dict[str, TensorSpec]:
        if not isinstance(specs, Mapping):
            found = f"found {_kind(specs)}; expected a mapping from names to TensorSpec"
            self._problems.append(Problem(found, where=f"the {side} layout"))
            return {}
        return {name: self._spec(side, name, spec) for name, spec in specs.items()}

    def _spec(self, side: str, name: str, spec: TensorSpec) -> TensorSpec:
        def wrong(message: str) -> None:
            self._problems.append(Problem(message, where=str(name)))

        if not isinstance(name, str):
            wrong(f"name {_kind(name)} in the {side} layout; expected a string")
        if not isinstance(spec, TensorSpec):
            wrong(
                f"found {_kind(spec)} in the {side} layout; expected a TensorSpec(shape, itemsize, holders)"
            )
            return TensorSpec((), 1, ())
        shape = _numbers(spec.shape)
        if shape is None or min(shape, default=0) < 0:
            wrong(f"shape {spec.shape!r} in the {side} layout; expected whole numbers of at least 0")
        size = _number(spec.itemsize)
        if size is None or size < 1:
            expected = "expected the bytes of an element, a whole number of at least 1"
            wrong(f"item size {spec.itemsize!r} in the {side} layout; {expected}")
        return TensorSpec(shape or (), size or 1, self._known(side, str(name), spec.holders))

    def _known(self, side: str, name: str, holders: Holders) -> Holders:
        if id(holders) not in self._seen:
            made = _get(self._holders, holders)
            if made is None:
                made = self._read(side, name, holders)
                self._holders.setdefault(made, made)
            self._seen[id(holders)] = holders, self._holders[made]
        return self._seen[id(holders)][1]

    def _read(self, side: str, name: str, holders: Iterable[Any]) -> Holders:
        found: list[tuple[int, Box]] = []
        if not isinstance(holders, Sequence) or isinstance(holders, str):
            text = f"holders {_kind(holders)} in the {side} layout; {_HOLDERS}"
            self._problems.append(Problem(text, where=name))
            return ()
        same = isinstance(holders, tuple)
        for place, held in enumerate(holders):
            text = f"holder {place} in the {side} layout"
            if not isinstance(held, Sequence) or isinstance(held, str) or len(held) != 2:
                self._problems.append(Problem(f"{text} is {held!r}; {_HOLDERS}", where=name))
                continue
            rank, box = _number(held[0]), self._box(held[1])
            if rank is None or rank < 0:
                self._problems.append(Problem(f"{text} is of rank {held[0]!r}; {_RANK}", where=name))
            elif box is None:
                expected = "expected one (start, stop) of whole numbers for each dim"
                text = f"box {held[1]!r} of {side} rank {rank}; {expected}"
                self._problems.append(Problem(text, where=name))
            else:
                same = same and box is held[1] and type(held) is tuple and type(held[0]) is int
                found.append((rank, box))
        return holders if same and isinstance(holders, tuple) else tuple(found)

    def _box(self, box: object) -> Box | None:
        """The box as tuples of int: the same object where it is that already. None: it is no box."""
        made = _get(self._boxes, box)
        if made is None and (made := _uniform_box(box)) is not None:
            self._boxes[made] = made
        return made


def _get(known: dict[object, One], value: object) -> One | None:
    """What is known of an equal value; None also for one that has no hash, such as a list."""
    try:
        return known.get(value)
    except TypeError:
        return None


def _uniform_box(box: Any) -> Box | None:
    if not isinstance(box, Sequence) or isinstance(box, str):
        return None
    intervals = [_numbers(interval) for interval in box]
    made = tuple((found[0], found[1]) for found in intervals if found is not None and len(found) == 2)
    if len(made) < len(box):
        return None
    plain = type(box) is tuple and all(type(one) is tuple and {*map(type, one)} == {int} for one in box)
    return cast(Box, box) if plain else made


def _numbers(given: object) -> tuple[int, ...] | None:
    if not isinstance(given, Sequence) or isinstance(given, str):
        return None
    found = [_number(one) for one in given]
    made = tuple(one for one in found if one is not None)
    return made if len(made) == len(found) else None


def _number(given: Any) -> int | None:
    """A whole number as an int; None for anything else, truth values included."""
    if type(given) is int:
        return given
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        return None
    return index(given)


def _kind(found: object) -> str:
    return f"{found!r:.60} ({type(found).__name__})"
