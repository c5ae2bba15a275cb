"""The graph that an evaluation runs: a user's, with the data, sampling and sizes that were asked for.

A graph to evaluate has one generate call, a function that writes `rewards`, and nothing that trains. Its
drawn answers and its greedy ones come from two runs of it: all generate calls of one graph draw as many
samples of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realflow.errors import InputError, Problem
from realflow.evaluation.problems import SOURCE, ProblemSet, sets_of
from realflow.graph import graph_to_mapping, load_graph
from realflow.graph.functions import resolve
from realflow.graph.types import PROMPT_TOKENS, Call, DataSpec, Graph

REWARDS = "rewards"
STEP_TOKENS = 1 << 26
"""Tokens of the answers of one step, at most: workers keep all of them until it ends."""


@dataclass(frozen=True)
class Asked:
    """What an evaluation draws: the graph as plain values, and of which problems."""

    graph: Mapping[str, Any]
    sets: tuple[ProblemSet, ...]
    rollout: str
    reward: str
    """The names of the calls that draw and that judge."""
    system: str = ""
    """The message before each problem, where the graph's own data has one."""

    @property
    def samples(self) -> int:
        """Drawn answers of each problem; 0 where only greedy ones are wanted."""
        return int(self._call.get("samples", 1))

    @property
    def seed(self) -> int:
        """Of the draws."""
        return int(self.graph["seed"])

    @property
    def max_new_tokens(self) -> int:
        """Where an answer is cut off."""
        return int(self._call["max_new_tokens"])

    @property
    def prompt_tokens(self) -> int:
        """Of the longest prompt that is allowed."""
        return int(self.graph["data"].get("max_length", PROMPT_TOKENS))

    @property
    def _call(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.graph["calls"][self.rollout]
        return found


def ask(
    graph: Graph,
    *,
    sets: Sequence[ProblemSet] = (),
    reward: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    seed: int | None = None,
    limit: int = 0,
) -> Asked:
    """What to evaluate: `graph`, on `sets` in place of its own data, judged by `reward` in place of its own.

    `sampling` sets keys of its generate call (samples, temperature, top_p, max_new_tokens). A reward of the
    user's is looked for from the current folder. Raises InputError for a graph that cannot be evaluated.
    """
    rollout, judge = _calls(graph)
    mapping: dict[str, Any] = graph_to_mapping(graph)
    for key in ("params", "checkpoint"):
        mapping.pop(key, None)
    call = mapping["calls"][rollout.name]
    call.pop("refill", None)  # every problem counts, and each answer may be as long as any
    if rollout.sampling is not None:
        call["max_new_tokens"] = rollout.sampling.max_new_tokens
    call |= dict(sampling or {})
    if seed is not None:
        mapping["seed"] = seed
    if reward is not None:
        mapping["calls"][judge.name] = _judging(reward, sets, timeout=judge.timeout)
        if ":" in reward:
            mapping["folder"] = str(Path.cwd())
    if sets:
        mapping.pop("lengths", None)  # they are those of other problems
    found = tuple(sets) or sets_of(graph.data, graph.folder, limit)
    system = "" if sets else graph.data.system or ""
    asked = Asked(mapping, found, rollout.name, judge.name, system)
    if call.get("temperature", 1.0) == 0 and asked.samples > 1:
        message = "at temperature 0 all answers are alike; for greedy ones alone draw 0 samples"
        raise InputError(Problem(message, where="samples"))
    return asked


def _calls(graph: Graph) -> tuple[Call, Call]:
    """The call that draws, and the one that judges."""
    trains = [call.name for call in graph.calls if call.op == "train"]
    rollouts = [call for call in graph.calls if call.op == "generate"]
    judge = graph.writer(REWARDS)
    problems = []
    if trains:
        message = f"call {trains[0]} trains; expected a graph that draws and judges alone, such as 'evaluate'"
        problems.append(Problem(message, where="calls"))
    if len(rollouts) != 1:
        found = ", ".join(call.name for call in rollouts) or "none"
        problems.append(Problem(f"expected one call with op generate, found {found}", where="calls"))
    if judge is None:
        message = f"no call writes {REWARDS!r}; expected one that judges answers, such as rewards.math"
        problems.append(Problem(message, where="calls"))
    if problems or judge is None:
        raise InputError(problems)
    return rollouts[0], judge


def _judging(reward: str, sets: Sequence[ProblemSet], *, timeout: float) -> dict[str, Any]:
    """A call of that reward. One that reads the problem gets it as it is in the data, without the text
    around it."""
    decl = resolve(reward, Path.cwd() if ":" in reward else None)
    call: dict[str, Any] = {"op": "function", "use": reward, "timeout": timeout}
    apart = bool(sets) and all("problem" in chosen.data.fields for chosen in sets)
    if apart and any(use.name == "prompt" for use in decl.reads):
        call["reads"] = {"prompt": "problem"}
    return call


def drawing(asked: Asked, fields: Sequence[str], places: Sequence[int], total: int, *, greedy: bool) -> Graph:
    """The graph that draws the answers to the problems at `places` of `total`: all drawn ones, or the greedy
    one.

    `fields` are those of every problem. Raises InputError for what is wrong with the graph by now.
    """
    mapping = deepcopy(dict(asked.graph))
    call = mapping["calls"][asked.rollout]
    if greedy:
        for key in ("top_p", "top_k"):
            call.pop(key, None)
        call |= {"temperature": 0.0, "samples": 1}
    prompts, mapping["steps"] = step_sizes(len(places), _most_prompts(asked, call["samples"]))
    call["batch"] = f"{prompts} prompts"
    options: dict[str, Any] = {"sets": [chosen.to_plain() for chosen in asked.sets]}
    if len(places) < total:
        options["only"] = list(places)
    data = {"source": SOURCE, "options": options, "fields": {name: name for name in fields}, "shuffle": False}
    if asked.prompt_tokens != DataSpec("", {}).prompt_tokens:
        data["max_length"] = asked.prompt_tokens
    if asked.system:
        data["system"] = asked.system
    mapping["data"] = data
    return load_graph(mapping)


def _most_prompts(asked: Asked, samples: int) -> int:
    return max(1, STEP_TOKENS // (samples * (asked.max_new_tokens + asked.prompt_tokens)))


def step_sizes(problems: int, most: int) -> tuple[int, int]:
    """Prompts of a step, at most `most`, and the number of steps.

    The last step is as large as the others: where they do not divide the problems it ends with some of the
    first ones again, fewer than there are steps.
    """
    steps = -(-problems // most)
    return -(-problems // steps), steps


def settings(asked: Asked, digest: str, problems: int, *, greedy: bool) -> dict[str, Any]:
    """Everything that answers hang on, as plain values: where it is equal, the same is drawn."""
    mapping = deepcopy(dict(asked.graph))
    for key in ("data", "lengths", "steps", "name", "max_staleness"):
        mapping.pop(key, None)
    mapping["calls"][asked.rollout].pop("batch")
    return {
        **mapping,
        "data": {
            "sets": [chosen.to_plain() for chosen in asked.sets],
            "problems": problems,
            "digest": digest,
            "prompt_tokens": asked.prompt_tokens,
            "system": asked.system,
        },
        "greedy": greedy,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two settings: `calls.rollout.temperature was 0.6 and is 1.0`."""
    old, new = _flat(before), _flat(now)
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [f"{key} was {_shown(old.get(key))} and is {_shown(new.get(key))}" for key in keys]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every value below, by its dotted path."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(place), item) for place, item in enumerate(value)]
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= _flat(item, f"{path}.{key}" if path else key)
    return found


def _shown(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:56]}..."


def protocol(asked: Asked, what: str, *, greedy: bool) -> str:
    """How answers are drawn and judged, in a sentence; `what` is evaluated."""
    call, judge = asked.graph["calls"][asked.rollout], asked.graph["calls"][asked.reward]
    drawn = ["the greedy answer"] if greedy else []
    if asked.samples:
        heat, share = call.get("temperature", 1.0), call.get("top_p", 1.0)
        drawn.insert(
            0, f"{asked.samples} answers at temperature {heat:g}, top_p {share:g}, seed {asked.seed}"
        )
    judged = judge["use"] if judge["op"] == "function" else f"the model {judge['model']}"
    return (
        f"{what}: {' and '.join(drawn)} to each problem, of at most {asked.max_new_tokens} tokens, judged by "
        f"{judged}; means over problems with 95 % intervals"
    )
