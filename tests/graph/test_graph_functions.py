"""Declarations: decorators, rewards told apart by their signatures, and how functions are found."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from realflow.errors import InputError
from realflow.graph.builtins import BUILTINS
from realflow.graph.functions import declaration, declare, function, load_function, loss, resolve
from realflow.graph.types import FieldUse, FunctionDecl


def test_function_declares_reads_writes_scope_and_options() -> None:
    @function(
        reads={
            "rewards": "sample float",
            "group_ids": "sample int field=group_id",
            "bonus": "sample float optional",
        },
        writes={"advantages": "sample float field=credit"},
        scope="group",
    )
    def credit(rewards, group_ids, lengths, bonus=None, *, scale=1.0, mode: Literal["a", "b"] = "a"): ...

    assert declaration(credit) == FunctionDecl(
        credit.__qualname__,
        "function",
        reads=(
            FieldUse("rewards", "rewards", "sample", "float"),
            FieldUse("group_ids", "group_id", "sample", "int"),
            FieldUse("bonus", "bonus", "sample", "float", optional=True),
        ),
        writes=(FieldUse("advantages", "credit", "sample", "float"),),
        scope="group",
        options={"scale": 1.0, "mode": "a"},
        choices={"mode": ("a", "b")},
    )
    assert declare(credit, "m:credit").name == "m:credit"


def test_loss_declares_needs() -> None:
    @loss(reads={"old": "token float field=logprobs"}, needs=("logprobs", "entropy"))
    def mine(old, logprobs, *, entropy, clip=0.2): ...

    found = declaration(mine)
    assert found is not None
    assert (found.kind, found.needs, found.options) == ("loss", ("logprobs", "entropy"), {"clip": 0.2})


@pytest.mark.parametrize(
    ("reads", "writes", "scope", "of", "part"),
    [
        ({"a": "sample floot"}, {"b": "sample float"}, "sample", lambda a: a, "'<extent> <dtype>'"),
        ({"a": "batch float"}, {"b": "sample float"}, "sample", lambda a: a, "'<extent> <dtype>'"),
        ({"a": "sample"}, {"b": "sample float"}, "sample", lambda a: a, "such as 'sample float'"),
        ({"a": "sample float x"}, {"b": "sample float"}, "sample", lambda a: a, "field=<name> or optional"),
        ({"a": "sample float field=1"}, {"b": "sample float"}, "sample", lambda a: a, "field=<name>"),
        ({"a": "sample float"}, {}, "sample", lambda a: a, "writes nothing"),
        ({"a": "sample float"}, {"b": "sample float"}, "world", lambda a: a, "scope 'world'"),
        ({"a": "sample float"}, {"b": "sample float"}, "sample", lambda b: b, "'a' is declared"),
        ({"a": "sample float"}, {"b": "sample float"}, "sample", lambda a, c: a, "'c' is neither declared"),
        ({"a": "sample float"}, {"b": "sample float"}, "sample", lambda a, c=1: a, "'c' is neither declared"),
        ({"a": "sample float optional"}, {"b": "sample float"}, "sample", lambda a: a, "needs a default"),
    ],
)  # fmt: skip
def test_declarations_that_do_not_fit_are_refused(reads, writes, scope, of, part: str) -> None:
    with pytest.raises(InputError, match="declaration of") as caught:
        function(reads=reads, writes=writes, scope=scope)(of)
    assert part in str(caught.value)


def test_unknown_needs_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'entropy'"):
        loss(reads={}, needs=("entropi",))(lambda entropi: entropi)


def trl_plain(completions, answer, **kwargs): ...


async def trl_async(completions, prompts=None, target=None, *, scale=1.0): ...


def trl_ids(completions, completion_ids): ...


def verl(data_source, solution_str, ground_truth, extra_info=None): ...


def verl_more(data_source, solution_str, ground_truth, extra_info=None, *, strict=False, **kwargs): ...


def uses(decl: FunctionDecl) -> dict[str, tuple[str, bool]]:
    return {use.name: (use.field, use.optional) for use in decl.reads}


def test_rewards_are_told_apart_by_their_parameters() -> None:
    plain = declare(trl_plain, "m:f")
    assert (plain.kind, plain.scope, plain.takes_columns) == ("reward", "sample", True)
    assert plain.reads[0] == FieldUse("completions", "completion", "sample", "text")
    assert plain.writes == (FieldUse("rewards", "rewards", "sample", "float"),)
    assert uses(plain) == {
        "completions": ("completion", False),
        "answer": ("answer", False),
        "prompts": ("prompt", True),
    }

    other = declare(trl_async, "m:f")
    assert uses(other) == {
        "completions": ("completion", False),
        "prompts": ("prompt", True),
        "target": ("target", True),
    }
    assert (other.options, other.takes_columns) == ({"scale": 1.0}, False)

    assert set(uses(declare(trl_ids, "m:f"))) == {"completions", "tokens", "loss_mask"}

    wanted = {
        "data_source": ("data_source", True),
        "solution_str": ("completion", False),
        "ground_truth": ("answer", False),
        "extra_info": ("extra_info", True),
    }
    assert uses(declare(verl, "m:f")) == wanted
    more = declare(verl_more, "m:f")
    assert (uses(more), more.options, more.takes_columns) == (wanted, {"strict": False}, True)


@pytest.mark.parametrize(
    ("of", "part"),
    [
        (lambda a, b: 0, "no reward's signature"),
        (lambda: 0, "no reward's signature"),
        (lambda *completions: 0, "cannot be given by name"),
        (lambda solution_str: 0, "compute_score("),
    ],
)
def test_other_functions_need_a_declaration(of, part: str) -> None:
    with pytest.raises(InputError) as caught:
        declare(of, "m:f")
    assert part in str(caught.value)


def test_builtins_by_name() -> None:
    assert resolve("losses.sft") is BUILTINS["losses.sft"]
    with pytest.raises(InputError, match=r"did you mean 'advantages\.grpo'"):
        resolve("advantages.gpro")
    for name, decl in BUILTINS.items():
        assert decl.name == name
        assert set(decl.choices) <= set(decl.options) and set(decl.requires) <= set(decl.options)
        assert {use.name for use in decl.reads if use.optional} >= set(decl.requires.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "room_of_rewards.py").write_text(
        "class Score: pass\nNUMBER = 3\ndef exact(completions, answer): return [1.0 for _ in completions]\n"
    )
    (tmp_path / "room_that_fails.py").write_text("import os\n\nraise KeyError('what')\n")
    (tmp_path / "room_that_exits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "room_of_typos.py").write_text("def f(:\n")
    (tmp_path / "room_misdeclared.py").write_text(
        "from realflow.graph import function\n@function(reads={}, writes={})\ndef f(x): ...\n"
    )
    return tmp_path


def test_user_functions_are_imported_from_the_graphs_folder(folder: Path) -> None:
    before = list(sys.path)
    assert resolve("room_of_rewards:exact", folder).kind == "reward"
    assert sys.path == before
    assert load_function("room_of_rewards:exact", folder)(["a"], ["b"]) == [1.0]


def test_two_graphs_with_modules_of_one_name(tmp_path: Path) -> None:
    """Their own modules, and the modules that these import, at import and at call time."""
    for side, reads in (("a", "answer"), ("b", "target, *, scale=1.0")):
        room = tmp_path / side
        room.mkdir()
        (room / "my_helpers.py").write_text(f"SIDE = {side!r}\n")
        (room / "my_later.py").write_text(f"SIDE = {side!r}\n")
        (room / "my_rewards.py").write_text(
            "from dataclasses import dataclass\nfrom my_helpers import SIDE\n"
            f"@dataclass\nclass Row:\n    a: 'int'\n"
            f"def exact(completions, {reads}):\n    import my_later\n    return SIDE + my_later.SIDE\n"
        )
    one, other = (resolve("my_rewards:exact", tmp_path / side) for side in "ab")
    assert set(uses(one)) == {"completions", "answer"}
    assert (set(uses(other)), other.options) == ({"completions", "target"}, {"scale": 1.0})
    for side in "ab":  # as in a worker: the graph's folder ends the path
        sys.path.append(str(tmp_path / side))
        try:
            of = load_function("my_rewards:exact", tmp_path / side)
            assert of([], None) == side * 2
            assert load_function("my_rewards:exact", tmp_path / side) is of
        finally:
            sys.path.remove(str(tmp_path / side))
            sys.modules.pop("my_later", None)


def test_an_edited_file_is_read_afresh(tmp_path: Path) -> None:
    module, helper = tmp_path / "edited_rewards.py", tmp_path / "edited_helper.py"
    helper.write_text("NUMBER = 1\n")
    module.write_text("from edited_helper import NUMBER\ndef f(completions): return NUMBER + 1\n")
    assert load_function("edited_rewards:f", tmp_path)([]) == 2
    module.write_text(
        "from edited_helper import NUMBER\ndef f(completions): return NUMBER + 2\n"
    )  # same size
    assert load_function("edited_rewards:f", tmp_path)([]) == 3
    helper.write_text("NUMBER = 100\n")
    assert load_function("edited_rewards:f", tmp_path)([]) == 102


def test_files_beside_the_graph_shadow_nothing(tmp_path: Path) -> None:
    import random

    (tmp_path / "random.py").write_text("def f(completions): return 'mine'\n")
    (tmp_path / "colorsys.py").write_text("raise KeyError('shadowed')\n")
    (tmp_path / "draws_rewards.py").write_text(
        "import colorsys, random\n"
        "def f(completions): return random.random() < 1 and bool(colorsys.rgb_to_hls)\n"
    )
    sys.modules.pop("colorsys", None)
    assert load_function("draws_rewards:f", tmp_path)([]) is True
    assert load_function("random:f", tmp_path)([]) == "mine"
    assert sys.modules["random"] is random


@pytest.mark.parametrize("init", [True, False], ids=["package", "folder"])
def test_packages_beside_the_graph(tmp_path: Path, init: bool) -> None:
    room = tmp_path / "my_room"
    room.mkdir()
    if init:
        (room / "__init__.py").write_text("WORD = 'init'\n")
    (room / "words.py").write_text("WORD = 'word'\n")
    (room / "rewards.py").write_text("from .words import WORD\ndef f(completions): return WORD\n")
    assert load_function("my_room.rewards:f", tmp_path)([]) == "word"
    (room / "words.py").write_text("WORD = 'other word'\n")
    assert load_function("my_room.rewards:f", tmp_path)([]) == "other word"


def test_installed_packages_are_imported_by_their_own_name() -> None:
    """Also where the graph's folder is the one that they are installed from."""
    from realflow.graph.functions import declare as same

    root = Path(__file__).resolve().parents[2]
    assert load_function("json:dumps", root).__module__ == "json"
    assert load_function("realflow.graph.functions:declare", root) is same


@pytest.mark.parametrize(
    ("use", "part"),
    [
        ("room_of_rewards:exakt", "did you mean 'exact'?"),
        ("room_of_rewards:NUMBER", "found int, expected a function"),
        ("room_of_rewards:Score", "expected a function"),
        ("no_such_room:f", "ModuleNotFoundError: No module named 'no_such_room'"),
        ("room_that_fails:f", "KeyError: 'what'"),
        ("room_that_fails:f", "room_that_fails.py:3)"),
        ("room_that_exits:f", "SystemExit: 3"),
        ("room_of_typos:f", "SyntaxError"),
        ("room_misdeclared:f", "'x' is neither declared"),
        ("room_of_rewards.py:exact", "room_of_rewards.py"),
        ("./rewards.py:exact", "is not a function's name"),
        ("rewards:exact()", "is not a function's name"),
    ],
)
def test_what_cannot_be_imported_is_an_input_error(folder: Path, use: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(use, folder)
    assert part in str(caught.value)


def test_declaring_functions_needs_no_torch() -> None:
    script = (
        "import sys, realflow.graph.functions; print('torch' in sys.modules or 'networkx' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stdout.strip() == "False"
