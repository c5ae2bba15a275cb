"""`realflow models`: list and fetch."""

from __future__ import annotations

import argparse

from realflow.commands.common import AddCommand
from realflow.models.fetch import fetch, listing
from realflow.models.paths import models_dir


def add_commands(add: AddCommand) -> None:
    """Add the commands of this module."""
    parser = add(
        "models",
        run_models,
        "list models, or fetch one into the cache",
        "realflow models fetch smollm2-135m-instruct",
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=["list", "fetch"],
        default="list",
        metavar="list|fetch",
        help="what to do",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the model to fetch, a name that list shows")
    parser.description = (
        "List the models that a graph can name, or fetch one into the cache.\n\n"
        "  list   every model that RealFlow knows or the cache holds (the default)\n"
        "  fetch  put a known model into the cache; it takes only the names that list shows\n\n"
        "A graph's models.NAME.path takes these names, and also the folder of any Hugging Face model\n"
        "(beside the graph file, or in the current folder) and hub ids such as org/name, which are\n"
        "downloaded when they are first used."
    )


def run_models(args: argparse.Namespace) -> None:
    """List known and cached models, or fetch one."""
    if (args.action == "fetch") != (args.name is not None):
        args.parser.error("expected: realflow models, or realflow models fetch NAME")
    if args.action == "fetch":
        fetch(args.name)
        return
    rows = listing()
    width = max(len(row[0]) for row in rows)
    for name, about, size, cached in rows:
        where = "cached" if cached else "not fetched" if size is not None else "not made"
        shown = f"{size / 1e6:6.0f} MB" if size is not None else " " * 9
        print(f"{name:{width}}  {shown}  {where:11}  {about}".rstrip())
    print(f"cache: {models_dir()}")
