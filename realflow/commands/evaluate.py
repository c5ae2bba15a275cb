"""`realflow evaluate`: many answers to each problem, judged and summed up."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner import parse_layouts
from realflow import api
from realflow.commands.common import AddCommand, layout_arguments, say
from realflow.errors import InputError, Problem, RunError
from realflow.graph import find_graph, shipped_graphs
from realflow.planfile import check_runnable

if TYPE_CHECKING:
    from realflow.evaluation.folder import Folder
    from realflow.evaluation.graphs import Asked
    from realflow.evaluation.problems import Problems
    from realflow.evaluation.samples import Sample

GRAPH = "evaluate"
"""The shipped graph that a model is put into."""
_PLAIN_WIDTH = 160


def add_command(add: AddCommand) -> None:
    """Add the command of this module."""
    parser = add(
        "evaluate",
        run_evaluate,
        "draw many answers to each problem and say how many are right, and how sure that is",
        "realflow evaluate smollm2-135m-instruct --samples 8 max_new_tokens=16 -o evaluations/sums\n"
        "  realflow evaluate runs/first --data aime.jsonl --max-new-tokens 8192 --against evaluations/old\n"
        "  realflow evaluate org/model --data HumanEval.jsonl --devices 8 --layout d8\n"
        "  realflow evaluate mine.yaml --samples 4 --no-greedy",
    )
    parser.add_argument(
        "what",
        metavar="MODEL|GRAPH",
        help="a model (name, folder, hub id, a run's folder or checkpoint), or a graph that draws and judges",
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="set a param of the graph"
    )
    _problem_arguments(parser)
    _sampling_arguments(parser)
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="where results go (default: evaluations/NAME); what it has "
        "of the same evaluation is not drawn again"
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="FOLDER", help="another evaluation: differences over the problems that both have"
    )
    layout_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")


def _problem_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FILE|TASK",
        help="problems: a .jsonl or .parquet file (AIME, MATH, HumanEval and alike) or a task of "
        "reasoning-gym (repeat it; default: the graph's own)",
    )
    parser.add_argument(
        "--columns",
        default="",
        metavar="ROLE=COLUMN,...",
        help="columns of a file that are not found by their names: problem, answer, id, source",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the text around a problem; {problem} stands for it")
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="the first N problems of each source"
    )
    parser.add_argument(
        "--reward", metavar="NAME", help="what judges answers, such as rewards.math or my_rewards:exact"
    )


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = "default: that of the graph"
    parser.add_argument(
        "--samples", type=int, metavar="N", help=f"answers to each problem ({defaults}; 0: greedy alone)"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help=f"at which they are drawn ({defaults})"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help=f"share of likely tokens to draw from ({defaults})"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"where answers are cut off ({defaults})"
    )
    parser.add_argument("--seed", type=int, metavar="N", help=f"of the draws ({defaults})")
    parser.add_argument(
        "--greedy", action=argparse.BooleanOptionalAction, default=True, help="also the greedy answer"
    )
    parser.add_argument(
        "--pass-at", metavar="K,...", help="the k of pass@k (default: 1, 8 and the number of samples)"
    )
    parser.add_argument(
        "--solved", type=float, default=1.0, metavar="R", help="the reward from which an answer is right (1)"
    )


def run_evaluate(args: argparse.Namespace) -> None:
    """Evaluate a model or a graph; print the table and say where it is."""
    from realflow.evaluation.folder import Folder, read_samples
    from realflow.evaluation.graphs import drawing, settings
    from realflow.evaluation.models import weights
    from realflow.evaluation.problems import read_problems

    if args.limit < 0:
        raise InputError(Problem(f"found {args.limit}, expected 0 (all) or more", where="--limit"))
    if args.samples is not None and args.samples < 0:
        raise InputError(Problem(f"found {args.samples}, expected 0 or more", where="--samples"))
    if args.samples == 0 and not args.greedy:
        raise InputError(Problem("0 samples and no greedy answer leave nothing to draw", where="--samples"))
    against = None if args.against is None else read_samples(Path(args.against))
    asked = _asked(args)
    ks = _ks(args.pass_at, asked.samples)
    problems = read_problems(asked.sets)
    if not problems.rows:
        raise InputError(Problem("there are no problems", where="--data"))
    kinds = [greedy for greedy in (False, True) if (args.greedy if greedy else asked.samples)]
    for greedy in kinds:  # before anything is written: what is wrong with the graph
        drawing(asked, list(problems.rows[0]), range(len(problems.rows)), len(problems.rows), greedy=greedy)
    kept = settings(asked, problems.digest, len(problems.rows), greedy=args.greedy)
    kept["weights"] = weights(asked.graph)
    folder = Folder(Path(args.output) if args.output else Path("evaluations") / _title(args))
    with _owned(folder.path):
        folder.begin(kept, problems, samples=asked.samples, seed=asked.seed)
        for greedy in kinds:
            _draw(folder, asked, problems, args, greedy=greedy)
        _results(folder, asked, args, ks, against)


def _asked(args: argparse.Namespace) -> Asked:
    """The graph, with what the options say."""
    from realflow.evaluation.formats import Wishes, open_format
    from realflow.evaluation.graphs import ask
    from realflow.evaluation.models import model_folder

    name = args.what
    own = Path(name).suffix in (".yaml", ".yml") or name in shipped_graphs()
    given = [] if own else [f"model={model_folder(name)}"]
    graph = api.load_graph(find_graph(name if own else GRAPH), [*given, *args.overrides])
    flags = {"samples": args.samples, "temperature": args.temperature, "top_p": args.top_p,
             "max_new_tokens": args.max_new_tokens}  # fmt: skip
    whole = args.reward is not None and ":" in args.reward
    wishes = Wishes(_columns(args.columns), args.prompt, args.limit, whole)
    opened = [open_format(data, wishes) for data in args.data]
    if not opened and (args.columns or args.prompt is not None):
        where = "--columns" if args.columns else "--prompt"
        raise InputError(Problem("is for problems that --data names", where=where))
    rewards = list(dict.fromkeys(item.reward for item in opened))
    if args.reward is None and len(rewards) > 1:
        message = (
            f"these problems are judged by {' and '.join(rewards)}; evaluate them apart, or name one reward"
        )
        raise InputError(Problem(message, where="--data"))
    usual = rewards[0] if rewards and not own else None
    return ask(
        graph,
        sets=[item.problems for item in opened],
        reward=args.reward or usual,
        sampling={key: value for key, value in flags.items() if value is not None},
        seed=args.seed,
        limit=args.limit,
    )


def _columns(text: str) -> dict[str, str]:
    """`problem=query,answer=gold` as a mapping."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        role, equals, column = part.partition("=")
        if not (role and equals and column):
            message = f"found {part!r}, expected a role and its column, such as problem=question"
            raise InputError(Problem(message, where="--columns"))
        found[role] = column
    return found


