"""report.html: one file that says what a run did. No network, no script, works on a run that died.

The page forbids scripts and everything from outside (Content-Security-Policy), so that nothing a
model writes can run in it; all text is escaped besides.
"""

from __future__ import annotations

from datetime import datetime
from html import escape
from pathlib import Path

from realflow.observe import learning, plantable, samplelist, timing
from realflow.observe.files import write_whole
from realflow.observe.learning import mean_of
from realflow.observe.progress import RECENT, REWARD, duration
from realflow.observe.rundata import RunData, load_run
from realflow.observe.style import CSS
from realflow.observe.svg import short

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run_dir: Path | str) -> Path:
    """Write `run_dir`/report.html from whatever the directory holds and return its path.

    Raises InputError where `run_dir` is no run's directory. Files that are missing or broken (a run
    that died) are named in the report.
    """
    run = load_run(run_dir)
    path = Path(run_dir) / "report.html"
    write_whole(path, render(run))
    return path


def render(run: RunData) -> str:
    """The report of a run as a whole HTML page."""
    sections = [
        ("Learning", learning.charts(run)),
        ("Time", timing.section(run)),
        ("Samples", samplelist.section(run)),
        ("Plan", plantable.section(run)),
        ("All metrics", learning.other_charts(run)),
        ("Files", _files(run)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    name = escape(_name(run))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} · RealFlow</title><style>{CSS}</style></head><body><main>"
        f"{_head(run)}{_tiles(run)}{_troubles(run)}{body}</main></body></html>\n"
    )


def _name(run: RunData) -> str:
    return run.run_dir.resolve().name


def _head(run: RunData) -> str:
    planned, done = run.steps_planned, run.steps_done
    if run.error:
        style, text = "bad", f"failed after {plural(done, 'step')}"
    elif planned is None:
        style, text = "none", plural(done, "step")
    elif done >= planned:
        style, text = "good", f"complete: {done} of {planned} steps"
    else:
        style, text = "mid", f"{done} of {planned} steps"
    facts = []
    if run.plan:
        graph = run.plan.graph
        facts.append(f"graph {graph.name}")
        facts.extend(f"{model.name} {model.path} ({model.dtype})" for model in graph.models.values())
        facts.append(f"{graph.prompts} prompts × {graph.samples} samples a step")
        facts.append(f"seed {graph.seed}")
        facts.append(plural(run.plan.world_size, "rank"))
    return (
        f'<div class="head"><h1>{escape(_name(run))}</h1><span class="pill {style}">{text}</span></div>'
        f'<p class="sub">{escape(" · ".join(facts))}</p>'
    )


def _tiles(run: RunData) -> str:
    """The few numbers that say how it went."""
    tiles = []
    rewards = run.values(REWARD)
    if len(rewards) > 1:
        count = min(RECENT, len(rewards) // 2)
        first, last = mean_of(rewards[:count]), mean_of(rewards[-count:])
        tiles.append(
            (
                "Mean reward",
                f"{first:.2f} → {last:.2f}",
                f"first and last {plural(count, 'step')}, {last - first:+.3f}",
            )
        )
    seconds = timing.step_seconds(run)
    if seconds is not None:
        predicted = run.plan.step_seconds if run.plan else None
        more = f"median; predicted {predicted:.3g} s" if predicted else "median of the steps"
        tiles.append(("Seconds a step", f"{seconds:.3g}", more))
    speeds = run.values("perf/tokens_per_second")
    if speeds:
        tiles.append(("Tokens a second", short(mean_of(speeds)), "mean of the steps"))
    idle = timing.idle(run)
    if idle is not None:
        tiles.append(("No rank computes", f"{100 * idle:.1f} %", "of the time, median of the steps"))
    times = run.values_of_time()
    if times:
        began = datetime.fromtimestamp(times[0]).astimezone().strftime("%Y-%m-%d %H:%M %Z")
        tiles.append(("First to last step", duration(times[-1] - times[0]), f"first step done {began}"))
    if run.checkpoints:
        name, size = run.checkpoints[-1]
        tiles.append(("Checkpoints", str(len(run.checkpoints)), f"last {name}, {short(size / 1e6)} MB"))
    cards = "".join(
        f'<div class="card tile"><div class="name">{escape(name)}</div>'
        f'<div class="value">{escape(value)}</div><div class="more">{escape(more)}</div></div>'
        for name, value, more in tiles
    )
    return f'<div class="tiles">{cards}</div>' if cards else ""


def plural(count: int, word: str) -> str:
    """`1 step`, `5 steps`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _troubles(run: RunData) -> str:
    planned = run.steps_planned
    lines = list(run.troubles)
    if planned is not None and run.steps_done < planned and not run.error:
        lines.insert(
            0, f"The run has {run.steps_done} of {planned} steps: it is running, or it stopped early."
        )
    failed = ""
    if run.error:
        failed = f'<div class="card failed below"><h3>The run failed</h3><pre>{escape(run.error)}</pre></div>'
    if not lines:
        return failed
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    missing = f'<div class="card trouble below"><h3>Not everything is here</h3><ul>{items}</ul></div>'
    return failed + missing


def _files(run: RunData) -> str:
    rows = [
        ("metrics.jsonl", "metrics, one line a step"),
        ("samples.jsonl", "samples"),
        ("trace.json", "timeline of all ranks; opens in Perfetto"),
        ("plan.yaml", "the plan that ran"),
        ("graph.yaml", "the graph as it was resolved"),
        ("tensorboard", "for tensorboard --logdir"),
    ]
    rows += [(f"checkpoints/{name}", f"{short(size / 1e6)} MB") for name, size in run.checkpoints]
    cells = "".join(
        f'<tr><td><a href="{escape(name)}"><code>{escape(name)}</code></a></td><td>{escape(what)}</td></tr>'
        for name, what in rows
        if (run.run_dir / name).exists()
    )
    return f'<div class="card scroll"><table>{cells}</table></div>' if cells else ""
