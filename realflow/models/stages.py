"""Pipeline stages: a Hugging Face model of which one rank computes some layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Elsewhere(nn.Module):
    """Stands for a module that another stage computes: hands its first input on.

    The one in place of layer 0 hands on `entering`, the hidden states that the stage before has sent,
    so that what a model does between embedding and first layer (scales) is not done again.
    """

    def __init__(self, *, is_entry: bool = False) -> None:
        super().__init__()
        self.is_entry = is_entry

    def forward(
        self, *inputs: torch.Tensor, entering: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """`entering` where it is given to layer 0, else the input."""
        return entering if self.is_entry and entering is not None else inputs[0]


def send_elsewhere(root: nn.Module, held: Sequence[str], first_layer: str) -> None:
    """Replace every module whose parameters are all missing in `held` by `Elsewhere`.

    `first_layer` names layer 0 (`model.layers.0`), where the hidden states of the stage before enter.
    """
    names = set(held)

    def visit(prefix: str, module: nn.Module) -> None:
        for leaf, child in module.named_children():
            name = f"{prefix}{leaf}"
            parameters = [f"{name}.{key}" for key, _ in child.named_parameters()]
            if not parameters:
                continue
            if names.isdisjoint(parameters):
                if isinstance(child, nn.ModuleList):
                    visit(f"{name}.", child)
                else:
                    setattr(module, leaf, Elsewhere(is_entry=name == first_layer))
            elif not names.issuperset(parameters):
                visit(f"{name}.", child)

    visit("", root)


def keeps_stages(model: Any) -> bool:
    """Whether hidden states go from layer to layer unchanged, so that layers can be cut into stages.

    `model` (on the meta device, attention and masks aside) is taken apart: with nothing but `Elsewhere`
    in place of its layers, what enters must come out, the same tensor.
    """
    base = model.base_model
    lists = [name for name, part in base.named_modules() if isinstance(part, nn.ModuleList)]
    if not lists or not any("input_ids" in inputs for inputs, _ in model.pp_plan.values()):
        return False
    states = torch.empty(1, 2, model.config.get_text_config().hidden_size, dtype=model.dtype, device="meta")
    model.config._attn_implementation = "none"  # for which transformers makes no mask
    send_elsewhere(base, (), f"{lists[0]}.0")
    places = torch.arange(2, device="meta")[None]
    try:
        found = base(inputs_embeds=states, position_ids=places, use_cache=False, entering=states)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ):
        return False  # it reads of its layers or their outputs what stages do not have
    return found.last_hidden_state is states


@contextmanager
def recomputing(
    layers: Sequence[nn.Module], again: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    """While it is entered, a pass keeps only the inputs of `layers`, which backward computes again.

    `again` makes the context of a repeated pass.
    """
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward, again)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _checkpointed(
    forward: Callable[..., Any], again: Callable[[], AbstractContextManager[Any]], *args: Any, **kwargs: Any
) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with again():
            return forward(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
