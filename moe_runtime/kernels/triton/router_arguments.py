"""What the two ways of router.py check alike: masks, recovery, a meter; and where the choices go."""

from __future__ import annotations

import torch

from moe_runtime.errors import KernelError
from moe_runtime.kernels.checks import check_dims
from moe_runtime.kernels.meter import RouteMeter
from moe_runtime.kernels.route_recovery import RouteRecovery
from moe_runtime.kernels.triton.arguments import check


def checked_masks(
    op: str,
    tokens: int,
    num_experts: int,
    bias: torch.Tensor | None,
    masks: torch.Tensor | None,
    mask_rows: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor | None, int]:
    """The masks as bytes and how many there are."""
    if bias is not None:
        check(op, "bias", bias, (num_experts,), device)
    if masks is None or mask_rows is None:
        if masks is not mask_rows:
            raise KernelError(f"{op}: masks and mask_rows, expected both or neither")
        return None, 0
    check_dims(op, "masks", masks, 2)
    check(op, "masks", masks, (masks.shape[0], num_experts), device, (torch.uint8, torch.bool))
    check(op, "mask_rows", mask_rows, (tokens,), device, (torch.int32,))
    return masks.view(torch.uint8), masks.shape[0]


def checked_recovery(
    op: str, masks: torch.Tensor | None, recovery: RouteRecovery | None, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Its ``offsets`` and ``stand_ins``."""
    if recovery is None:
        return None, None
    if masks is None:
        raise KernelError(f"{op}: recovery, expected with masks and mask_rows alone")
    check(op, "offsets", recovery.offsets, masks.shape, device)
    check(op, "stand_ins", recovery.stand_ins, masks.shape, device, (torch.int32,))
    return recovery.offsets, recovery.stand_ins


def checked_sums(
    op: str, tokens: int, masks: torch.Tensor | None, meter: RouteMeter | None, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The meter's ``lost`` and ``outside``, which only masks add to."""
    if meter is None or masks is None:
        return None, None
    check(op, "outside", meter.outside, (1,), device, (torch.int64,))
    if meter.lost is not None:
        check(op, "lost", meter.lost, (tokens,), device)
    return meter.lost, meter.outside


def new_results(tokens: int, top_k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
    return ids, torch.empty(tokens, top_k, device=device)
