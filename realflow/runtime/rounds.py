"""What is said of a step whose groups were replaced. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from realflow.runtime.readiness import StepReadiness


def too_few(step: StepReadiness) -> str | None:
    """Why the rest of a step cannot run on the groups that were kept in all of its rounds, or None."""
    assert step.refill is not None
    tried = f"{step.stop - step.first} samples in {step.round + 1} rounds"
    advice = (
        "draw from other prompts or at a higher temperature, more samples a prompt, or raise refill.most "
        f"(it is {step.refill.most})"
    )
    name = f"refill@{step.step}: {step.refill.call.decl.name}"
    if not step.groups:
        return f"{name} has dropped every group of {tried}: there is nothing to train on; {advice}"
    trains = [call for call in step.calls.values() if call.op == "train"]
    short = [c for c in trains if (len(step.groups) if c.whole_groups else step.total) < c.minibatches]
    if short:
        most = max(call.minibatches for call in short)
        return (
            f"{name} has kept {step.total} of {tried}, too few for {most} minibatches; {advice}, or lower "
            "minibatches"
        )
    return None


def numbers(step: StepReadiness) -> Mapping[str, float]:
    """The metrics of a step: rounds, and the groups that it has dropped and kept."""
    if step.refill is None:
        return {}
    counts = {"rounds": step.round + 1, "dropped": len(step.dropped), "kept": len(step.groups)}
    return {f"refill/{name}": float(count) for name, count in counts.items()}
