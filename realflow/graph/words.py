"""A graph in words: its sizes, how a step's batch is divided, and what its user should know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from realflow.graph.datamapping import source_line
from realflow.graph.gymtasks import OTHER_ROWS, ROWS
from realflow.graph.types import Call, DataSpec, Evaluate, Graph

_COUNTED_BYTES = 64 << 20
"""The lines of a larger jsonl file are not counted: a check is done in a second."""


def plural(count: float, word: str) -> str:
    """`1 step`, `5 steps`, `2 minibatches`."""
    if count == 1:
        return f"1 {word}"
    return f"{count:,g} {word}{'es' if word.endswith('ch') else 's'}".replace(",", "")


def describe(graph: Graph) -> str:
    """A graph's sizes and calls, in a line."""
    calls = " -> ".join(call.name for call in graph.calls)
    samples = f" x {plural(graph.samples, 'sample')}" if graph.samples > 1 else ""
    sizes = f"{plural(graph.steps, 'step')} of {plural(graph.prompts, 'prompt')}{samples}"
    return f"{sizes}; calls: {calls}"


def explain_batch(graph: Graph) -> str:
    """What one step works on, in words: prompts, samples, minibatches, optimizer steps, data.

    How a minibatch is cut into micro-batches is the plan's business (a token budget), not the
    graph's: it changes no result.
    """
    total = graph.prompts * graph.samples
    each = f" × {graph.samples} samples each" if graph.samples > 1 else ""
    lines = [
        f"{plural(graph.prompts, 'prompt')}{each} = {plural(total, 'sample')} a step, "
        f"{plural(graph.steps, 'step')}"
    ]
    for call in graph.calls:
        if call.op == "generate" and call.sampling is not None:
            most = plural(total * call.sampling.max_new_tokens, "new token")
            lines.append(f"{call.name}: writes {plural(total, 'sample')}, at most {most}")
            lines += _explain_stages(call)
        if call.op == "train":
            lines += _explain_train(graph, call)
    if graph.evaluate is not None:
        lines.append(_explain_evaluation(graph.evaluate))
    return "\n".join([*lines, _explain_data(graph)])


def _explain_stages(call: Call) -> list[str]:
    """How the steps of a rollout are not all alike."""
    lines = []
    if call.sampling is not None and call.sampling.stages:
        words = [
            f"{limit} to step {end}" if end else f"{limit} to the end" for end, limit in call.sampling.stages
        ]
        lines.append(f"  new tokens of a response, at most: {', '.join(words)}")
    if call.refill is not None:
        lines.append(
            f"  groups that {call.refill.call.decl.name} drops are replaced by new prompts, in "
            f"{plural(call.refill.most, 'round')} at most; a plan counts with one"
        )
    return lines


def _explain_evaluation(spec: Evaluate) -> str:
    scores = spec.graph.calls[1]
    best = "; the checkpoint of the best is kept" if spec.keep_best else ""
    drawn = f"{plural(spec.graph.prompts, 'prompt')} × {plural(spec.graph.samples, 'sample')}"
    return (
        f"evaluation: every {plural(spec.every, 'step')} and at the end, {drawn}, judged by "
        f"{scores.decl.name}{best}"
    )


def _explain_train(graph: Graph, call: Call) -> list[str]:
    count, total = call.minibatches, graph.prompts * graph.samples
    runs = graph.steps // (call.every or 1)
    part = plural(total / count, "sample")
    if count <= graph.prompts:
        part += f" ({plural(graph.prompts / count, 'prompt')})"
    lines = [
        f"{call.name}: {plural(count, 'minibatch')} of {part}; one optimizer step of {call.model} "
        f"for each, {count} a step, {count * runs} in the run"
    ]
    if count > graph.prompts:
        lines.append(
            f"  there are more minibatches than prompts: the {graph.samples} samples of a prompt are split "
            f"over several; with at most {graph.prompts}, each holds whole groups"
        )
    lines.append(
        "  devices take shares of a minibatch in packed micro-batches under the plan's token budget; "
        f"gradients add up, {_weighs(call)}: shares and budget change no result"
    )
    return lines


def _weighs(call: Call) -> str:
    """What a token counts in the loss of a train call."""
    how = call.options.get("normalise", "token")
    if isinstance(how, Mapping):
        return f"each sequence's sum over its tokens divided by {how['constant']:g}"
    return f"each {how} counting the same"


def _explain_data(graph: Graph) -> str:
    """What the run takes of its data, and how much there is, as far as that is told cheaply."""
    taken = f"{plural(graph.prompts, 'prompt')} a step, {graph.prompts * graph.steps} in the run"
    rows = _rows(graph)
    if rows is None:
        return f"data: the run takes {taken}; how many there are is known when {_opened(graph.data)} opened"
    most = most_prompts(graph)
    assert most is not None
    epochs = graph.prompts * graph.steps / max(most, 1)
    if graph.data.unique is None:
        return f"data: the run takes {taken}, of {plural(rows, 'row')}: {epochs:.2g} epochs"
    kept = ""
    if graph.data.test:
        share = graph.data.test if graph.data.use == "test" else 1 - graph.data.test
        kept = f", of which {graph.data.use} is {share:.0%}"
    return (
        f"data: the run takes {taken}, of {most} distinct ones at most ({plural(rows, 'row')}, equal "
        f"{graph.data.unique!r} counted once{kept}): {epochs:.2g} epochs or more"
    )


def _opened(data: DataSpec) -> str:
    return f"{data.source} is" if data.source else f"the sources ({source_line(data)}) are"


def most_prompts(graph: Graph) -> int | None:
    """Prompts that the data can give before one comes again, at most; None where it must be opened."""
    rows = _rows(graph)
    if rows is None or graph.data.unique is None:
        return rows
    held_out = round(graph.data.test * rows)
    return held_out if graph.data.use == "test" else rows - held_out


def _rows(graph: Graph) -> int | None:
    """Rows of the data source, before equal ones are counted once, where that is told cheaply."""
    data = graph.data
    if data.source == "reasoning_gym":
        size = data.options.get("size", data.size)
        return size if isinstance(size, int) else OTHER_ROWS.get(data.task or "", ROWS)
    lines = _lines(data, graph.folder) if data.source == "jsonl" else None
    sizes = [size for size in (lines, data.size if lines is not None else None) if size is not None]
    return min(sizes, default=None)


def _lines(data: DataSpec, folder: str) -> int | None:
    """Lines of a jsonl file that are not blank; None where it is large, or not here."""
    path = Path(folder) / Path(data.path or "").expanduser()
    if not path.is_file() or path.stat().st_size > _COUNTED_BYTES:
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def notes(graph: Graph) -> Sequence[str]:
    """What is no mistake, but should be known before a run."""
    found = []
    if graph.max_staleness > 0:
        found.append(
            f"max_staleness {graph.max_staleness} (asynchronous) cannot run yet: it can be planned, but "
            "realflow run will refuse it; 0 can run"
        )
    most, taken = most_prompts(graph), graph.prompts * graph.steps
    if most is not None and graph.prompts > most:
        found.append(
            f"a step takes {plural(graph.prompts, 'prompt')}, but the data has {most} at most: the same ones "
            "come again within a step"
        )
    elif most is not None and taken > most:
        found.append(
            f"the run takes {plural(taken, 'prompt')}, but the data has {most} at most: each comes about "
            f"{taken / max(most, 1):.2g} times or more"
        )
    return found
