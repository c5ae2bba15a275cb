"""One optimizer step from packed micro-batches, data parallel with ZeRO-1 over one flat buffer.

    denominators (all-reduce) -> forward and backward of each micro-batch, gradients added into one
    flat float32 buffer -> reduce-scatter (SUM) -> global norm, clipping -> AdamW on this rank's
    shard of the float32 masters -> all-gather into the compute weights

The loss is a sum over the tokens of the minibatch on all ranks, divided by their global number
beforehand; nothing is averaged over ranks or micro-batches, so neither changes the gradient.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from realflow.algorithms.terms import LossTerms
from realflow.data.batch import Batch, to_tokens
from realflow.engines.collectives import reduce_scatter_sum
from realflow.engines.infer import score, scored_tokens
from realflow.engines.optimizer import FlatAdamW, check_spec, learning_rate
from realflow.errors import InputError, RunError
from realflow.graph.types import Extent, OptimizerSpec
from realflow.layout import Box, flat_boxes
from realflow.models.causal import CausalModel, master_values
from realflow.models.flat import FlatBuffer

Loss = Callable[..., LossTerms]

OUTPUTS = ("logprobs", "entropy")
"""Model outputs that a loss may ask for."""

NAMES_BYTES = 4096
"""Room for the names of a loss's metrics in the message between ranks."""


@dataclass(frozen=True)
class MasterState:
    """What one rank's optimizer holds: elements `[start, stop)` of the flat buffer.

    `tensors` has `master`, `exp_avg` and `exp_avg_sq`, 1-D, of `stop - start` elements. `digest`
    identifies the flat layout, `version` counts optimizer steps.
    """

    digest: str
    start: int
    stop: int
    version: int
    tensors: Mapping[str, torch.Tensor]


