"""One rank's part of a Hugging Face model: packed sequences, one flat parameter buffer, any layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from realflow.errors import InputError
from realflow.layout import Box, flat_boxes, lengths
from realflow.models import attention
from realflow.models.build import HEADS, build_module
from realflow.models.card import build as build_card
from realflow.models.checkpoint import Checkpoint, stored_names
from realflow.models.deferred import Deferred
from realflow.models.flat import FlatBuffer, allocate
from realflow.models.logprobs import Vocabulary
from realflow.models.lora import Adapters, AdapterSource, adapter_shapes, load_adapters
from realflow.models.partition import (
    COLUMN,
    EMBEDDING,
    HEAD_NAME,
    ROW,
    Partition,
    Stage,
    partition,
    with_head,
)
from realflow.models.place import Place
from realflow.models.precision import full_precision
from realflow.models.sharing import Shared, find_shared
from realflow.models.stages import recomputing, send_elsewhere
from realflow.models.tensor import Region, cut_modules
from realflow.models.trained import Trained

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SCORE = f"{HEAD_NAME}weight"


@dataclass(frozen=True)
class Packed:
    """What all stages need to know of a micro-batch: made once, by `CausalModel.prepare`.

    `tokens` and `positions` int64 [U] are those of the distinct tokens, on the model's device; `rows`
    is U, `total` the number of tokens of the batch, T.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    packing: attention.Packing
    total: int

    @property
    def rows(self) -> int:
        """How many distinct tokens there are."""
        return len(self.tokens)


