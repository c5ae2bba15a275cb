"""All gradients of a rank in one flat buffer, filled by hooks while the backward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch

from realflow.engines.shards import Arrangement

Bucket = tuple[int, int]


class Gradients:
    """`data` holds the gradients of `parameters` in the order of `arrangement`, in `dtype`.

    Between `begin` and `finish` hooks add what each backward pass finds. Buckets of parameters that
    no other rank of the replica holds are handed out, from the last to the first, as soon as all
    their gradients are complete: `last` says when that may be.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], arrangement: Arrangement, dtype: torch.dtype
    ) -> None:
        device = next(iter(parameters.values())).device
        self.data = torch.zeros(arrangement.total, dtype=dtype, device=device)
        self._views: dict[str, torch.Tensor] = {}
        self._buckets_of: dict[str, list[Bucket]] = {name: [] for name in parameters}
        self._buckets = [bucket for bucket in arrangement.buckets if bucket[0] >= arrangement.whole]
        self._members = {
            bucket: {piece.name for piece in arrangement.names(*bucket)} for bucket in self._buckets
        }
        for bucket, names in self._members.items():
            for name in names:
                self._buckets_of[name].append(bucket)
        self._untouched: set[str] = set()
        self._missing: dict[Bucket, set[str]] = {}
        self._waiting: list[Bucket] = []
        self._final = False
        self._ready: Callable[[torch.Tensor], None] = lambda data: None
        self._hooks = []
        for name, parameter in parameters.items():
            others = getattr(parameter, "_post_accumulate_grad_hooks", None)
            assert not others, "another TrainEngine of this model has not been closed"
            place, size = arrangement.places[name], arrangement.slots[name].size
            self._views[name] = self.data[place : place + size].view(arrangement.slots[name].shape)
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))

    def close(self) -> None:
        """Leave the model's gradients alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def release(self) -> None:
        """Let go of the buffer's memory; its content is lost."""
        self.data.untyped_storage().resize_(0)

    def allocate(self) -> None:
        """Take memory again after `release`."""
        self.data.untyped_storage().resize_(self.data.numel() * self.data.itemsize)
        self.data.zero_()

    def begin(self, ready: Callable[[torch.Tensor], None]) -> None:
        """Forget the last step; `ready` is called with each complete bucket. The first gradient of
        each parameter replaces what is there."""
        self._untouched = set(self._views)
        self._missing = {bucket: set(names) for bucket, names in self._members.items()}
        self._waiting, self._final, self._ready = list(self._buckets), False, ready

    def last(self, pending: Collection[str] | None = None) -> None:
        """No parameter gets more than one further gradient; where `pending` is given, only these do."""
        self._final = True
        if pending is not None:
            self._complete(name for name in self._views if name not in pending)

    def finish(self) -> None:
        """There are no more gradients. Parameters that got none have gradient zero."""
        self._complete(self._views)

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add to what a parameter has."""
        if name in self._untouched:
            self._views[name].copy_(gradient)
            self._untouched.discard(name)
        else:
            self._views[name].add_(gradient)
        if self._final:
            self._complete((name,))

    def _complete(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._untouched:
                self._views[name].zero_()
                self._untouched.discard(name)
            for bucket in self._buckets_of[name]:
                self._missing[bucket].discard(name)
        while self._waiting and not self._missing[self._waiting[-1]]:
            start, stop = self._waiting.pop()
            self._ready(self.data[start:stop])

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def add(parameter: torch.Tensor) -> None:
            if parameter.grad is None:  # the layer has deferred it: `add` will bring it
                return
            self.add(name, parameter.grad)
            parameter.grad = None

        return add
