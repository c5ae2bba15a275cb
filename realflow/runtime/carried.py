"""What goes from one step of a run to the next beside weights: where the data stands, and what functions
keep. It is in every checkpoint, and no plan changes it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from realflow.errors import InputError
from realflow.graph.types import Call, Graph
from realflow.runtime.readiness import StepReadiness

State = Mapping[str, Any]
"""What a function keeps: plain values by name."""


@dataclass(frozen=True)
class Carried:
    """`next_prompt` is the first prompt that no step has taken; `states` what each call keeps that
    declares `state`, as it is at the end of a step."""

    next_prompt: int
    states: Mapping[str, State] = field(default_factory=dict)


def at_start(graph: Graph, steps: int = 0) -> Carried:
    """As it is before anything has run, or after `steps` steps that kept nothing."""
    states = {call.name: first_state(call) for call in graph.calls if call.decl.state}
    return Carried(steps * graph.prompts, states)


def first_state(call: Call) -> State:
    """What a call keeps before it has run: an option of the same name says with what a value starts."""
    return {name: call.options.get(name, value) for name, value in call.decl.state.items()}


def restored(graph: Graph, next_prompt: int, states: Mapping[str, State]) -> Carried:
    """What a checkpoint has, for a run of `graph`: a call that the checkpoint does not know starts anew.

    Raises InputError where a call keeps other values than those that were saved.
    """
    found = dict(at_start(graph).states)
    for name in found.keys() & states.keys():
        if set(states[name]) != set(found[name]):
            raise InputError(
                f"the checkpoint has {', '.join(states[name]) or 'nothing'} of call {name}, which "
                f"keeps {', '.join(found[name])}: another function wrote it; rename the call to start anew"
            )
        found[name] = states[name]
    return Carried(next_prompt, found)


def state_for(steps: Iterable[StepReadiness], carried: Carried, call: Call) -> State | None:
    """What `call` has kept before it runs in the step that comes after `steps` (those not yet ended,
    oldest first); None while an earlier one has yet to run it."""
    state = carried.states[call.name]
    for step in steps:
        if call.name in step.calls:
            if call.name not in step.states:
                return None
            state = step.states[call.name]
    return state