@dataclass(eq=False)
class CausalModel:
    """`module` is the `transformers` model in evaluation mode (no dropout) with its own names, of which
    this rank holds the boxes of `partition` at `place`; its parameters are views of `flat`. `source` is
    the checkpoint that it was loaded from. With `adapters` its weights are frozen, and each linear layer that
    has one computes with it.

    Settable between passes: `share` (beginnings that packed sequences have in common are computed
    once), `sequence_parallel` (what lies between the blocks is divided over tp) and `recompute`
    (backward computes each layer again instead of keeping what is inside). All ranks of a replica
    must set them alike. `deferred` computes weight gradients apart (`realflow.models.deferred`).
    """

    module: PreTrainedModel
    flat: FlatBuffer
    source: Path
    place: Place
    partition: Partition
    region: Region
    head_kind: str = "lm"
    adapters: Adapters | None = None
    share: bool = True
    sequence_parallel: bool = False
    recompute: bool = False
    deferred: Deferred = field(default_factory=Deferred)

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.module.config

    @property
    def dtype(self) -> torch.dtype:
        """That of the compute weights."""
        return self.flat.storage.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.flat.storage.device

    @property
    def stage(self) -> Stage:
        """What this rank's pipeline stage computes."""
        return self.partition.stages[self.place.pp.index]

    @property
    def head(self) -> nn.Linear:
        """The language-model head, cut along the vocabulary; the last stage has it."""
        head = self.module.get_output_embeddings()
        assert isinstance(head, nn.Linear), "no language-model head on this stage"
        return head

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Which token ids the rows of `head` are; None: all of them."""
        axis = self.place.tp
        return Vocabulary(axis, self.partition.vocabulary(axis.index)[0]) if axis.size > 1 else None

    def boxes(self) -> dict[str, Box]:
        """Parameter -> the box of it that this rank holds (`flat.view(name)` is its storage)."""
        return self.partition.boxes(self.place.pp.index, self.place.tp.index)

    @property
    def trained(self) -> Trained:
        """What of this rank's part is trained: its adapters where it has any, else all of it."""
        if self.adapters is None:
            return Trained(
                self.partition, self.flat.slots, self.boxes(), dict(self.module.named_parameters())
            )
        cut = self.adapters.cut
        boxes = cut.boxes(self.place.pp.index, self.place.tp.index)
        return Trained(cut, self.adapters.flat.slots, boxes, self.adapters.parameters)

    def weight(self, name: str, part: Box | None = None) -> torch.Tensor:
        """A part of the box of a parameter that is held here (None: all of it), its adapter merged in; a view
        where there is none."""
        held, view = self.boxes()[name], self.flat.view(name)
        span = [slice(a - o, b - o) for (a, b), (o, _) in zip(part or held, held, strict=True)]
        if self.adapters is None or not self.adapters.has(name):
            return view[tuple(span)]
        return self.adapters.merge(name, view, *span)

    def prepare(self, tokens: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor) -> Packed:
        """What the stages need to know of a micro-batch of packed sequences.

        `tokens` and `positions` are int64 [T], `cu_seqlens` int32 [S + 1] on the CPU.
        """
        total = len(tokens)
        shared = find_shared(tokens.cpu(), cu_seqlens) if self.share else None
        if shared is not None:
            tokens, positions = shared.distinct(tokens.cpu()), shared.distinct(positions.cpu())
            shared = Shared(shared.keep.to(self.device), shared.spread.to(self.device))
        packing = attention.Packing.of(cu_seqlens, self.device, shared)
        return Packed(tokens.to(self.device), positions.to(self.device), packing, total)

    def boundary_rows(self, packed: Packed) -> int:
        """Rows of the hidden states [rows, H] that cross a stage boundary on this tensor rank."""
        with self.region.passing(packed.rows, sequence=self.sequence_parallel):
            return self.region.share(packed.rows)

    def run(self, packed: Packed, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """This stage's part of a forward pass.

        The first stage takes None, others the hidden states [boundary_rows, H] of the stage before.
        Returns the hidden states for the next stage; on the last one those after the final norm, [T, H],
        of all tokens on every tensor rank, ready for a head.
        """
        assert (hidden is None) == self.stage.embeds, "the first stage, and no other, starts from tokens"
        if self.config._attn_implementation != attention.NAME:  # another engine has switched it
            self.module.set_attn_implementation(attention.NAME)
        kwargs: dict[str, Any] = {"input_ids": packed.tokens[None]}
        if hidden is not None:
            kwargs = {"inputs_embeds": hidden[None], "entering": hidden[None]}
        with self._recording(packed), self._recomputing(packed):
            states: torch.Tensor = self.module.base_model(
                position_ids=packed.positions[None], use_cache=False, packing=packed.packing, **kwargs
            ).last_hidden_state
            if not self.stage.ends:
                return states[0]
            states = self.region.whole(states, partial_gradient=self.head_kind == "lm")[0]
        shared = packed.packing.shared
        return states if shared is None else shared.repeat(states)

    @contextmanager
    def _recording(self, packed: Packed) -> Iterator[None]:
        """The modes of a pass, which a repeated pass needs again."""
        with ExitStack() as stack:
            stack.enter_context(self.region.passing(packed.rows, sequence=self.sequence_parallel))
            stack.enter_context(full_precision(self.dtype))
            stack.enter_context(self.deferred.record())
            yield

    @contextmanager
    def _recomputing(self, packed: Packed) -> Iterator[None]:
        if not (self.recompute and torch.is_grad_enabled()):
            yield
            return
        stage, layers = self.stage, self.module.get_submodule(self.partition.layer_list)
        mine = [layers.get_submodule(str(index)) for index in range(stage.first, stage.stop)]
        with recomputing(mine, lambda: self._recording(packed)):
            yield


def load_model(
    path: Path,
    *,
    dtype: str,
    device: str | torch.device = "cpu",
    place: Place | None = None,
    head: str = "lm",
    new_head: bool = False,
    adapters: AdapterSource | None = None,
) -> CausalModel:
    """Load what the rank at `place` (None: a mesh of one) holds of a checkpoint directory.

    `dtype` is bfloat16, float32 or float64; `head` is `lm`, `value` or `reward` (one number for each
    row, as in Hugging Face's sequence classifiers). A head that the checkpoint lacks starts from zeros: a
    value head, and with `new_head` (the model is trained) a reward head, which a checkpoint must have
    otherwise. `adapters` are put on the model, or merged into its weights. Only this rank's boxes are read.
    Raises InputError where the directory, the checkpoint, the adapters, the kind of model or the layout
    cannot be used.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    assert head in HEADS, head
    path, place, target = Path(path), place or Place.alone(), torch.device(device)
    checkpoint = Checkpoint(path)
    module = build_module(path, DTYPES[dtype], head)
    cut = partition(with_head(build_card(path), head), place.layout)
    _check_names(module, cut, path)
    names = stored_names(checkpoint, cut.card, _optional(head, new_head=new_head))
    boxes = cut.boxes(place.pp.index, place.tp.index)
    shapes = {name: lengths(box) for name, box in boxes.items()}
    every = allocate(shapes | adapter_shapes(cut, place, adapters), DTYPES[dtype], target)
    flat = every.only(shapes)
    for name, box in boxes.items():
        if name in names:
            flat.view(name).copy_(checkpoint.read(names[name], box))
    _place_parameters(module, cut, place, flat)
    _move_buffers(module, target)
    region = Region(place.tp)
    if place.tp.size > 1:
        stage, first = place.pp.index, cut.vocabulary(place.tp.index)[0]
        tables = [(name, first) for name in cut.modules(EMBEDDING, stage)]
        cut_modules(module, cut.modules(COLUMN, stage), cut.modules(ROW, stage), tables, region)
    beside = None if adapters is None else load_adapters(module, adapters, every, cut, place, region)
    return CausalModel(module, flat, path, place, cut, region, head, beside)


def master_values(model: CausalModel, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Elements `[start, stop)` of the flat buffer in `dtype` (float32 or float64), as precise as the
    checkpoint has them: where it was stored wider than the compute dtype, they are read again. (Of a model
    with adapters these elements are adapters, which are as the model computes with them.)
    """
    checkpoint = Checkpoint(model.source)
    if model.adapters is not None or checkpoint.dtypes <= {model.dtype}:
        return model.flat.storage[start:stop].to(dtype, copy=True)
    values = torch.zeros(stop - start, dtype=dtype, device=model.device)
    names = stored_names(checkpoint, model.partition.card, _optional(model.head_kind, new_head=True))
    held = model.boxes()
    for name, first, last in model.flat.pieces(start, stop):
        if name not in names:
            continue
        slot, at = model.flat.slots[name], model.flat.slots[name].offset - start + first
        for piece in flat_boxes(slot.shape, first, last):
            box = tuple((a + o, b + o) for (a, b), (o, _) in zip(piece, held[name], strict=True))
            part = checkpoint.read(names[name], box).reshape(-1)
            values[at : at + part.numel()] = part.to(values.device)
            at += part.numel()
    return values


def _optional(head: str, *, new_head: bool) -> frozenset[str]:
    """Parameters that a checkpoint may lack: they start from zeros."""
    return frozenset({SCORE} if head == "value" or (head == "reward" and new_head) else ())


def _check_names(module: PreTrainedModel, cut: Partition, path: Path) -> None:
    """The module that runs has the parameters that its card says."""
    expected = {p.name: p.shape for p in cut.card.parameters}
    found = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if found != expected:
        name = next(iter({*expected.items()} ^ {*found.items()}))[0]
        raise InputError(
            f"model {path}: {type(module).__name__} has no head of the kind asked for (see {name})"
        )


def _place_parameters(module: PreTrainedModel, cut: Partition, place: Place, flat: FlatBuffer) -> None:
    """Views of `flat` in place of the module's hollow parameters; what others hold goes elsewhere."""
    aliases = {name: owner for name, owner in cut.card.tied.items() if owner in flat.slots}
    if not cut.stages[place.pp.index].ends:
        aliases = {}  # the table alone; the head that shares it is on the last stage
    send_elsewhere(module, [*flat.slots, *aliases], f"{cut.layer_list}.0")
    parameters = {name: nn.Parameter(flat.view(name)) for name in flat.slots}
    for name, owner in [*((name, name) for name in flat.slots), *aliases.items()]:
        parent, _, leaf = name.rpartition(".")
        part = module.get_submodule(parent)
        part.register_parameter(leaf, parameters[owner])
        if isinstance(part, nn.Linear) and leaf == "weight":
            part.out_features, part.in_features = part.weight.shape
        elif isinstance(part, nn.Embedding):
            _shorten(part, cut.vocabulary(place.tp.index)[0])
    picks = cut.kv_picks(place.tp.index)
    if picks is not None:
        for name in cut.modules(COLUMN, place.pp.index):
            if name.endswith(".q_proj"):
                attend = module.get_submodule(name.rpartition(".")[0])
                attend.kv_picks = torch.tensor(picks, device=flat.storage.device)


def _shorten(table: nn.Embedding, first: int) -> None:
    """Give a table, whose rows are now those of the token ids from `first` on, its new length."""
    table.num_embeddings = len(table.weight)
    padding = table.padding_idx
    if padding is not None:  # whose row gets no gradient: another row must not take its place
        inside = first <= padding < first + table.num_embeddings
        table.padding_idx = padding - first if inside else None


def _move_buffers(module: PreTrainedModel, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(
                name, buffer.to(device), persistent=name not in part._non_persistent_buffers_set
            )
    assert not any(p.is_meta for p in module.parameters()), "a parameter was left without memory"
