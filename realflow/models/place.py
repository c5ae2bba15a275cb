"""Where this rank stands in the mesh of a call, and the groups that it talks to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from realflow.layout import AXES, SETS, DeviceMesh, Layout

Groups = Mapping[tuple[int, ...], dist.ProcessGroup]
"""Global ranks in mesh order -> the process group made of them."""


@dataclass(frozen=True)
class Axis:
    """Ranks that work together, in mesh order; this one is `ranks[index]`. `group` is None for one rank."""

    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """This global rank."""
        return self.ranks[self.index]


@dataclass(frozen=True)
class Place:
    """One rank's view of a mesh.

    `pp`, `dp`, `tp` are its axes; `replica` all ranks of its data-parallel replica, `everyone` the
    whole mesh; `ends` first and last stage of its pipeline (None on the stages between them).
    """

    layout: Layout
    pp: Axis
    dp: Axis
    tp: Axis
    replica: Axis
    everyone: Axis
    ends: Axis | None

    @property
    def is_first(self) -> bool:
        """Whether this rank is on the first pipeline stage."""
        return self.pp.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank is on the last pipeline stage."""
        return self.pp.index == self.pp.size - 1

    @classmethod
    def of(cls, mesh: DeviceMesh, rank: int, groups: Groups) -> Place:
        """The place of a global rank of `mesh`; `groups` holds those of `groups_of(mesh)`."""

        def axis(name: str) -> Axis | None:
            ranks = next((group for group in mesh.groups(name) if rank in group), None)
            if ranks is None:
                return None
            assert len(ranks) == 1 or ranks in groups, f"no process group was made for ranks {ranks}"
            # torch.distributed numbers a group's ranks in rising order, whatever order they are given in
            assert list(ranks) == sorted(ranks), f"the ranks of a mesh must rise: {ranks}"
            return Axis(ranks, ranks.index(rank), groups.get(ranks))

        found = {name: axis(name) for name in (*AXES, *SETS)}
        pp, dp, tp, replica, everyone = (found[name] for name in ("pp", "dp", "tp", "replica", "all"))
        assert pp and dp and tp and replica and everyone, f"rank {rank} is outside the mesh"
        return cls(mesh.layout, pp, dp, tp, replica, everyone, found["ends"])

    @classmethod
    def alone(cls, rank: int = 0) -> Place:
        """A mesh of one rank."""
        return cls.of(DeviceMesh((rank,), Layout()), rank, {})


def groups_of(mesh: DeviceMesh) -> set[tuple[int, ...]]:
    """Every set of ranks, more than one each, that the collectives of a mesh need."""
    return {group for name in (*AXES, *SETS) for group in mesh.groups(name) if len(group) > 1}
