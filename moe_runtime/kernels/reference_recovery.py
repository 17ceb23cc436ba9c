"""What a recovery changes in ``route`` of reference.py, in literal torch."""

from __future__ import annotations

import torch

from moe_runtime.errors import KernelError
from moe_runtime.kernels.route_recovery import RouteRecovery


def recovered(
    logits: torch.Tensor, recovery: RouteRecovery, masks: torch.Tensor | None, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] plus the offsets of their tokens' rows; int64 [T, E] what stands in for an expert that
    the token's mask forbids, or -1. Row -1 has no offsets and no stand-ins.
    """
    if masks is None or rows is None:
        raise KernelError("route: recovery, expected with masks and mask_rows alone")
    for name, table, dtype in (
        ("offsets", recovery.offsets, torch.float32),
        ("stand_ins", recovery.stand_ins, torch.int32),
    ):
        if table.dtype is not dtype or table.shape != masks.shape:
            raise KernelError(
                f"route: {name} is {table.dtype} {list(table.shape)}, expected {dtype} {list(masks.shape)}"
            )
    has_row, places = (rows >= 0)[:, None], rows.clamp(min=0).long()
    offsets = torch.where(has_row, recovery.offsets[places], 0.0)
    forbidden = (masks[places] == 0) & has_row
    stand_ins = torch.where(forbidden, recovery.stand_ins[places].long(), -1)
    return logits + offsets.to(logits.device, logits.dtype), stand_ins.to(logits.device)


def named(ids: torch.Tensor, stand_ins: torch.Tensor) -> torch.Tensor:
    """ids int64 [T, top_k] of experts, those with a stand-in [T, E] renamed to E + its number."""
    chosen = stand_ins.gather(1, ids)
    return torch.where(chosen >= 0, stand_ins.shape[1] + chosen, ids)
