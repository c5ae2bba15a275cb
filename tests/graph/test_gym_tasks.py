"""The table of reasoning-gym's tasks is that of the installed package."""

import dataclasses

from reasoning_gym.factory import DATASETS

from realflow.graph.gymtasks import OTHER_ROWS, ROWS, TASKS


def test_tasks_options_and_sizes() -> None:
    fields = {name: dataclasses.fields(config) for name, (_, config) in DATASETS.items()}
    assert {name: text.split() for name, text in TASKS.items()} == {
        name: [field.name for field in found] for name, found in fields.items()
    }
    sizes = {name: next(f.default for f in found if f.name == "size") for name, found in fields.items()}
    assert {name: OTHER_ROWS.get(name, ROWS) for name in TASKS} == sizes
