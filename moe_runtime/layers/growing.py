"""A layer's experts that come and go: a place for each of them, of which only the taken ones cost memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from moe_runtime.kernels import PackedExperts
from moe_runtime.kernels.residence import ABSENT
from moe_runtime.layers.experts import ExpertWeights
from moe_runtime.layers.moe import MoeMlp
from moe_runtime.layers.slots import Slot

HUGE_PAGE = 2 << 20


class GrowingExperts(ExpertWeights):
    """On the CPU alone. The map from experts to places is read by every step, in its place in memory: who
    changes it must do so between steps. Weights are written while nothing points to them.
    """

    def __init__(self, mixture: MoeMlp, layer: int) -> None:
        """Take over what ``mixture`` has, expert by expert, so that memory peaks at one layer more."""
        old = mixture.experts
        if not isinstance(old, ExpertWeights):
            raise TypeError("experts in two memories cannot come and go")
        count = mixture.config.num_experts
        super().__init__(
            old._kernels,
            count,
            old.packed.hidden,
            old.packed.intermediate,
            slot_of=range(count),
            layer=layer,
            missed=None if old.residence is None else old.residence.missed,
        )
        self._maps = [_reserve(count, part) for part in (old.packed.gate_up, old.packed.down)]
        gate_up, down = (
            torch.frombuffer(memory, dtype=part.dtype).view(count, *part.shape[1:])
            for memory, part in zip(self._maps, (old.packed.gate_up, old.packed.down), strict=True)
        )
        shape = (count, old.packed.hidden, old.packed.intermediate)
        self.packed = PackedExperts(gate_up, down, *shape, old.packed.format, old.packed.layout)
        self._allocated = True
        places = range(count) if old.residence is None else old.residence.slot_of.tolist()
        for expert, place in enumerate(places):
            if place >= 0:
                gate_up[expert].copy_(old.packed.gate_up[place])
                down[expert].copy_(old.packed.down[place])
        self.here = {expert for expert, place in enumerate(places) if place >= 0}
        self.coming: set[int] = set()  # whose weights may be written now
        self._point()

    def slots(self, expert_id: int, prefix: str, parts: tuple[str, str, str]) -> Iterator[Slot]:
        absent = expert_id not in self.here | self.coming
        for slot in super().slots(expert_id, prefix, parts):
            yield replace(slot, absent=absent)

    @property
    def num_bytes(self) -> int:
        """Of the weights that are here."""
        return self.packed.num_bytes // self.packed.num_experts * len(self.here)

    def admit(self, experts: Iterable[int]) -> None:
        """From now on these may be chosen; they have been written."""
        self.here.update(experts)
        self._point()

    def give_up(self, experts: Iterable[int]) -> None:
        """From now on these may not be chosen, and their memory is the system's."""
        leaving = self.here.intersection(experts)
        self.here -= leaving
        self._point()
        self.wipe(leaving)

    def wipe(self, experts: Iterable[int]) -> None:
        """Forget the weights of experts that are not here."""
        for memory, part in zip(self._maps, (self.packed.gate_up, self.packed.down), strict=True):
            size = part[0].numel() * part.element_size()
            for expert in experts:
                start, end = expert * size, (expert + 1) * size
                first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                row = part[expert].view(torch.uint8).view(-1)
                if last <= first:
                    row.zero_()
                    continue
                memory.madvise(mmap.MADV_DONTNEED, first, last - first)  # zeros from now on, and nobody's
                row[: first - start].zero_()  # of pages that it shares with its neighbours
                row[last - start :].zero_()

    def _point(self) -> None:
        residence = self.residence
        assert residence is not None, "it was made with a map"
        count = self.packed.num_experts
        places = [expert if expert in self.here else ABSENT for expert in range(count)]
        residence.slot_of.copy_(torch.tensor(places, dtype=torch.int32))


def _reserve(count: int, like: torch.Tensor) -> mmap.mmap:
    """Zeros that take no memory until they are written, for ``count`` rows as ``like`` has."""
    row_bytes = like[0].numel() * like.element_size()
    # Private: of shared memory, the kernel would keep what is given up.
    memory = mmap.mmap(-1, count * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if row_bytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
