"""What scenario masks do to a batch: two sums that every router adds to."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class RouteMeter:
    """Added to by every ``route`` of a step whose rows have masks.

    lost     float32 [T]: the part, 0 to 1, of a token's gate weight that goes to forbidden experts when it
             chooses without its mask; a sum over layers. None: not measured.
    outside  int64 [1]: chosen experts that the token's mask forbids; what stands in for one is none. Zero by
             construction: only a mask with fewer than top_k experts leaves no choice, and those are refused
             before.
    """

    lost: torch.Tensor | None
    outside: torch.Tensor

    @classmethod
    def zeros(cls, num_tokens: int, device: torch.device) -> RouteMeter:
        return cls(torch.zeros(num_tokens, device=device), torch.zeros(1, dtype=torch.int64, device=device))

    def add_outside(self, ids: torch.Tensor, masks: torch.Tensor, rows: torch.Tensor) -> None:
        """Count the chosen ``ids`` [T, top_k] that masks [M, E] of rows int32 [T] (-1: none) forbid; ids
        from E on name no expert.
        """
        is_expert = ids < masks.shape[1]
        self.outside.add_((_forbids(torch.where(is_expert, ids, 0), masks, rows) & is_expert).sum())

    def add_lost(
        self, free_ids: torch.Tensor, free_weights: torch.Tensor, masks: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Add what the choice without masks, [T, top_k] each, gives to forbidden experts."""
        if self.lost is not None:
            total = free_weights.sum(-1)
            lost = (free_weights * _forbids(free_ids, masks, rows)).sum(-1)
            self.lost.add_(torch.where(total > 0, lost / total, 0.0))


def _forbids(ids: torch.Tensor, masks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """bool [T, top_k]. A device cannot raise: a row that does not exist forbids everything."""
    known = (rows >= 0) & (rows < masks.shape[0])
    allowed = masks[torch.where(known, rows, 0).long()].gather(1, ids.long()) != 0
    return ~torch.where(known[:, None], allowed, (rows == -1)[:, None])
