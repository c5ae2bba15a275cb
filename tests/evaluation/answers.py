"""Samples made by hand."""

from __future__ import annotations

from realflow.evaluation.samples import NUMBERS, Sample


def drawn(
    place: int, rewards: list[float | None], *, source: str = "sums", greedy: float | str | None = "none"
) -> list[Sample]:
    """The answers to the problem at a place: one for each reward, and a greedy one unless that is "none"."""
    made = [_sample(place, number, reward, source, False) for number, reward in enumerate(rewards)]
    if not isinstance(greedy, str):
        made.append(_sample(place, 0, greedy, source, True))
    return made


def _sample(place: int, number: int, reward: float | None, source: str, greedy: bool) -> Sample:
    return Sample(
        problem_id=f"{source}/{place}",
        source=source,
        number=number,
        greedy=greedy,
        seed=1,
        draw_id=place * NUMBERS + number,
        completion=f"answer {number}",
        reward=reward,
        finish_reason="length" if number == 3 else "stop",
        tokens=10 + number,
        prompt_tokens=5,
    )
