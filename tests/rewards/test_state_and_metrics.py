"""What functions return beside their fields: what they keep, and metrics of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realflow.engines.functions import FunctionError, Outcome, run_call
from realflow.errors import InputError
from realflow.graph.functions import declaration, declare, function
from realflow.graph.types import Call
from realflow.observe.collect import Collector
from realflow.runtime.messages import DispatchDone, decode, encode

READS = {"rewards": "sample float"}
WRITES = {"centred": "sample float"}


@function(reads=READS, writes=WRITES, scope="batch", state={"mean": 0.0, "seen": 0})
def centred(rewards, *, state, rate=0.5):
    mean = state["mean"] + rate * (rewards.mean() - state["mean"])
    return {
        "centred": rewards - mean,
        "state": {"mean": mean, "seen": state["seen"] + len(rewards)},
        "metrics": {"centred/mean_kept": mean},
    }


def run(fn: Callable[..., Any], rewards: list[float], state: Mapping[str, Any] | None = None) -> Outcome:
    decl = declare(fn, "tests:fn")
    call = Call("adapt", "function", decl, reads={"rewards": "rewards"}, writes={"centred": "centred"})
    ids = range(len(rewards))
    return run_call(
        fn, call, ids, {"rewards": rewards}, [1] * len(ids), {"rewards": "sample"}, {"rewards": "float"},
        state=state,
    )  # fmt: skip


def test_a_function_goes_on_from_what_it_kept() -> None:
    first = run(centred, [1.0, 3.0], {"mean": 0.0, "seen": 0})
    assert first.fields == {"centred": [0.0, 2.0]}
    assert first.state == {"mean": 1.0, "seen": 2} and isinstance(first.state["mean"], float)
    assert first.metrics == {"centred/mean_kept": 1.0}
    second = run(centred, [1.0, 1.0], first.state)
    assert second.state == {"mean": 1.0, "seen": 4}
    assert second.fields != run(centred, [1.0, 1.0], {"mean": 0.0, "seen": 0}).fields, "the control"


@pytest.mark.parametrize(
    ("result", "part"),
    [
        ({"centred": [1.0]}, "returned a dict with centred; expected centred, state"),
        ([1.0], "expected a dict with centred, state"),
        ({"centred": [1.0], "state": {"mean": 1.0}}, "returned a dict with mean for state; expected a dict"),
        ({"centred": [1.0], "state": 3}, "for state; expected a dict with mean, seen"),
        ({"centred": [1.0], "state": {"mean": math.nan, "seen": 0}}, "'mean' of state; expected finite"),
        ({"centred": [1.0], "state": {"mean": torch.ones(2), "seen": 0}}, "expected plain values"),
        ({"centred": [1.0], "state": {"mean": 1, "seen": 0}, "metrics": 3}, "for metrics; expected a dict"),
        ({"centred": [1.0], "state": {"mean": 1, "seen": 0}, "metrics": {"a": math.inf}}, "metric 'a'"),
        ({"centred": [1.0], "state": {"mean": 1, "seen": 0}, "metrics": {"a": "b"}}, "for the metric 'a'"),
        ({"centred": [1.0], "state": {"mean": 1, "seen": 0}, "metrics": {"step": 1}}, "not step or time"),
    ],
)
def test_what_is_wrong_is_said(result: Any, part: str) -> None:
    @function(reads=READS, writes=WRITES, scope="batch", state={"mean": 0.0, "seen": 0})
    def wrong(rewards, *, state):
        return result

    with pytest.raises(FunctionError) as caught:
        run(wrong, [1.0], {"mean": 0.0, "seen": 0})
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("of", "more", "part"),
    [
        (lambda rewards, *, state: 0, {"scope": "group"}, "a function that keeps state has scope 'batch'"),
        (lambda rewards: 0, {"scope": "batch"}, "'state' is declared, but it is no parameter"),
        (lambda rewards, *, state: 0, {"scope": "batch", "state": {}}, "'state' is neither declared"),
        (lambda rewards, *, state: 0, {"scope": "batch", "state": {"a": math.inf}}, "state; expected"),
        (lambda rewards, *, state: 0, {"scope": "batch", "writes": {"metrics": "sample float"}}, "'metrics'"),
    ],
)
def test_declarations(of: Callable[..., Any], more: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as caught:
        function(**{"reads": READS, "writes": WRITES, "state": {"mean": 0.0}, **more})(of)
    assert part in str(caught.value)


def test_a_declaration_has_the_state() -> None:
    found = declaration(centred)
    assert found is not None and found.state == {"mean": 0.0, "seen": 0} and found.options == {"rate": 0.5}


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=12),
    st.lists(st.integers(1, 5), min_size=12, max_size=12),
    st.randoms(),
)
def test_metrics_of_pieces_are_means_over_samples(values: list[float], counts: list[int], order: Any) -> None:
    """In whatever pieces, and in whatever order they are reported."""
    pieces = list(zip(values, counts, strict=False))
    whole = sum(v * n for v, n in pieces) / sum(n for _, n in pieces)
    order.shuffle(pieces)
    collector = Collector(_Graph(), {})  # type: ignore[arg-type]
    for index, (value, count) in enumerate(pieces):
        done = DispatchDone(f"reward@0.{index}", 0, means={"reward/late": [value * count, float(count)]})
        collector.add(0, "reward", decode(encode(done)))  # type: ignore[arg-type]
    assert collector.finish(0, 0.0, 1.0)["reward/late"] == pytest.approx(whole, abs=1e-12)


class _Graph:
    calls = ()
