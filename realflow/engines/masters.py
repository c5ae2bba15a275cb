"""This rank's shard of the master weights and their optimizer: ZeRO-1's part of the state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from realflow.engines.norms import counts
from realflow.engines.optimizer import FlatAdamW
from realflow.engines.shards import Arrangement
from realflow.graph.types import OptimizerSpec
from realflow.layout import Box, flat_boxes
from realflow.models.causal import CausalModel, master_values
from realflow.models.residence import Residence


@dataclass(frozen=True)
class Shard:
    """One box (in the full tensor) of a parameter that this rank has the masters of.

    `tensors` has `master`, `exp_avg` and `exp_avg_sq`, of the box's shape, sharing memory with the
    optimizer. Of boxes that several ranks hold alike, one rank's `counted` is true.
    """

    name: str
    box: Box
    tensors: Mapping[str, torch.Tensor]
    counted: bool


class Masters:
    """Masters and moments of what `arrangement` gives this rank.

    `runs` says where in gradients and compute weights they lie. Where the model computes in the
    masters' dtype (float32, or float64 for float64 models), its weights are the masters.
    """

    def __init__(self, model: CausalModel, arrangement: Arrangement, spec: OptimizerSpec) -> None:
        self._model, self._arrangement = model, arrangement
        self.dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.runs = arrangement.owned(model.place.dp.index)
        weights = [model.flat.storage[run.flat : run.flat + run.size] for run in self.runs]
        self._own: list[torch.Tensor] = []
        if model.dtype == self.dtype:
            masters = weights
        else:
            self._own = [
                torch.empty(sum(run.size for run in self.runs), dtype=self.dtype, device=model.device)
            ]
            masters = list(self._own[0].split([run.size for run in self.runs]))
            for run, master in zip(self.runs, masters, strict=True):
                master.copy_(master_values(model, run.flat, run.flat + run.size, self.dtype))
        self._weights, self._masters = weights, masters
        self._optimizer = FlatAdamW(masters, spec, list(self._decayed()))
        moments = (self._optimizer.exp_avg, self._optimizer.exp_avg_sq)
        self._residences = [Residence(tensor) for tensor in (*self._own, *moments)]

    def step(self, gradients: Sequence[torch.Tensor], lr: float) -> None:
        """One AdamW step from a gradient for each run, then `spread`."""
        assert all(one.where == "here" for one in self._residences), "the masters are offloaded"
        self._optimizer.step(gradients, lr)
        self.spread()

    @torch.no_grad()
    def spread(self) -> None:
        """Masters -> this rank's compute weights -> those of all data-parallel ranks."""
        if self._own:
            torch._foreach_copy_(self._weights, self._masters)
        axis, flat = self._model.place.dp, self._model.flat.storage
        if axis.size == 1:
            return
        for bucket in self._arrangement.buckets:
            first, last = self._arrangement.part(bucket, axis.index)
            mine = flat.new_zeros(last - first)
            for order, start, size in self._arrangement.within(first, last):
                mine[order - first : order - first + size] = flat[start : start + size]
            runs = list(self._arrangement.within(*bucket))
            size = bucket[1] - bucket[0]
            if len(runs) == 1 and runs[0].size == size:  # it lies in one piece where it belongs
                dist.all_gather_single(flat[runs[0].flat : runs[0].flat + size], mine, group=axis.group)
                continue
            whole = flat.new_empty(size)
            dist.all_gather_single(whole, mine, group=axis.group)
            for order, start, size in runs:
                flat[start : start + size] = whole[order - bucket[0] : order - bucket[0] + size]

    def shards(self) -> Iterator[Shard]:
        """Every box that this rank holds, in no order that matters."""
        boxes, optimizer, here = self._model.trained.boxes, self._optimizer, 0
        for run, master in zip(self.runs, self._masters, strict=True):
            held = {
                "master": master.detach(),
                "exp_avg": optimizer.exp_avg[here : here + run.size],
                "exp_avg_sq": optimizer.exp_avg_sq[here : here + run.size],
            }
            here += run.size
            for name, first, last, order in self._arrangement.names(run.order, run.order + run.size):
                at = order - run.order
                origin = boxes[name]
                for local in flat_boxes(self._arrangement.slots[name].shape, first, last):
                    shape = [stop - start for start, stop in local]
                    box = tuple((a + o[0], b + o[0]) for (a, b), o in zip(local, origin, strict=True))
                    size = torch.Size(shape).numel()
                    tensors = {kind: t[at : at + size].view(shape) for kind, t in held.items()}
                    at += size
                    counted = counts(self._arrangement, self._model.place, run.order)
                    yield Shard(name, box, tensors, counted)

    def loaded(self, version: int) -> None:
        """The tensors of `shards` have been written: those of a run after `version` steps."""
        self._optimizer.set_step(version)
        self.spread()

    def offload(self) -> None:
        """Move masters (where they are not the compute weights) and moments to host memory."""
        for residence in self._residences:
            residence.offload()

    def restore(self) -> None:
        """Bring them back; views of them are valid again."""
        for residence in self._residences:
            residence.restore()

    def _decayed(self) -> Iterator[torch.Tensor]:
        """What of the masters belongs to matrices: vectors (norms, biases) are not decayed."""
        for run, master in zip(self.runs, self._masters, strict=True):
            for name, first, last, order in self._arrangement.names(run.order, run.order + run.size):
                if len(self._arrangement.slots[name].shape) > 1:
                    yield master[order - run.order : order - run.order + last - first]