def _ks(text: str | None, samples: int) -> tuple[int, ...]:
    """The k of pass@k, each at most the number of samples."""
    if text is None:
        return tuple(sorted({k for k in (1, 8, samples) if 1 <= k <= samples}))
    parts = text.split(",")
    if not all(part.isdigit() and 1 <= int(part) <= samples for part in parts):
        message = (
            f"found {text!r}, expected numbers from 1 to the {samples} samples of a problem, such as 1,8"
        )
        raise InputError(Problem(message, where="--pass-at"))
    return tuple(sorted({int(part) for part in parts}))


def _title(args: argparse.Namespace) -> str:
    """What an evaluation is called: its model, and its problems where they are named."""
    parts = [part for part in Path(args.what).parts if part not in (".", "..", "/", "runs", "checkpoints")]
    model = "-".join(parts[-3:]).removesuffix(".yaml")
    return "-".join([model, *(Path(data).stem for data in args.data)])


def _owned(path: Path) -> Any:
    """The folder, held for this process alone."""
    from realflow.runtime.directory import owned

    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(Problem(f"cannot be made: {error.strerror}", file=str(path))) from None
    return owned(path)


def _draw(
    folder: Folder, asked: Asked, problems: Problems, args: argparse.Namespace, *, greedy: bool
) -> None:
    """Draw the answers that are missing: those at the temperature, or the greedy ones."""
    from realflow.evaluation.graphs import drawing
    from realflow.launch.local import supervise

    samples = 1 if greedy else asked.samples
    places = folder.missing(problems, samples=samples, greedy=greedy)
    if not places:
        return
    total = len(problems.rows)
    graph = drawing(asked, list(problems.rows[0]), places, total, greedy=greedy)
    plan = check_runnable(
        api.plan(
            graph, devices=args.devices, cluster=args.cluster, layouts=parse_layouts(args.layout), say=say
        )
    )
    run = folder.next_run(greedy)
    if not args.quiet:
        what = "greedy answers" if greedy else f"{samples} answers each"
        there = "" if len(places) == total else f" ({total - len(places)} have theirs)"
        say(f"{what} to {len(places)} problems{there}")
    try:
        with folder.following(run, samples=samples, greedy=greedy, seed=asked.seed):
            supervise(plan, run, quiet=args.quiet)
    except RunError as error:
        hint = f"What was drawn is kept: the same command goes on in {folder.path}"
        raise RunError(f"{error}\n{hint}") from error
    left = folder.missing(problems, samples=samples, greedy=greedy)
    if left:
        raise RunError(f"{run}: the run has ended, but {len(left)} problems lack answers")


def _results(
    folder: Folder,
    asked: Asked,
    args: argparse.Namespace,
    ks: Sequence[int],
    against: Sequence[Sample] | None,
) -> None:
    """Sum up, write the results and print them."""
    from rich.console import Console

    from realflow.evaluation import table
    from realflow.evaluation.folder import changed_problems, read_settings
    from realflow.evaluation.graphs import protocol
    from realflow.evaluation.summary import difference, summary, to_mapping

    found = summary(folder.samples, ks=ks, solved=args.solved)
    title = protocol(asked, args.what, greedy=args.greedy)
    tables, notes = [(title, table.rows(found))], table.notes(found, limit=asked.max_new_tokens)
    results: dict[str, Any] = {"protocol": title, "settings": read_settings(folder.path)}
    results["scores"] = to_mapping(found)
    if against is not None:
        less = difference(folder.samples, against, ks=ks, solved=args.solved)
        how = f"Higher than {args.against} by (* the interval leaves out 0)"
        tables.append((how, table.difference_rows(less, whole=found.whole)))
        notes += table.difference_notes(less, changed_problems(folder.path, Path(args.against)))
        results["against"] = {"folder": args.against, **to_mapping(less)}
    folder.finish(results, table.page(tables, notes))
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, _PLAIN_WIDTH)
    for title, rows in tables:
        console.print(title, markup=False, soft_wrap=True)
        console.print(table.rich_table(rows))
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    print(f"results: {folder.path / 'results.md'}")
