"""The graph's call `credit`: fields of samples in, fields of tokens out, as the runtime runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from realflow.algorithms.credit import gae
from realflow.engines.functions import FunctionError, load_callable, run_function
from realflow.graph import find_graph, load_graph
from realflow.graph.types import Graph

LENGTHS = [4, 2, 3]
IDS = [7, 3, 12]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return load_graph(find_graph("ppo"))


def columns() -> dict[str, list[Any]]:
    """A value of each field that the call reads, for each sample."""
    generator = torch.Generator().manual_seed(2)
    drawn = {
        name: [torch.randn(length, generator=generator) for length in LENGTHS]
        for name in ("values", "logprobs", "ref_logprobs")
    }
    return {
        **drawn,
        "loss_mask": [torch.arange(length) > 0 for length in LENGTHS],
        "rewards": [1.0, None, 0.25],
        "finish_reason": ["stop", "stop", "length"],
        "kl_coef": [0.02] * 3,
        "return_mean": [0.5] * 3,
        "return_std": [2.0] * 3,
    }


def run(graph: Graph, values: dict[str, list[Any]], fn: Callable[..., Any] = gae) -> dict[str, list[Any]]:
    return run_function(fn, graph.call("credit"), IDS, values, LENGTHS, graph.extents, graph.dtypes)


def test_each_sample_gets_its_tokens(graph: Graph) -> None:
    values = columns()
    found = run(graph, values, load_callable("credit.gae"))
    assert set(found) == {"advantages", "returns"}
    wanted = gae(
        torch.tensor([1.0, float("nan"), 0.25], dtype=torch.float64),
        torch.cat(values["values"]),
        torch.cat(values["loss_mask"]),
        values["finish_reason"],
        torch.tensor(LENGTHS),
        logprobs=torch.cat(values["logprobs"]),
        ref_logprobs=torch.cat(values["ref_logprobs"]),
        kl_coefs=torch.full((3,), 0.02),
        return_mean=torch.full((3,), 0.5),
        return_std=torch.full((3,), 2.0),
        gamma=1.0, lam=0.95,
    )  # fmt: skip
    for name, column in found.items():
        assert [len(entry) for entry in column] == LENGTHS
        assert column[0].dtype == torch.float32  # that of the values
        torch.testing.assert_close(torch.cat(column), wanted[name])
    assert (found["advantages"][1] == 0).all()  # a sample without a reward
    assert found["advantages"][0].abs().sum() > 0


def test_the_options_of_the_graph_arrive(graph: Graph) -> None:
    call = graph.call("credit")
    other = replace(graph, calls=tuple(replace(c, options={**c.options, "lam": 0.5}) for c in graph.calls))
    assert call.options["whiten"] is True and call.decl.scope == "batch"
    first, second = run(graph, columns())["returns"], run(other, columns())["returns"]
    assert (torch.cat(first) - torch.cat(second)).abs().max() > 0.01


def test_what_is_not_finite_names_the_sample(graph: Graph) -> None:
    values = columns()
    values["values"][2][1] = float("nan")
    with pytest.raises(FunctionError, match=r"credit\.gae: sample 12: returned nan for returns at token 1"):
        run(graph, values)
    call = replace(graph.call("credit"), options={**graph.call("credit").options, "gamma": 2.0})
    other = replace(graph, calls=tuple(call if c.name == "credit" else c for c in graph.calls))
    with pytest.raises(FunctionError, match="gamma must be a number from 0 to 1, not 2"):
        run(other, columns())
