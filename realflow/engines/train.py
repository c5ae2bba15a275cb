"""One optimizer step from packed micro-batches, under any data × tensor × pipeline layout.

    denominators (all-reduce over dp)
    -> forward and backward of each micro-batch by a pipeline schedule, gradients added into one flat
       float32 buffer; buckets that are complete are reduce-scattered (SUM) over dp beside the backward
       of the last micro-batch
    -> partial gradients summed over tp, tied ones over first and last stage, these buckets reduced too
    -> global norm, clipping -> AdamW on this rank's shard of the float32 masters
    -> all-gather over dp into the compute weights

The loss is a sum over the tokens of the minibatch on all ranks, divided by their global number
beforehand; nothing is averaged over ranks or micro-batches, so neither changes the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from realflow.data.batch import Batch, to_tokens
from realflow.engines.collectives import Reducer, all_names, all_sum
from realflow.engines.gradients import Gradients
from realflow.engines.infer import check_temperature, links, prepare, scores
from realflow.engines.links import Links
from realflow.engines.masters import Masters
from realflow.engines.norms import counts, culprits, square_sum
from realflow.engines.objective import OUTPUTS, Loss, Objective, Part, counts_of
from realflow.engines.optimizer import check_spec, learning_rate
from realflow.engines.pipeline import SCHEDULES, Action, orders
from realflow.engines.shards import BUCKET, arrange
from realflow.errors import InputError, RunError
from realflow.graph.types import Extent, Normalise, OptimizerSpec
from realflow.layout import Box
from realflow.models.causal import CausalModel, Packed
from realflow.models.deferred import WeightWork
from realflow.models.heads import values


class TrainEngine:
    """Trains `model`, or its adapters where it has any (`model.trained`), together with the other ranks of
    `model.place`, each of which has its part.

    `total_steps`, in optimizer steps, is needed by learning-rate schedules that end. `schedule` is
    the pipeline's, `1f1b` or `zero_bubble`; activation checkpointing and sequence parallelism are
    settings of the model. `bucket` is the most elements that are reduced at a time. `version` counts
    optimizer steps. All ranks of the mesh call `step` together. A model has one engine at a time;
    `close` frees it for another.
    """

    def __init__(
        self,
        model: CausalModel,
        spec: OptimizerSpec,
        *,
        total_steps: int | None = None,
        schedule: str = "1f1b",
        bucket: int = BUCKET,
    ) -> None:
        check_spec(spec, total_steps)
        if schedule not in SCHEDULES:
            raise InputError(f"schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
        if model.head_kind not in OUTPUTS:
            raise InputError(f"a model with head {model.head_kind!r} cannot be trained")
        self.model, self.spec, self.total_steps = model, spec, total_steps
        self.schedule, self.version, self._sequence = schedule, 0, model.sequence_parallel
        place, trained = model.place, model.trained
        cut, held = trained.cut, set(trained.slots)
        self.arrangement = arrange(
            trained.slots,
            place.dp.size,
            tied=held & set(cut.tied),
            partial=held & set(cut.partial(sequence=self._sequence)),
            whole={name for name in held if place.tp.size > 1 and cut.is_whole(name)},
            bucket=bucket,
        )
        self.masters = Masters(model, self.arrangement, spec)
        self._names = {id(parameter): name for name, parameter in trained.parameters.items()}
        self._gradients = Gradients(trained.parameters, self.arrangement, self.masters.dtype)
        self._reducer = Reducer(place.dp)

    def close(self) -> None:
        """End this engine; the model may get another."""
        self._gradients.close()
        self._reducer.close()

    def step(
        self,
        micro_batches: Sequence[Batch],
        loss: Loss,
        *,
        reads: Mapping[str, str],
        options: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        normalise: Normalise = "token",
        extents: Mapping[str, Extent] | None = None,
        prefix: str = "actor",
    ) -> dict[str, float]:
        """One optimizer step from this replica's micro-batches (any number, also none; the same, with
        all fields, on every rank of the replica). The other arguments are those of `Objective`.

        Returns metrics, equal on all ranks: `{prefix}/loss`, `entropy` (language models), `grad_norm`
        (before clipping), `lr` and each metric of the loss. Raises RunError, with the weights
        unchanged, where the minibatch has no loss token or a gradient is not finite.
        """
        objective = Objective(loss, reads, options or {}, temperature, normalise, extents or {})
        metrics = {**self.backward(micro_batches, objective), **self.update()}
        return {f"{prefix}/{name}": value for name, value in metrics.items()}

    def backward(self, micro_batches: Sequence[Batch], objective: Objective) -> dict[str, float]:
        """The first half of `step`: leaves the sum of all ranks' gradients in each rank's shard."""
        place, device = self.model.place, self.model.device
        assert self.model.sequence_parallel == self._sequence, "what is divided over tp has changed"
        if self.model.head_kind == "lm":
            check_temperature(objective.temperature)
        parts = [part for part in map(Part.of, micro_batches) if len(part.places)]
        totals = all_sum(counts_of(parts), place.dp, device)
        tokens, sequences = int(totals[0]), int(totals[1])
        if tokens == 0:
            raise RunError(f"optimizer step {self.version}: the minibatch has no loss token on any rank")
        self._gradients.begin(self._reducer.start)
        with self._splitting():
            run = _Run(self, parts, objective, tokens, sequences)
            for action in orders(self.schedule, place.pp.size, place.pp.index, len(parts)):
                run.act(action)
            run.ways.finish()
        self._gradients.finish()
        self._complete_shared()
        self._reducer.finish()
        return self._metrics(run.sums, tokens)

    @torch.no_grad()
    def update(self) -> dict[str, float]:
        """The second half of `step`: clip, update the masters, gather the weights everywhere."""
        place, device = self.model.place, self.model.device
        gradients = self.gradients()
        counted = (counts(self.arrangement, place, run.order) for run in self.masters.runs)
        mine = square_sum(g for g, counts_here in zip(gradients, counted, strict=True) if counts_here)
        norm = math.sqrt(all_sum([mine], place.everyone, device)[0])
        if not math.isfinite(norm):
            bad = culprits(self.arrangement, self.masters.runs, self._gradients.data)
            texts = (
                [f"rank {place.everyone.rank} in {', '.join(bad[:3])} ({len(bad)} parameters)"] if bad else []
            )
            where = all_names(texts, place.everyone, device)
            raise RunError(
                f"optimizer step {self.version}: the gradient is not finite (norm {norm}); "
                f"on {'; '.join(where[:4])}"
            )
        clip = self.spec.clip_norm
        if 0 < clip < norm and gradients:  # 0 turns clipping off; torch.nn.utils.clip_grad_norm_'s formula
            torch._foreach_mul_(gradients, clip / (norm + 1e-6))
        lr = learning_rate(self.spec, self.version, self.total_steps)
        self.masters.step(gradients, lr)
        self.version += 1
        return {"grad_norm": norm, "lr": lr}

    def gradients(self) -> list[torch.Tensor]:
        """This rank's shard of the gradient, a view for each of `masters.runs`."""
        return [self._gradients.data[run.order : run.order + run.size] for run in self.masters.runs]

    def boxes(self) -> dict[str, list[Box]]:
        """The boxes of each parameter whose masters this rank holds."""
        found: dict[str, list[Box]] = {}
        for shard in self.masters.shards():
            found.setdefault(shard.name, []).append(shard.box)
        return found

    def loaded(self, version: int) -> None:
        """The tensors of `masters.shards()` have been written on all ranks: go on from `version`."""
        self.masters.loaded(version)
        self.version = version

    def offload(self) -> None:
        """Move masters and moments to host memory and let go of their device memory, also of that of
        the gradients (whose content is lost). Nothing else may be called until `restore`."""
        self.masters.offload()
        self._gradients.release()

    def restore(self) -> None:
        """Bring back what `offload` moved, bit for bit."""
        self.masters.restore()
        self._gradients.allocate()

    @contextmanager
    def _splitting(self) -> Iterator[None]:
        """While it is entered, backward passes leave the weights' gradients to the schedule, if it
        has them apart."""
        deferred = self.model.deferred
        deferred.defer = self.schedule == "zero_bubble" and self.model.place.pp.size > 1
        try:
            yield
        finally:
            deferred.defer = False

    def _complete_shared(self) -> None:
        """Complete and reduce the gradients of parameters that several ranks of a replica hold."""
        self._sum_partial()
        self._sum_tied()
        for start, stop in reversed([b for b in self.arrangement.buckets if b[0] < self.arrangement.whole]):
            self._reducer.start(self._gradients.data[start:stop])

    def _sum_partial(self) -> None:
        """Once a step, in the one order of their names: each tensor rank has a part of these."""
        part = self._gradients.data[self.arrangement.tied : self.arrangement.partial]
        if len(part):
            dist.all_reduce(part, group=self.model.place.tp.group)

    def _sum_tied(self) -> None:
        """Once a step: the first stage has what the embedding brings, the last what the head does."""
        part, ends = self._gradients.data[: self.arrangement.tied], self.model.place.ends
        if len(part):
            assert ends is not None
            dist.all_reduce(part, group=ends.group)

    def _metrics(self, sums: Mapping[str, torch.Tensor], tokens: int) -> dict[str, float]:
        """Means over the minibatch's loss tokens, on all ranks. Only last stages, and of these every
        tensor rank alike, know sums; a replica without micro-batches knows not even the names."""
        everyone, device = self.model.place.everyone, self.model.device
        mine = sums if self.model.place.tp.index == 0 else {}
        names = sorted(set(all_names(sorted(mine), everyone, device)))
        totals = all_sum([float(mine.get(name, 0.0)) for name in names], everyone, device)
        return {
            name: total if name == "loss" else total / tokens
            for name, total in zip(names, totals, strict=True)
        }


