"""The report's samples: what the model wrote at the start and at the end of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from realflow.observe.rundata import RunData, StepSamples

_GROUPS_OPEN = 3
_GROUPS = 16
_SAMPLES = 16
_CHARACTERS = 2000


def section(run: RunData) -> str:
    """The first steps beside the last ones, group by group."""
    steps = run.samples
    if not steps:
        return '<p class="note">No samples yet.</p>'
    known = [r for step in steps for r in step.rewards.values() if r is not None]
    scale = (min(known), max(known)) if known else (0.0, 0.0)
    half = (len(steps) + 1) // 2
    first = _column("At the start", steps[:half], scale)
    if len(steps) == 1:
        return first
    return f'<div class="two">{first}{_column("At the end", steps[: half - 1 : -1], scale)}</div>'


def _column(title: str, steps: Sequence[StepSamples], scale: tuple[float, float]) -> str:
    parts = [_step(step, scale, opened=index == 0) for index, step in enumerate(steps)]
    return f'<div class="card"><h3>{title}</h3>{"".join(parts)}</div>'


def _step(step: StepSamples, scale: tuple[float, float], opened: bool) -> str:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for key, row in step.rows.items():
        groups.setdefault(str(row.get("group_id", key)), []).append(row)
    drawn = [_group(rows, scale) for rows in list(groups.values())[:_GROUPS]]
    more = drawn[_GROUPS_OPEN:]
    folded = f"<details><summary>{len(more)} more prompts</summary>{''.join(more)}</details>" if more else ""
    mean = step.mean_reward
    said = f"Step {step.step}: {step.count} samples" + ("" if mean is None else f", mean reward {mean:.3f}")
    left = len(groups) - len(drawn)
    note = f'<p class="note">{left} further prompts are in samples.jsonl.</p>' if left > 0 else ""
    return (
        f"<details{' open' if opened else ''}><summary>{said}</summary>"
        f"{''.join(drawn[:_GROUPS_OPEN])}{folded}{note}</details>"
    )


def _group(rows: Sequence[Mapping[str, Any]], scale: tuple[float, float]) -> str:
    head = rows[0]
    answer = head.get("answer")
    right = "" if answer is None else f'<div class="answer">answer: {_text(answer)}</div>'
    drawn = "".join(_sample(row, scale) for row in rows[:_SAMPLES])
    left = len(rows) - _SAMPLES
    note = f'<p class="note">{left} further samples of this prompt.</p>' if left > 0 else ""
    prompt = f'<div class="prompt">{_text(head.get("prompt", ""))}</div>'
    return f'<div class="group">{prompt}{right}{drawn}{note}</div>'


def _sample(row: Mapping[str, Any], scale: tuple[float, float]) -> str:
    reward = row.get("rewards")
    number = reward if isinstance(reward, int | float) and not isinstance(reward, bool) else None
    chip = "none" if number is None else _style(float(number), scale)
    length = row.get("length")
    end = [str(row["finish_reason"])] if row.get("finish_reason") else []
    end += [] if length is None else [f"{length} tokens"]
    return (
        f'<div class="sample"><span class="chip {chip}">{"–" if number is None else f"{number:.3g}"}</span>'
        f'<div class="said">{_text(row.get("completion", ""))}</div>'
        f'<div class="end">{escape(", ".join(end))}</div></div>'
    )


def _style(reward: float, scale: tuple[float, float]) -> str:
    low, high = scale
    if high <= low:
        return "none"
    share = (reward - low) / (high - low)
    return "good" if share > 2 / 3 else "bad" if share < 1 / 3 else "mid"


def _text(value: Any) -> str:
    """A value as escaped text, cut where it is very long; messages by role."""
    if isinstance(value, list) and all(isinstance(entry, dict) and "content" in entry for entry in value):
        value = "\n".join(f"{entry.get('role', '')}: {entry['content']}" for entry in value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > _CHARACTERS:
        text = f"{text[:_CHARACTERS]} … ({len(text) - _CHARACTERS} more characters in samples.jsonl)"
    # Control characters (other than line ends and tabs) are shown by their code.
    return escape("".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text))
