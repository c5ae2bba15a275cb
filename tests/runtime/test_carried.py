"""What functions keep goes from step to step, into checkpoints, and on from them."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from core_workers import PLACES, Workers, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import grpo, place

from realflow.errors import InputError
from realflow.graph.types import FunctionDecl
from realflow.runtime.carried import Carried, at_start, first_state
from realflow.runtime.core import Core
from realflow.runtime.directory import CURSOR, check_cursor, cursor, read_carried
from realflow.runtime.events import Finished, Prepare, Saved, To
from realflow.runtime.messages import Execute, Ready


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    where=st.sampled_from(PLACES[:5]),
    keeps=st.sampled_from([1, 2]),
    staleness=st.sampled_from([0, 1, 2]),
)
def test_each_step_goes_on_from_what_the_one_before_has_kept(
    seed: int, where: tuple, keeps: int, staleness: int
) -> None:
    graph = replace(grpo(steps=6, keeps=keeps), max_staleness=staleness, checkpoint_every=2)
    workers, told = simulate(place(graph, *where), seed)
    assert isinstance(told[-1], Finished)
    due = [step for step in range(6) if (step + 1) % keeps == 0]
    given = {m.step: m.state for m in workers.taken if isinstance(m, Execute) and m.call == "adapt"}
    assert given == {step: {"steps": [s for s in due if s < step]} for step in due}
    saved = {t.step: t.carried for t in told if isinstance(t, Saved)}
    assert saved == {
        step: Carried(4 * (step + 1), {"adapt": {"steps": [s for s in due if s <= step]}})
        for step in (1, 3, 5)
    }


def test_a_run_goes_on_from_what_a_checkpoint_has(tmp_path: Path) -> None:
    graph = grpo(steps=4, keeps=1)
    carried = Carried(8, {"adapt": {"steps": [0, 1]}})
    (tmp_path / CURSOR).write_text(json.dumps(cursor(graph, 2, carried)))
    check_cursor(graph, tmp_path, 2)
    assert read_carried(graph, tmp_path) == carried
    assert read_carried(grpo(), tmp_path) == Carried(8, {}), "the call is gone"
    plan = place(graph, 1, {})
    core, workers = Core(plan, start_step=2, carried=carried), Workers(plan, 0)
    workers.weights = defaultdict(lambda: core.versions["actor"])
    told = run_on(core, workers)
    assert told[-1].carried == Carried(16, {"adapt": {"steps": [0, 1, 2, 3]}})


def run_on(core: Core, workers: Workers) -> list[Saved]:
    """Drive a core on one rank to its end; returns what was saved."""
    saved: list[Saved] = []
    events = [Ready(0, 0.0)]
    while events:
        for told in core.handle(events[0], 0.0):
            if isinstance(told, To):
                workers.take(told)
            elif isinstance(told, Saved):
                saved.append(told)
            elif isinstance(told, Prepare):
                workers.edges[told.edge.key] = told.edge
        events = workers.events()
        if events:
            workers.happened(events[0])
    return saved


def test_another_function_is_refused(tmp_path: Path) -> None:
    graph = grpo(keeps=1)
    text = json.dumps(cursor(graph, 1, Carried(4, {"adapt": {"coef": 0.5}})))
    (tmp_path / CURSOR).write_text(text)
    with pytest.raises(InputError, match="has coef of call adapt, which keeps steps"):
        check_cursor(graph, tmp_path, 1)


def test_a_value_starts_as_the_option_of_its_name() -> None:
    decl = FunctionDecl("f", "function", scope="batch", options={"coef": 0.1}, state={"coef": 0.0, "n": 0})
    call = replace(grpo(keeps=1).call("adapt"), decl=decl, options={"coef": 0.25})
    assert first_state(call) == {"coef": 0.25, "n": 0}
    assert at_start(grpo(keeps=1), 3) == Carried(12, {"adapt": {"steps": []}})