class Gradients:
    """All gradients in one flat buffer of the master dtype, filled by hooks during backward."""

    def __init__(self, model: CausalModel, size: int, dtype: torch.dtype) -> None:
        length = model.flat.padded(size).numel()
        self.data = torch.zeros(length, dtype=dtype, device=model.device)
        self._views: dict[str, torch.Tensor] = {}
        self._untouched: set[str] = set()
        self._hooks = []
        for name, parameter in model.module.named_parameters():
            slot = model.flat.slots[name]
            self._views[name] = self.data[slot.offset : slot.offset + slot.size].view(slot.shape)
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))

    def close(self) -> None:
        """Leave the model's gradients alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """Forget the last step. The first gradient of each parameter replaces what is there."""
        self._untouched = set(self._views)

    def finish(self) -> None:
        """Parameters that got no gradient have gradient zero."""
        for name in self._untouched:
            self._views[name].zero_()
        self._untouched.clear()

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def add(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None, "another TrainEngine of this model has not been closed"
            if name in self._untouched:
                self._views[name].copy_(parameter.grad)
                self._untouched.discard(name)
            else:
                self._views[name].add_(parameter.grad)
            parameter.grad = None

        return add


class TrainEngine:
    """Trains `model` together with the other ranks of `group`; each rank has the whole model.

    `rank` and `size` are this process's place in `group` and the group's size (`size` 1 needs no
    group). `total_steps`, in optimizer steps, is needed by schedules that end. `version` counts
    optimizer steps. All ranks must call `step` and `load_master_state` together. A model has one
    engine at a time; `close` frees it for another.
    """

    def __init__(
        self,
        model: CausalModel,
        spec: OptimizerSpec,
        *,
        group: dist.ProcessGroup | None = None,
        rank: int = 0,
        size: int = 1,
        total_steps: int | None = None,
    ) -> None:
        check_spec(spec, total_steps)
        self.model, self.spec, self.total_steps = model, spec, total_steps
        self._group, self.rank, self.size = group, rank, size
        self.version = 0
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        chunk = model.flat.padded(size).numel() // size
        self.start, self.stop = rank * chunk, (rank + 1) * chunk
        self._weights = model.flat.storage[self.start : self.stop]  # this rank's compute weights
        if model.dtype == wide:  # the compute weights are the masters
            master = self._weights
        else:
            master = master_values(model, self.start, self.stop, wide)
        self._gradients = Gradients(model, size, wide)
        self._optimizer = FlatAdamW(master, spec, _decayed(model.flat, master, self.start, self.stop))
        self.gradient = self._gradients.data[self.start : self.stop]  # this rank's shard, once reduced

    def close(self) -> None:
        """End this engine; the model may get another."""
        self._gradients.close()

    def step(
        self,
        micro_batches: Sequence[Batch],
        loss: Loss,
        *,
        reads: Mapping[str, str],
        options: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        normalise: str = "token",
        extents: Mapping[str, Extent] | None = None,
        prefix: str = "actor",
    ) -> dict[str, float]:
        """One optimizer step from this rank's micro-batches (any number, also none).

        `loss` is called with each field of `reads` (parameter -> field), those of `OUTPUTS` and
        `lengths` that its signature names, and `options`. Numeric sample fields are repeated over
        tokens unless `extents` says that the parameter is read for each sample. `normalise` is
        `token` (mean over all loss tokens) or `sequence` (mean over sequences of token means).

        Returns metrics, equal on all ranks: `{prefix}/loss`, `entropy`, `grad_norm` (before
        clipping), `lr` and each metric of the loss. Raises RunError, with the weights unchanged,
        where the minibatch has no loss token or a gradient is not finite.
        """
        metrics = self.backward(
            micro_batches,
            loss,
            reads=reads,
            options=options,
            temperature=temperature,
            normalise=normalise,
            extents=extents,
        )
        metrics.update(self.update())
        return {f"{prefix}/{name}": value for name, value in metrics.items()}

    def backward(
        self,
        micro_batches: Sequence[Batch],
        loss: Loss,
        *,
        reads: Mapping[str, str],
        options: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        normalise: str = "token",
        extents: Mapping[str, Extent] | None = None,
    ) -> dict[str, float]:
        """The first half of `step`: leaves the summed gradient's shard in `self.gradient`."""
        if normalise not in ("token", "sequence"):
            raise InputError(f"normalise {normalise!r}: expected token or sequence")
        places = [scored_tokens(batch) for batch in micro_batches]
        tokens, sequences = self._count(micro_batches, places)
        if tokens == 0:
            raise RunError(f"optimizer step {self.version}: the minibatch has no loss token on any rank")
        sums: dict[str, float] = {}
        self._gradients.begin()
        for batch, place in zip(micro_batches, places, strict=True):
            if len(place) == 0:
                continue
            weights = _weights(batch, place, normalise, tokens, sequences)
            found = self._micro_batch(batch, place, weights, loss, reads, options, temperature, extents)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
        self._gradients.finish()
        reduce_scatter_sum(self._gradients.data, self._group, self.rank, self.size)
        totals = self._sum_by_name(sums)
        return {name: value if name == "loss" else value / tokens for name, value in totals.items()}

    @torch.no_grad()
    def update(self) -> dict[str, float]:
        """The second half of `step`: clip, update the masters, gather the weights everywhere."""
        norm = math.sqrt(self._all_sum([_square_sum(self.gradient)])[0])
        if not math.isfinite(norm):
            raise RunError(
                f"optimizer step {self.version}: the gradient is not finite (norm {norm}){self._culprits()}"
            )
        clip = self.spec.clip_norm
        if 0 < clip < norm:  # 0 turns clipping off; torch.nn.utils.clip_grad_norm_'s formula
            self.gradient.mul_(clip / (norm + 1e-6))
        lr = learning_rate(self.spec, self.version, self.total_steps)
        self._optimizer.step(self.gradient, lr)
        self._spread()
        self.version += 1
        return {"grad_norm": norm, "lr": lr}

    def master_state(self) -> MasterState:
        """This rank's shard (no copies: save it before the next step)."""
        stop = min(self.stop, self.model.flat.total)
        optimizer = self._optimizer
        tensors = {
            "master": optimizer.master,
            "exp_avg": optimizer.exp_avg,
            "exp_avg_sq": optimizer.exp_avg_sq,
        }
        start = min(self.start, stop)
        cut = {name: tensor.detach()[: stop - start] for name, tensor in tensors.items()}
        return MasterState(self.model.flat.digest, start, stop, self.version, cut)

    def boxes(self) -> dict[str, list[Box]]:
        """The boxes of each parameter that this rank's shard holds."""
        slots = self.model.flat.slots
        pieces = self.model.flat.pieces(self.start, self.stop)
        return {name: flat_boxes(slots[name].shape, first, last) for name, first, last in pieces}

    @torch.no_grad()
    def load_master_state(self, states: Iterable[MasterState]) -> None:
        """Continue from the shards of a run with any number of ranks.

        Each rank gives at least the shards that meet its own `[start, stop)`; others are passed
        over. Raises InputError where they leave a gap or belong to another model.
        """
        mine = self.master_state()
        covered: list[tuple[int, int]] = []
        versions: set[int] = set()
        for state in states:
            if state.digest != mine.digest:
                raise InputError("training state: it belongs to a model with other parameters")
            versions.add(state.version)
            start, stop = max(mine.start, state.start), min(mine.stop, state.stop)
            if start < stop:
                covered.append((start, stop))
                for name, tensor in mine.tensors.items():
                    piece = state.tensors[name][start - state.start : stop - state.start]
                    tensor[start - mine.start : stop - mine.start].copy_(piece)
        if len(versions) != 1:
            raise InputError(f"training state: expected shards of one version, found {sorted(versions)}")
        reached = mine.start
        for start, stop in sorted(covered):
            if start > reached:
                break
            reached = max(reached, stop)
        if reached < mine.stop:
            raise InputError(f"training state: elements from {reached} on are in none of the shards")
        self.version = versions.pop()
        self._optimizer.set_step(self.version)
        self._spread()

    def _micro_batch(
        self,
        batch: Batch,
        places: torch.Tensor,
        weights: torch.Tensor,
        loss: Loss,
        reads: Mapping[str, str],
        options: Mapping[str, Any] | None,
        temperature: float,
        extents: Mapping[str, Extent] | None,
    ) -> dict[str, float]:
        """Forward and backward; returns sums over loss tokens (`loss`: the weighted sum)."""
        stats = score(self.model, batch, places, temperature)
        places, device = places.to(self.model.device), self.model.device
        outputs = {
            name: value.new_zeros(int(batch.lengths.sum())).index_copy(0, places, value)
            for name, value in stats._asdict().items()
        }
        arguments = _arguments(batch, loss, reads, extents, outputs, device)
        terms = loss(**arguments, **(options or {}))
        _check_terms(terms, int(batch.lengths.sum()))
        per_token = terms.per_token.index_select(0, places)  # elsewhere it may be anything, NaN too
        total = (per_token * weights.to(device, per_token.dtype)).sum()
        total.backward()
        sums = {"loss": total.detach(), "entropy": stats.entropy.detach().double().sum()}
        for name, values in terms.metrics.items():
            sums[name] = values.detach().index_select(0, places).double().sum()
        return {name: value.item() for name, value in sums.items()}

    def _count(self, micro_batches: Sequence[Batch], places: Sequence[torch.Tensor]) -> tuple[int, int]:
        """Loss tokens, and sequences that have any, of the minibatch on all ranks."""
        tokens = sum(len(place) for place in places)
        counts = zip(micro_batches, places, strict=True)
        sequences = sum(int((_per_sample(batch, place) > 0).sum()) for batch, place in counts)
        total = self._all_sum([tokens, sequences])
        return int(total[0]), int(total[1])

    def _all_sum(self, values: Sequence[float]) -> list[float]:
        """Sum over ranks, in float64 (exact for counts)."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.model.device)
        dist.all_reduce(tensor, group=self._group)
        return list(tensor.tolist())

    def _sum_by_name(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sum over ranks; a rank without micro-batches knows no names, so they are exchanged."""
        names = sorted(sums)
        if self.size > 1:
            text = "\n".join(names).encode()
            if len(text) > NAMES_BYTES:
                raise InputError(f"the names of the loss's metrics take more than {NAMES_BYTES} bytes")
            local = torch.zeros(NAMES_BYTES, dtype=torch.uint8)
            local[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else local[:0]
            local = local.to(self.model.device)
            everyone = local.new_empty(self.size * NAMES_BYTES)
            dist.all_gather_single(everyone, local, group=self._group)
            rows = everyone.cpu().view(self.size, NAMES_BYTES).numpy()
            texts = [row.tobytes().rstrip(b"\0").decode() for row in rows]
            names = sorted({name for text in texts for name in text.split("\n") if name})
        totals = self._all_sum([sums.get(name, 0.0) for name in names])
        return dict(zip(names, totals, strict=True))

    def _spread(self) -> None:
        """Masters -> this rank's compute weights -> everybody's."""
        if self._optimizer.master.data_ptr() != self._weights.data_ptr():
            self._weights.copy_(self._optimizer.master)
        if self.size > 1:
            whole = self.model.flat.padded(self.size)
            dist.all_gather_single(whole, self._weights.clone(), group=self._group)

    def _culprits(self) -> str:
        """Parameters of this rank's shard with gradients that are not finite, for the message."""
        pieces = self.model.flat.pieces(self.start, self.stop)
        offsets = {name: slot.offset - self.start for name, slot in self.model.flat.slots.items()}
        bad = [
            name
            for name, first, last in pieces
            if not self.gradient[offsets[name] + first : offsets[name] + last].isfinite().all()
        ]
        return f"; on rank {self.rank} in {', '.join(bad[:3])} ({len(bad)} parameters)" if bad else ""


def _decayed(flat: FlatBuffer, master: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
    """Views of the shard `master` that hold matrices: vectors (norms, biases) are not decayed."""
    views = []
    for name, first, last in flat.pieces(start, stop):
        slot = flat.slots[name]
        if len(slot.shape) > 1:
            views.append(master[slot.offset + first - start : slot.offset + last - start])
    return views


def _square_sum(values: torch.Tensor, width: int = 4096) -> float:
    """Sum of squares, accumulated in float64 over rows of `width` elements."""
    whole = len(values) // width * width
    rows = torch.linalg.vector_norm(values[:whole].view(-1, width), dim=1).double()
    rest = torch.linalg.vector_norm(values[whole:].double())
    return float(rows.square().sum() + rest.square())


def _per_sample(batch: Batch, places: torch.Tensor) -> torch.Tensor:
    """int64 [S]: how many of `places` each sample has."""
    sample = torch.bucketize(places, batch.cu_seqlens[1:].long(), right=True)
    return torch.bincount(sample, minlength=len(batch.ids))


def _weights(batch: Batch, places: torch.Tensor, normalise: str, tokens: int, sequences: int) -> torch.Tensor:
    """float64 [R]: what each loss token counts in the loss; they sum to 1 over all ranks."""
    if normalise == "token":
        return torch.full((len(places),), 1 / tokens, dtype=torch.float64)
    counts = to_tokens(_per_sample(batch, places), batch.lengths)[places]
    return 1 / (counts.double() * sequences)


def _check_terms(terms: LossTerms, total: int) -> None:
    for name, values in {"per_token": terms.per_token, **terms.metrics}.items():
        if tuple(values.shape) != (total,):
            raise InputError(
                f"loss: {name} has shape {list(values.shape)}, expected [{total}], a value for each token"
            )
    if not terms.per_token.requires_grad:
        raise InputError("loss: per_token does not depend on the model's outputs (logprobs, entropy)")


def _arguments(
    batch: Batch,
    loss: Loss,
    reads: Mapping[str, str],
    extents: Mapping[str, Extent] | None,
    outputs: Mapping[str, torch.Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """What the loss is called with. Floating fields get the dtype of the logprobs."""
    total, samples = int(batch.lengths.sum()), len(batch.ids)
    arguments: dict[str, Any] = {}
    for parameter, name in reads.items():
        value = batch.fields[name]
        if isinstance(value, torch.Tensor):
            finest = (extents or {}).get(parameter, "token") == "token"
            if finest and len(value) == samples and total != samples:
                value = to_tokens(value, batch.lengths)
            dtype = outputs["logprobs"].dtype if value.is_floating_point() else value.dtype
            value = value.to(device, dtype)
        arguments[parameter] = value
    wanted = inspect.signature(loss).parameters
    known = {**outputs, "lengths": batch.lengths.to(device)}
    arguments.update({name: value for name, value in known.items() if name in wanted})
    return arguments
