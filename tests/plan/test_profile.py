"""Profiles: what may be read, and what is between measured points."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.profile import FORMAT, Point, Table, content_hash, read_profile
from realflow.errors import InputError


def line(points: dict[float, float]) -> Table:
    return Table("p2p", {}, ("bytes",), tuple(Point((x,), y) for x, y in points.items()))


def plane(points: dict[tuple[float, float], float]) -> Table:
    return Table("layer", {}, ("tokens", "length"), tuple(Point(at, y) for at, y in points.items()))


places = st.floats(1, 1e9)
seconds = st.floats(1e-9, 1e3)


@given(st.dictionaries(places, seconds, min_size=1, max_size=6), places)
def test_between_neighbours(points: dict[float, float], x: float) -> None:
    reading = line(points).read(x)
    known = sorted(points)
    low = max([p for p in known if p <= x], default=known[0])
    high = min([p for p in known if p >= x], default=known[-1])
    assert min(points[low], points[high]) <= reading.seconds <= max(points[low], points[high])
    assert reading.inside == (known[0] <= x <= known[-1])
    assert known[0] <= reading.at[0] <= known[-1]


@given(st.dictionaries(places, seconds, min_size=1, max_size=6))
def test_exact_at_the_points(points: dict[float, float]) -> None:
    for x, y in points.items():
        reading = line(points).read(x)
        assert (reading.seconds, reading.at, reading.inside) == (y, (x,), True)


@given(st.dictionaries(places, seconds, min_size=2, max_size=6), st.lists(places, min_size=2, max_size=8))
def test_monotone_where_the_points_are(points: dict[float, float], asked: list[float]) -> None:
    rising = dict(zip(sorted(points), sorted(points.values()), strict=True))
    read = [line(rising).read(x).seconds for x in sorted(asked)]
    assert read == sorted(read)


axes = st.lists(st.sampled_from([1.0, 32.0, 100.0, 512.0, 4096.0]), min_size=1, max_size=4, unique=True)


@given(axes, axes, st.data())
def test_planes_are_exact_at_the_points_and_between_them(xs, ys, data) -> None:
    points = {at: data.draw(seconds) for at in itertools.product(xs, ys)}
    table = plane(points)
    for at, value in points.items():
        assert table.read(*at).seconds == value
    x, y = data.draw(places), data.draw(places)
    reading = table.read(x, y)
    corners = [
        points[px, py]
        for px in {
            max([p for p in xs if p <= x], default=min(xs)),
            min([p for p in xs if p >= x], default=max(xs)),
        }
        for py in {
            max([p for p in ys if p <= y], default=min(ys)),
            min([p for p in ys if p >= y], default=max(ys)),
        }
    ]
    assert min(corners) <= reading.seconds <= max(corners)
    assert reading.inside == (min(xs) <= x <= max(xs) and min(ys) <= y <= max(ys))


@given(axes, axes, st.data())
def test_points_that_were_left_out_are_filled_in(xs, ys, data) -> None:
    """A profile that was short of time has holes anywhere; every place still has seconds above zero."""
    every = list(itertools.product(xs, ys))
    kept = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    measured = {at: data.draw(seconds) for at in kept}
    table = plane(measured)
    for at, value in measured.items():
        assert table.read(*at).seconds == value
    for at in every:
        assert table.read(*at).seconds > 0


def test_passes_shorter_than_their_sequences_are_completed() -> None:
    """Seconds of tokens + tokens x length, of which short passes of long sequences cannot be measured."""

    def model(tokens: float, length: float) -> float:
        return 1e-3 + 2e-5 * tokens + 1e-7 * tokens * length

    grid = [
        (32, 32),
        (128, 32),
        (512, 32),
        (2048, 32),
        (128, 128),
        (512, 128),
        (2048, 128),
        (512, 512),
        (2048, 512),
    ]
    table = plane({at: model(*at) for at in grid})
    for at in [(300, 100), (700, 300), (1024, 64), (2048, 512), (200, 150)]:
        assert table.read(*at).seconds == pytest.approx(model(*at), rel=1e-9), at
        assert table.read(*at).inside
    outside = table.read(8192, 64)
    assert not outside.inside and outside.at == (2048, 64)


def document() -> dict[str, object]:
    found: dict[str, object] = {
        "format": FORMAT,
        "machine": {"cores": 2, "kind": "cpu"},
        "versions": {"torch": "2"},
        "commit": "abc",
        "models": {},
        "constants": {"dispatch": 0.004},
        "tables": [{"what": "p2p", "key": {}, "axes": ["bytes"], "points": [[1, 0.5, 0.1], [2, 0.75, 0.1]]}],
    }
    return found


def write(path: Path, values: dict[str, object], *, sealed: bool = True) -> Path:
    file = path / "profile.json"
    file.write_text(json.dumps({**values, **({"hash": content_hash(values)} if sealed else {})}))
    return file


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = read_profile(write(tmp_path, document()))
    assert profile.cores == 2 and profile.constants == {"dispatch": 0.004}
    (table,) = profile.of("p2p")
    assert table.read(1.5).seconds == 0.625 and profile.of("nothing") == ()
    assert profile.noise() == 0.1 and len(profile.hash) == 16


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 0}, "measure again"),
        ({"machine": {"kind": "cpu"}}, "machine.cores"),
        ({"machine": {"cores": 0}}, "machine.cores"),
        ({"models": []}, "models"),
        ({"tables": {}}, "expected a list"),
        ({"tables": [{"what": "p2p"}]}, "axes and points"),
        ({"tables": [{"what": "p2p", "key": {}, "axes": ["bytes"], "points": []}]}, "no points"),
        (
            {"tables": [{"what": "p2p", "key": {}, "axes": ["bytes"], "points": [[1, 2]]}]},
            "expected 3 numbers",
        ),
        ({"tables": [{"what": "p2p", "key": {}, "axes": ["bytes"], "points": [[1, -2, 0]]}]}, "at least 0"),
        ({"constants": {"dispatch": "x"}}, "constants.dispatch"),
    ],
)
def test_what_is_wrong_in_a_profile_is_told(tmp_path: Path, change: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_profile(write(tmp_path, {**document(), **change}))


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_profile(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(InputError, match="is not JSON"):
        read_profile(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match="is no profile"):
        read_profile(tmp_path / "list.json")


def test_a_profile_that_was_changed_is_refused(tmp_path: Path) -> None:
    sealed = {**document(), "hash": content_hash(document())}
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({**sealed, "commit": "other"}))
    with pytest.raises(InputError, match="not what was measured"):
        read_profile(file)
    with pytest.raises(InputError, match="not what was measured"):
        read_profile(write(tmp_path, document(), sealed=False))
