"""Several sources: turns by weight that hang on the prompt's number alone, each row once an epoch."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.data.mixture import Turns
from realflow.data.source import open_source
from realflow.errors import InputError
from realflow.graph.types import DataSpec, PartSpec

weight_lists = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)
seeds = st.integers(0, 2**63 - 1)


@settings(deadline=None, max_examples=60)
@given(weight_lists, seeds, st.integers(1, 150))
def test_each_source_counts_its_own_prompts(weights, seed, n):
    turns = Turns(weights, seed)
    seen = Counter()
    for g in range(n):
        source, place = turns.at(g)
        assert place == seen[source], "the next one of that source"
        seen[source] += 1
        assert turns.counts(g + 1) == [seen[k] for k in range(len(weights))]


@settings(deadline=None, max_examples=100)
@given(weight_lists, seeds, st.integers(0, 2**50))
def test_shares_are_kept_to_within_the_place_in_the_list(weights, seed, n):
    counts = Turns(weights, seed).counts(n)
    assert sum(counts) == n
    for place, (weight, count) in enumerate(zip(weights, counts, strict=True)):
        wanted = weight / sum(weights) * n
        assert abs(count - wanted) <= place + 1 + 1e-9 * n, (place, count, wanted)
        assert count >= 0


@settings(deadline=None, max_examples=30)
@given(weight_lists, seeds, st.integers(0, 2**40))
def test_any_place_is_found_at_once(weights, seed, g):
    """Also far behind, and the same for weights that are all twice as large."""
    turns = Turns(weights, seed)
    source, place = turns.at(g)
    assert turns.counts(g)[source] == place
    assert turns.counts(g + 1)[source] == place + 1
    assert Turns([2 * weight for weight in weights], seed).at(g) == (source, place)


def test_seeds_move_the_turns():
    orders = {tuple(Turns([3, 2, 1], seed).at(g)[0] for g in range(12)) for seed in range(50)}
    assert len(orders) == 6, "a period of six prompts begins anywhere"
    assert all(Counter(order)[0] in (5, 6, 7) for order in orders)


def parts(folder, **sizes):
    found = []
    for name, (rows, weight) in sizes.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name}{i}", "n": i}) + "\n" for i in range(rows)))
        found.append(PartSpec(name, weight, DataSpec("jsonl", {"prompt": "text", "n": "n"}, path=str(path))))
    fields = {name: name for name in ("prompt", "n", "source")}
    return DataSpec("", fields, sources=tuple(found))


def test_each_source_gives_its_rows_once_in_its_own_epochs(tmp_path):
    spec = parts(tmp_path, a=(7, 0.5), b=(30, 0.3), c=(4, 0.2))
    source = open_source(spec, seed=5)
    assert len(source) == 41
    rows = [source.row(g) for g in range(400)]
    assert all(row.keys() == set(spec.fields) for row in rows)
    assert all(row["prompt"] == f"{row['source']}{row['n']}" for row in rows)
    for name, size in (("a", 7), ("b", 30), ("c", 4)):
        mine = [row["n"] for row in rows if row["source"] == name]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size, size)]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1, "shuffled anew"
    again = open_source(spec, seed=5)
    assert [again.row(g) for g in reversed(range(400))] == rows[::-1]


def test_what_a_source_gives_does_not_hang_on_the_others(tmp_path):
    def order(spec):
        source = open_source(spec, seed=1)
        rows = [source.row(g) for g in range(200)]
        return [row["n"] for row in rows if row["source"] == "a"][:60]

    alone = order(parts(tmp_path, a=(20, 1.0)))
    assert order(parts(tmp_path, b=(9, 0.4), a=(20, 0.5))) == alone
    assert order(parts(tmp_path, a=(20, 0.5), c=(9, 0.1), b=(9, 0.4))) == alone
    assert order(parts(tmp_path, a=(21, 1.0))) != alone


def test_all_sources_that_cannot_be_opened_are_named(tmp_path):
    spec = parts(tmp_path, a=(3, 1.0), b=(3, 1.0))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("")
    with pytest.raises(InputError) as caught:
        open_source(spec, seed=1)
    assert "source a: the file is empty" in str(caught.value)
    assert "source b: the file is empty" in str(caught.value)
