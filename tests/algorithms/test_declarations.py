"""What the graph room says of built-in functions is what the functions take."""

import inspect
from inspect import Parameter

import pytest

from realflow.algorithms import kl
from realflow.engines.functions import load_callable
from realflow.graph.builtins import BUILTINS, KL

NAMES = [name for name, decl in BUILTINS.items() if decl.kind != "output"]


def mismatches(decl, function):
    """Where a declaration and a function's parameters differ, in words."""
    parameters = inspect.signature(function).parameters
    optional = {use.name for use in decl.reads if use.optional}
    declared = {use.name for use in decl.reads} | set(decl.needs)
    options = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and name not in declared
    }
    defaults = {
        name
        for name, parameter in parameters.items()
        if name in declared and parameter.default is not Parameter.empty
    }
    found = []
    if set(parameters) - set(options) - {"lengths"} != declared:
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


def test_kinds_of_kl():
    assert KL == kl.KINDS
