"""What scenarios have for the experts that a layer's masks forbid: tables by mask row, and constants."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_runtime.kernels.route_recovery import RouteRecovery


class RecoveryTables:
    """One layer's, written between steps by whoever writes its masks (recovery_rows.py). There are no tensors
    until a scenario needs them and none after the last has left, and what is not there costs nothing.

    routing    what the layer's router does, by mask row; None: nothing
    constants  float32 [C, H]: what the numbers of ``routing.stand_ins`` name; None: no scenario has any. As
               exact as they come: one is read instead of an expert's three matrices, and takes a thousandth
               of their memory
    """

    def __init__(self, num_masks: int, num_experts: int, hidden: int, device: torch.device) -> None:
        self._shape, self._hidden, self._device = (num_masks, num_experts), hidden, device
        self.routing: RouteRecovery | None = None
        self.constants: torch.Tensor | None = None
        self._places: dict[int, list[int]] = {}  # by mask row: its constants

    def put_offsets(self, row: int, offsets: torch.Tensor) -> bool:
        """Add ``offsets`` float32 [E] to the logits of ``row``, which has nothing yet. Whether tensors that
        kernels point to are others now.
        """
        routing, is_new = self._tables()
        self._places[row] = []
        routing.offsets[row].copy_(offsets)
        return is_new

    def put_constants(self, row: int, experts: Sequence[int], vectors: torch.Tensor) -> bool:
        """Let ``vectors`` float32 [experts, H] stand in for the ``experts`` that ``row``, which has nothing
        yet, forbids. Whether tensors that kernels point to are others now.
        """
        routing, is_new = self._tables()
        taken = {place for places in self._places.values() for place in places}
        self._places[row] = []
        capacity = 0 if self.constants is None else len(self.constants)
        free = [place for place in range(capacity + len(experts)) if place not in taken][: len(experts)]
        if free and free[-1] >= capacity:
            constants = torch.zeros(free[-1] + 1, self._hidden, device=self._device)
            if self.constants is not None:
                constants[:capacity].copy_(self.constants)
            self.constants, is_new = constants, True
        self._places[row] = free
        if self.constants is not None and free:
            places = torch.tensor(free, dtype=torch.int32, device=self._device)
            self.constants[places.long()] = vectors.to(self._device)
            routing.stand_ins[row, list(experts)] = places
        return is_new

    def clear(self, row: int) -> bool:
        """Forget what ``row`` has. Whether tensors that kernels point to are no more."""
        if self._places.pop(row, None) is None or self.routing is None:
            return False
        self.routing.offsets[row].zero_()
        self.routing.stand_ins[row].fill_(-1)
        if self._places:
            return False
        self.routing = self.constants = None
        return True

    def _tables(self) -> tuple[RouteRecovery, bool]:
        """The routing's, and whether they have just been made."""
        if self.routing is not None:
            return self.routing, False
        offsets = torch.zeros(self._shape, device=self._device)
        stand_ins = torch.full(self._shape, -1, dtype=torch.int32, device=self._device)
        self.routing = RouteRecovery(offsets, stand_ins)
        return self.routing, True
