"""Which table of a profile answers a question, or comes nearest to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from planner.decoder import Decoder, read_decoder
from planner.profile import Profile, Table

_EVEN = 64
"""Tokens of a sequence at which its attention spends as long on copies as on scores, about."""


class Measured:
    """A profile, asked by runs with `per_node` ranks on each node, which on a CPU share its cores."""

    def __init__(self, profile: Profile, per_node: int, *, shared_cores: bool) -> None:
        self.profile, self._per_node, self._shared = profile, per_node, shared_cores
        self._threads = max(1, profile.cores // per_node) if shared_cores else 1
        self._models = {
            name: (read_decoder(model["config"], "lm"), str(model["dtype"]))
            for name, model in profile.models.items()
        }
        self.nearest = lru_cache(maxsize=4096)(self._nearest)

    def model(self, table: Table) -> Decoder:
        """The model of which a table was measured."""
        return self._models[str(table.key["model"])][0]

    def circumstances(self, busy: int) -> dict[str, str | int]:
        """What of a table's key says how crowded the machine is."""
        return {"threads": self._threads, "busy": min(busy, self._per_node)} if self._shared else {}

    def crowded(self, table: Table, busy: int) -> float:
        """How much longer something takes than in a table, because more threads share the cores."""
        if not self._shared:
            return 1.0
        threads, others, cores = int(table.key["threads"]), int(table.key["busy"]), self.profile.cores
        mine = max(1.0, busy * self._threads / cores) / max(1.0, others * threads / cores)
        return mine * min(threads, cores) / min(self._threads, cores)

    def best(self, what: str, wanted: Mapping[str, str | int]) -> Table | None:
        """The table whose key is nearest to what is wanted; text must be equal."""
        texts = {name: value for name, value in wanted.items() if isinstance(value, str)}
        numbers = {name: value for name, value in wanted.items() if isinstance(value, int)}
        return min(
            (table for table in self.profile.of(what) if has(table, texts)),
            key=lambda table: [_distance(table, name, value) for name, value in numbers.items()],
            default=None,
        )

    def spread(
        self, doing: str, decoder: Decoder, kind: int, dtype: str, t: int, busy: int,
        distinct: float, tokens: float, length: float,
    ) -> tuple[float, bool] | None:  # fmt: skip
        """Seconds by which a layer's attention takes longer over all `tokens`, of sequences of `length`, than
        over the `distinct` ones; and whether all of it was measured as asked. None where nothing was."""
        found = []
        for what, count in (("spread", tokens), ("attention", distinct)):
            nearest = self.nearest(what, doing, decoder, kind, dtype, t, busy)
            if nearest is None:
                return None
            table, alike = nearest
            reading = table.read(count, length)
            if alike and reading.inside and table.key["t"] == t and has(table, self.circumstances(busy)):
                found.append((reading.seconds, True))
                continue
            known = _width(self.model(table), int(table.key["t"])) * _size(*reading.at)
            scale = _width(decoder, t) * _size(count, length) / known * self.crowded(table, busy)
            found.append((reading.seconds * scale, False))
        (more, one), (less, other) = found
        return max(0.0, more - less), one and other

    def _nearest(
        self, what: str, doing: str, decoder: Decoder, kind: int, dtype: str, t: int, busy: int
    ) -> tuple[Table, bool] | None:
        """The table of `what` nearest to what is asked for, and whether it is of this shape: of layer `kind`
        (-1: of the ends) of `decoder`, cut over `t` tensor ranks."""
        wanted = {"t": t, **self.circumstances(busy)}
        best: tuple[tuple[float, ...], Table, bool] | None = None
        for table in self.profile.of(what):
            model, own = self._models[str(table.key["model"])]
            if own != dtype or (doing and table.key.get("doing") != doing):
                continue
            alike = _alike(model, decoder, kind)
            far = abs(model.hidden - decoder.hidden) / max(model.hidden, decoder.hidden)
            rank = (float(not alike), *(_distance(table, name, value) for name, value in wanted.items()), far)
            if best is None or rank < best[0]:
                best = (rank, table, alike)
        return None if best is None else best[1:]


def _width(decoder: Decoder, t: int) -> float:
    """What attention of a token is proportional to."""
    return decoder.heads * decoder.head_dim / t


def _size(tokens: float, length: float) -> float:
    """About how attention grows beyond what was measured: copies with tokens, scores with their pairs."""
    return tokens * (length + _EVEN)


def has(table: Table, wanted: Mapping[str, str | int]) -> bool:
    """Whether a table's key says so."""
    return all(table.key.get(name) == value for name, value in wanted.items())


def _alike(known: Decoder, asked: Decoder, kind: int) -> bool:
    """Whether layers (`kind`, of a model that has but one kind) or ends (-1) have the same shape."""
    if kind < 0:
        if asked.head == "lm" and known.tied != asked.tied:
            return False
        return (known.hidden, known.vocab) == (asked.hidden, asked.vocab)
    return set(known.layers) == {asked.layers[kind]} and _bare(known) == _bare(asked)


@lru_cache(maxsize=256)
def _bare(decoder: Decoder) -> Decoder:
    """A decoder without what its layers do not know."""
    return replace(
        decoder,
        model_type="",
        vocab=0,
        max_positions=0,
        layers=(),
        tied=False,
        head="lm",
        dtype="",
        assumed=(),
    )


def _distance(table: Table, name: str, value: str | int) -> float:
    """How far a table's number is from the one wanted; of two equally far the smaller comes first."""
    known = table.key.get(name, value)
    assert isinstance(known, int) and isinstance(value, int), (table.what, name, known, value)
    return abs(known - value) + (0.5 if known > value else 0.0)
