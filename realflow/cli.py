"""The commands. Exit codes: 0 done, 1 the run failed, 2 the input is wrong.

Checking, planning, explaining and drawing import no torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence

import realflow
from realflow.commands import evaluate, explain, graphs, models, plans, profile, runs
from realflow.errors import InputError, RunError

_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=.*", re.DOTALL)
Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments in one block only: the later overrides are left over.
    overrides = [item for item in rest if _OVERRIDE.fullmatch(item)]
    unknown = [item for item in rest if item not in overrides]
    if unknown or (overrides and not hasattr(args, "overrides")):
        args.parser.error(_unknown(unknown or overrides, args.parser))
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    try:
        args.command(args)
        sys.stdout.flush()
    except InputError as error:
        return _complain(error.problems, 2)
    except RunError as error:
        return _complain([error], 1)
    except KeyboardInterrupt:
        return _complain(["interrupted"], 1)
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _unknown(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What a command does not take, and what may have been meant."""
    known = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", parser.format_usage())))
    near = [
        close for word in words for close in difflib.get_close_matches(word.partition("=")[0], known, n=1)
    ]
    hint = f"; did you mean {' and '.join(near)}?" if near else ""
    return f"unrecognized arguments: {' '.join(words)}{hint}"


def _complain(problems: Sequence[object], code: int) -> int:
    for problem in problems:
        print(f"realflow: {problem}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="realflow",
        description="Train language models with reinforcement learning from a graph of calls.",
        epilog="example:\n  realflow run grpo steps=2 --devices 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"realflow {realflow.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Command, help: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=command, parser=sub)
        return sub

    graphs.add_commands(add)
    plans.add_commands(add)
    explain.add_command(add)
    runs.add_commands(add)
    evaluate.add_command(add)
    models.add_commands(add)
    profile.add_commands(add)
    return parser
