"""Checks on what is handed to the C++ kernels, where a wrong shape would be a wild pointer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_runtime.errors import KernelError
from moe_runtime.kernels.cache_rows import CACHE_DTYPES
from moe_runtime.kernels.meter import RouteMeter
from moe_runtime.kernels.packed import QuantizedWeight, WeightFormat
from moe_runtime.kernels.route_recovery import RouteRecovery


def failure(op: str, argument: str, expected: str, got: object) -> KernelError:
    return KernelError(f"{op}: {argument} is {got}, expected {expected}")


def check(
    op: str, argument: str, tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> int:
    """The address of a contiguous CPU tensor of exactly this shape and dtype."""
    if tensor.dtype is not dtype or tensor.shape != tuple(shape):
        raise failure(op, argument, f"{dtype} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous() or not tensor.is_cpu:
        raise failure(
            op, argument, "contiguous on the CPU", f"on {tensor.device} with strides {tensor.stride()}"
        )
    return int(tensor.data_ptr())


def check_dims(op: str, argument: str, tensor: torch.Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        raise failure(op, argument, f"a tensor of {dims} dimensions", list(tensor.shape))


def check_layout(op: str, layout: str) -> None:
    if layout != "panels":
        raise KernelError(f"{op}: weights are packed as {layout!r} for another backend, expected 'panels'")


def check_codes(
    op: str, argument: str, weight: QuantizedWeight, shape: Sequence[int]
) -> tuple[int, int, int]:
    """The addresses of codes, scales and zeros (0: none) of a quantised matrix of this shape."""
    if not all(part.is_contiguous() and part.is_cpu for part in (weight.codes, weight.scales)):
        raise failure(op, argument, "contiguous on the CPU", "not")
    codes = check(op, argument, weight.codes, shape, torch.uint8)
    zeros = 0 if weight.zeros is None else check(op, argument, weight.zeros, weight.scales.shape, torch.uint8)
    return codes, int(weight.scales.data_ptr()), zeros


def cache_tag(op: str, argument: str, cache: torch.Tensor) -> int:
    """csrc/layout.h's number of a cache's type."""
    if cache.dtype not in CACHE_DTYPES:
        raise failure(op, argument, f"one of {CACHE_DTYPES}", cache.dtype)
    return 3 if cache.dtype is torch.int8 else WeightFormat.of(cache.dtype).tag


def check_fence(
    tokens: int,
    num_experts: int,
    masks: torch.Tensor | None,
    mask_rows: torch.Tensor | None,
    recovery: RouteRecovery | None,
    meter: RouteMeter | None,
) -> tuple[int, int, int, int, int, int, int]:
    """Masks, their number, the rows, offsets, stand-ins, and the meter's two sums, as csrc/router.cpp wants
    them.
    """
    if masks is None or mask_rows is None:
        if masks is not mask_rows:
            raise failure("route", "masks and mask_rows", "both or neither", "one of them")
        if recovery is not None:
            raise failure("route", "recovery", "none without masks", "given")
        return 0, 0, 0, 0, 0, 0, 0
    check_dims("route", "masks", masks, 2)
    count = masks.shape[0]
    masks_at = check("route", "masks", masks.view(torch.uint8), (count, num_experts), torch.uint8)
    rows_at = check("route", "mask_rows", mask_rows, (tokens,), torch.int32)
    offsets_at = stand_ins_at = lost_at = outside_at = 0
    if recovery is not None:
        offsets_at = check("route", "offsets", recovery.offsets, (count, num_experts))
        stand_ins_at = check("route", "stand_ins", recovery.stand_ins, (count, num_experts), torch.int32)
    if meter is not None:
        outside_at = check("route", "outside", meter.outside, (1,), torch.int64)
        lost_at = 0 if meter.lost is None else check("route", "lost", meter.lost, (tokens,))
    return masks_at, count, rows_at, offsets_at, stand_ins_at, lost_at, outside_at
