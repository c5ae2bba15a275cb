"""The float32 average behind a model that follows another one but computes in bfloat16.

Bfloat16 has 8 bits: an average that is kept in it stands still once a step adds less than 1/256 of a
weight, as every step of reinforcement learning does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from realflow.engines.masters import Shard
from realflow.models.causal import CausalModel, master_values
from realflow.models.place import Place
from realflow.models.residence import Residence


class Average:
    """The average of what this rank holds of `model`, in float32; it starts as precise as the model's
    checkpoint is. `flat` has it, with the slots of the model's own buffer."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        values = master_values(model, 0, len(model.flat.storage), torch.float32)
        self.flat = replace(model.flat, storage=values)
        self.residence = Residence(values)

    @torch.no_grad()
    def spread(self) -> None:
        """Round the average into the weights that the model computes with."""
        self._model.flat.storage.copy_(self.flat.storage)

    def shards(self, place: Place) -> Iterator[Shard]:
        """Every box, for a training state: of what ranks of the mesh at `place` hold alike, one rank's
        is counted."""
        cut = self._model.partition
        for name, box in self._model.boxes().items():
            repeated = cut.is_whole(name) and place.tp.index > 0
            repeated |= name in cut.tied and place.pp.index > 0
            yield Shard(name, box, {"master": self.flat.view(name)}, not (repeated or place.dp.index > 0))
