"""Prompts that are too long: dropped by a function of the place alone, cut at the beginning, or an error."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.data.lengths import MOST_PROBES, FittingPrompts, counted, limit_prompt
from realflow.data.source import open_source
from realflow.errors import InputError
from realflow.graph.types import DataSpec, PartSpec


def rows(folder, lengths, **changes):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"i": i, "n": n}) + "\n" for i, n in enumerate(lengths)))
    return DataSpec("jsonl", {"i": "i", "n": "n"}, path=str(path), **changes)


def short(row):
    return row["n"] <= 10


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.sampled_from([3, 10, 11, 30]), min_size=1, max_size=40).filter(
        lambda found: sum(n <= 10 for n in found) * 8 >= len(found)
    ),
    seed=st.integers(0, 2**62),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_rows_that_fit_keep_their_places(tmp_path_factory, lengths, seed, epoch, shuffle):
    spec = rows(tmp_path_factory.mktemp("rows"), lengths, shuffle=shuffle)
    source = open_source(spec, seed=seed)
    fitting = FittingPrompts(source, short, 10)
    size = len(lengths)
    places = range(epoch * size, (epoch + 1) * size)
    found = {g: fitting.row(g) for g in reversed(places)}
    dropped = 0
    for g in places:
        before = source.row(g)
        assert short(found[g])
        if short(before):
            assert found[g] == before and fitting.dropped(g) == 0
        else:
            dropped += 1
            assert fitting.dropped(g) > 0
    times = Counter(row["i"] for row in found.values())
    assert set(times) == {i for i, n in enumerate(lengths) if n <= 10}, "each row that fits comes"
    assert sum(times.values()) - len(times) == dropped, "the places of the others come on top"
    again = FittingPrompts(open_source(spec, seed=seed), short, 10)
    assert [again.row(g) for g in places] == [found[g] for g in places]


def test_stand_ins_are_spread(tmp_path):
    """Half the rows are too long: no other row may come again and again."""
    source = open_source(rows(tmp_path, [5, 50] * 500), seed=3)
    fitting = FittingPrompts(source, short, 10)
    times = Counter(fitting.row(g)["i"] for g in range(1000))
    assert (
        len(times) == 500 and max(times.values()) <= 6
    )  # 1 and about as many as a Poisson variable of mean 1


def test_where_nothing_fits(tmp_path):
    fitting = FittingPrompts(open_source(rows(tmp_path, [50] * 9), seed=1), short, 10)
    with pytest.raises(
        InputError, match=f"{MOST_PROBES} rows were tried for prompt 4, .* more than 10 tokens"
    ):
        fitting.row(4)


def test_a_stand_in_is_of_the_same_source(tmp_path):
    found = []
    for name, lengths in (("a", [5] * 10), ("b", [50, 5] * 5)):
        (tmp_path / name).mkdir()
        found.append(PartSpec(name, 1.0, rows(tmp_path / name, lengths)))
    source = open_source(DataSpec("", {"i": "i", "n": "n", "source": "source"}, sources=tuple(found)), seed=1)
    fitting = FittingPrompts(source, short, 10)
    for g in range(60):
        assert fitting.row(g)["source"] == source.row(g)["source"]
        assert short(fitting.row(g))


def test_prompts_are_cut_at_the_beginning_or_refused():
    def limit(tokens, over, most=3):
        return limit_prompt(tokens, DataSpec("jsonl", {}, max_length=most, over=over), 7)

    assert limit([1, 2, 3], None) == (1, 2, 3)
    assert limit([1, 2, 3, 4, 5], "truncate") == (3, 4, 5)
    for over in (None, "error", "drop"):  # drop: such a row does not come here
        with pytest.raises(
            InputError, match=r"data\.max_length: the prompt of group 7 has 4 tokens, more than 3"
        ):
            limit([1, 2, 3, 4], over)
    with pytest.raises(InputError, match=r"1024 \(the default\)"):
        limit(range(1025), None, None)


def test_counted():
    assert counted([True, False, True]) == [2.0, 3.0, 0.0, 1.0]
