"""Weights into panels (csrc/layout.h): allocated once in their final home and written in place."""

from __future__ import annotations

import torch

import moe_runtime._C as _C
from moe_runtime.kernels.checks import check, check_dims, check_layout, failure, weight_tag
from moe_runtime.kernels.packed import PackedExperts, PackedLinear

_HUGE_PAGE = 2 << 20


def _new_packed(count: int, num_bytes: int) -> torch.Tensor:
    """uint8 [count, num_bytes] at a cache line, and on huge pages where the kernel grants them.

    A page table walk per 4 KB would cost a streaming kernel a tenth of its bandwidth.
    """
    total = count * num_bytes
    alignment = _HUGE_PAGE if total >= 2 * _HUGE_PAGE else 64
    room = torch.empty(total + alignment, dtype=torch.uint8)
    start = -room.data_ptr() % alignment
    _C.advise_huge_pages(room.data_ptr() + start, total)
    return room[start : start + total].view(count, num_bytes)


def pack_linear(weight: torch.Tensor) -> PackedLinear:
    check_dims("pack_linear", "weight", weight, 2)
    return pack_linear_heads(weight.unsqueeze(0))


def pack_linear_heads(weight: torch.Tensor) -> PackedLinear:
    check_dims("pack_linear_heads", "weight", weight, 3)
    heads, n, k = weight.shape
    tag = weight_tag("pack_linear_heads", "weight", weight.dtype)
    data = _new_packed(heads, _C.packed_bytes(n, k, tag))
    for head in range(heads):
        source = weight[head].contiguous()
        _C.pack(source.data_ptr(), n, k, tag, 0, data[head].data_ptr())
    return PackedLinear(data, heads, n, k, weight.dtype, "panels")


def new_experts(num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> PackedExperts:
    tag = weight_tag("new_experts", "dtype", dtype)
    gate_up = _new_packed(num_experts, _C.packed_gate_up_bytes(intermediate, hidden, tag))
    down = _new_packed(num_experts, _C.packed_bytes(hidden, intermediate, tag))
    return PackedExperts(gate_up, down, num_experts, hidden, intermediate, dtype, "panels")


def pack_expert(experts: PackedExperts, expert_id: int, part: str, weight: torch.Tensor) -> None:
    op = "pack_expert"
    check_layout(op, experts.layout)
    if not 0 <= expert_id < experts.num_experts:
        raise failure(op, "expert_id", f"0 <= id < {experts.num_experts}", expert_id)
    if part not in ("gate", "up", "down"):
        raise failure(op, "part", "'gate', 'up' or 'down'", repr(part))
    if part == "down":
        n, k, target, home = experts.hidden, experts.intermediate, 0, experts.down
    else:
        n, k, target, home = experts.intermediate, experts.hidden, 2 if part == "up" else 1, experts.gate_up
    source = weight.contiguous()
    address = check(op, part, source, (n, k), experts.dtype)
    _C.pack(address, n, k, weight_tag(op, part, experts.dtype), target, home[expert_id].data_ptr())