class _Run:
    """The micro-batches of one step on this stage."""

    def __init__(
        self, engine: TrainEngine, parts: Sequence[Part], objective: Objective, tokens: int, sequences: int
    ) -> None:
        self.engine, self.model, self.parts, self.objective = engine, engine.model, parts, objective
        self._counts = tokens, sequences
        self.sums: dict[str, torch.Tensor] = {}
        self._packed: dict[int, Packed] = {i: prepare(self.model, part.batch) for i, part in enumerate(parts)}
        self.ways: Links = links(self.model, engine.schedule, self._packed.values())
        self._alive: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}  # input and output
        self._works: dict[int, WeightWork] = {}

    def act(self, action: Action) -> None:
        """Carry out one action of the schedule."""
        kind, index = action
        {"F": self._forward, "B": self._backward, "W": self._weights}[kind](index)

    def _forward(self, index: int) -> None:
        entering = self.ways.states(index)
        if entering is not None:
            entering.requires_grad_(True)
        states = self.model.run(self._packed.pop(index), entering)
        if not self.model.place.is_last:
            self.ways.send_states(index, states)
            self._alive[index] = entering, states
            return
        total, sums = self._loss(self.parts[index], states)
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self._alive[index] = entering, total

    def _loss(self, part: Part, states: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What this micro-batch adds to the minibatch's loss, and to sums over loss tokens."""
        if self.model.head_kind == "value":
            outputs = {"values": values(self.model, states)}
        elif self.model.head_kind == "reward":
            ends = part.batch.cu_seqlens[1:].long() - 1
            numbers = values(self.model, states.index_select(0, ends.to(states.device)))
            outputs = {"scores": to_tokens(numbers, part.batch.lengths.to(states.device))}
        else:
            stats = scores(self.model, states, part.batch, part.places, self.objective.temperature)
            places = part.places.to(states.device)
            outputs = {
                name: value.new_zeros(len(states)).index_copy(0, places, value)
                for name, value in stats._asdict().items()
            }
        return self.objective.evaluate(part, outputs, *self._counts)

    def _backward(self, index: int) -> None:
        gradients = self.engine._gradients
        deferred = self.model.deferred
        entering, result = self._alive.pop(index)
        if index == len(self.parts) - 1 and not deferred.defer:
            gradients.last()
        torch.autograd.backward(result, None if self.model.place.is_last else self.ways.gradient(index))
        if entering is not None:
            assert entering.grad is not None
            self.ways.send_gradient(index, entering.grad)
        if deferred.defer:
            self._works[index] = deferred.take()

    def _weights(self, index: int) -> None:
        gradients, names = self.engine._gradients, self.engine._names
        work = self._works.pop(index)
        if index == len(self.parts) - 1:
            pending = [
                p for product in work.products for p in (product.weight, product.bias) if p is not None
            ]
            gradients.last({names[id(parameter)] for parameter in pending})
        work.run(lambda parameter, gradient: gradients.add(names[id(parameter)], gradient))
