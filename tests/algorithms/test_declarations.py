"""What the graph room says of built-in functions is what the functions take."""

import inspect
import math
from inspect import Parameter

import pytest
import torch

from realflow.algorithms import kl
from realflow.engines.functions import load_callable
from realflow.errors import InputError
from realflow.graph.builtins import BUILTINS
from realflow.graph.lossdecls import KL
from realflow.graph.types import Range

NAMES = [name for name, decl in BUILTINS.items() if decl.kind != "output"]


def mismatches(decl, function):
    """Where a declaration and a function's parameters differ, in words."""
    parameters = inspect.signature(function).parameters
    optional = {use.name for use in decl.reads if use.optional}
    declared = {use.name for use in decl.reads} | set(decl.needs) | ({"state"} if decl.state else set())
    options = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and name not in declared
    }
    defaults = {
        name
        for name, parameter in parameters.items()
        if name in declared - set(decl.needs) and parameter.default is not Parameter.empty
    }
    found = []
    given = {"lengths", "mask"} if decl.kind == "loss" else {"lengths"}
    if set(parameters) - set(options) - given != declared:
        found.append(f"parameters {set(parameters) - set(options)} are not the reads and needs {declared}")
    if options != dict(decl.options):
        found.append(f"options {options} are not {dict(decl.options)}")
    if defaults != optional:
        found.append(f"parameters with defaults {defaults} are not the optional reads {optional}")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_declaration_equals_function(name):
    assert mismatches(BUILTINS[name], load_callable(name)) == []


def test_a_difference_is_noticed():
    """The control: the declaration of one function does not fit another."""
    assert mismatches(BUILTINS["losses.sft"], load_callable("losses.ppo_clip"))
    assert mismatches(BUILTINS["advantages.grpo"], lambda rewards, group_ids, *, eps=1e-5, scale=True: 0)


PROBES = sorted({*(x + d for x in (-1.0, 0.0, 1.0) for d in (-1e-9, 0.0, 1e-9)), -7.0, 0.5, 7.0})
VALUES = {
    "lengths": torch.tensor([1, 2]),
    "rewards": torch.tensor([1.0, 2.0]),
    "kl_coefs": torch.tensor([0.0, 0.0]),
    "return_mean": torch.tensor([0.0, 0.0]),
    "return_std": torch.tensor([1.0, 1.0]),
    "group_ids": torch.tensor([0, 0]),
    "loss_mask": torch.tensor([False, True, True]),
    "finish_reason": ["stop", "length"],
    "mask": torch.tensor([False, True, True]),
    "chosen": torch.tensor([True, False]),
    "selected": torch.tensor([True, False]),
    # Rewards of texts: of none, since it is their options that are asked about.
    **dict.fromkeys(
        ["completion", "answer", "tests", "prompt", "test", "entry_point", "numbers", "target", "entry"], ()
    ),
}


def refused(name, option, value):
    """Whether the function, called with tensors, refuses a value of an option."""
    of = load_callable(name)
    parameters = inspect.signature(of).parameters
    declared = [use.name for use in BUILTINS[name].reads] + list(BUILTINS[name].needs)
    taken = [key for key in (*declared, "lengths", "mask") if key in parameters]
    given = {key: VALUES.get(key, torch.zeros(3)) for key in taken}
    given |= {"state": dict(BUILTINS[name].state)} if BUILTINS[name].state else {}
    try:
        of(**given, **{option: value})
    except InputError as error:
        assert option in str(error)
        return True
    return False


@pytest.mark.parametrize("name", NAMES)
def test_declared_ranges_are_what_functions_refuse(name):
    """Every option that is a number, on both sides of each bound: also those without a range."""
    decl = BUILTINS[name]
    for option, default in decl.options.items():
        if isinstance(default, float) or option in decl.ranges:
            wanted = decl.ranges.get(option, Range())
            found = {value for value in PROBES if not refused(name, option, value)}
            assert found == {value for value in PROBES if value in wanted}, option
            assert default is None or default in wanted
    assert decl.ranges.keys() <= decl.options.keys()


def test_ranges_in_words():
    assert math.nan not in Range(least=0) and math.inf not in Range(most=1)
    assert [str(Range(0, 1)), str(Range(least=0)), str(Range(above=1))] == [
        "a number from 0 to 1",
        "a number >= 0",
        "a number above 1",
    ]


def test_kinds_of_kl():
    assert KL == kl.KINDS
