"""Write realflow/graph/gymtasks.py from the installed reasoning-gym: `python scripts/gym_tasks.py`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import textwrap
from pathlib import Path

HEAD = '''"""Tasks of reasoning-gym and their options, as data: its import takes longer than a check may.

Written by scripts/gym_tasks.py from reasoning-gym {version}; a test holds it equal to the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ROWS = {rows}
"""Rows of a task, where neither `size` nor `OTHER_ROWS` says otherwise."""

OTHER_ROWS: Mapping[str, int] = MappingProxyType({others})

TASKS: Mapping[str, str] = MappingProxyType(
    {{
'''


def main() -> None:
    """Write the module beside this script's package."""
    from reasoning_gym.factory import DATASETS

    sizes, lines = {}, []
    for name, (_, config) in sorted(DATASETS.items()):
        options = {field.name: field.default for field in dataclasses.fields(config)}
        sizes[name] = options["size"]
        texts = textwrap.wrap(" ".join(options), 90, break_long_words=False)
        parts = [f'"{text} "' for text in texts[:-1]] + [f'"{texts[-1]}"']
        body = (
            parts[0]
            if len(parts) == 1
            else "(\n" + "\n".join(f"            {p}" for p in parts) + "\n        )"
        )
        if len(parts) == 1 and len(name) + len(body) > 96:
            body = f"(\n            {body}\n        )"
        lines.append(f'        "{name}": {body},')
    rows = max(set(sizes.values()), key=list(sizes.values()).count)
    others = {name: size for name, size in sizes.items() if size != rows}
    head = HEAD.format(
        version=importlib.metadata.version("reasoning-gym"),
        rows=rows,
        others=str(others).replace("'", '"'),
    )
    tail = '    }\n)\n"""Task -> the names of its options, separated by spaces."""\n'
    target = Path(__file__).parent.parent / "realflow" / "graph" / "gymtasks.py"
    target.write_text(head + "\n".join(lines) + "\n" + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
